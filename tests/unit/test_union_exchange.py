"""Changes on an upper whose filesystem refuses renameat2's flags, as NFS does: the same in more steps."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import snapshot
from tests.support.world import errno_of
from tests.unit.union_support import ME, OpenUnion, copy_up, find, get, names, not_plain, open_union
from unionfs.core.steps import set_hook
from unionfs.sys import calls
from unionfs.union.changes import Changes
from unionfs.union.renaming import Renaming
from unionfs.union.tree import Union

__all__ = ["open_union"]


def _lower(lower: Path) -> None:
    for name in ("dir", "other", "whole"):
        (lower / name).mkdir(parents=True)
        (lower / name / "in").write_text(name)
    for name in ("file", "second", "third"):
        (lower / name).write_text(name)


def _rename(union: Union, old: str, new: str) -> None:
    root = union.nodes.root
    node = get(union, old)
    if not node.is_dir:
        copy_up(union, node)
    Changes(union).rename(root, old.encode(), root, new.encode(), 0)


def _empty(union: Union, name: str) -> None:
    directory = get(union, name)
    Changes(union).unlink(directory, b"in")
    Changes(union).rmdir(union.nodes.root, name.encode())


def directory_over_whiteout(union: Union) -> None:
    Changes(union).unlink(union.nodes.root, b"file")
    Changes(union).mkdir(union.nodes.root, b"file", 0o750, ME)


def opaque_directory(union: Union) -> None:
    _empty(union, "dir")
    Changes(union).mkdir(union.nodes.root, b"dir", 0o750, ME)


def whiteout_over_directory(union: Union) -> None:
    _empty(union, "dir")  # it is copied up with the whiteout in it, and hides the lower's


def file_leaves_whiteout(union: Union) -> None:
    _rename(union, "file", "new")


def file_over_file(union: Union) -> None:
    _rename(union, "file", "second")


def file_over_whiteout(union: Union) -> None:
    Changes(union).unlink(union.nodes.root, b"second")
    _rename(union, "file", "second")


def directory_leaves_whiteout(union: Union) -> None:
    opaque_directory(union)
    Changes(union).mkdir(get(union, "dir"), b"mine", 0o755, ME)
    _rename(union, "dir", "new")


def directory_over_a_whiteout(union: Union) -> None:
    opaque_directory(union)
    _empty(union, "other")
    _rename(union, "dir", "other")


def new_directory_over_a_whiteout(union: Union) -> None:
    _empty(union, "other")
    Changes(union).mkdir(union.nodes.root, b"new", 0o755, ME)
    Changes(union).mkdir(get(union, "new"), b"mine", 0o755, ME)
    _rename(union, "new", "other")


def directory_over_one_with_whiteouts(union: Union) -> None:
    Changes(union).unlink(get(union, "whole"), b"in")
    Changes(union).mkdir(union.nodes.root, b"new", 0o755, ME)
    _rename(union, "new", "whole")


def merged_directory(union: Union) -> None:
    _rename(union, "dir", "new")


def merged_directory_over_a_whiteout(union: Union) -> None:
    _empty(union, "other")
    _rename(union, "dir", "other")


def merged_directory_over_one_with_whiteouts(union: Union) -> None:
    Changes(union).unlink(get(union, "whole"), b"in")
    _rename(union, "dir", "whole")


SCENARIOS: list[Callable[[Union], None]] = [
    directory_over_whiteout, opaque_directory, whiteout_over_directory, file_leaves_whiteout, file_over_file,
    file_over_whiteout, directory_leaves_whiteout, directory_over_a_whiteout, new_directory_over_a_whiteout,
    directory_over_one_with_whiteouts, merged_directory, merged_directory_over_a_whiteout,
    merged_directory_over_one_with_whiteouts,
]  # fmt: skip


@pytest.fixture(autouse=True)
def _bundles() -> Iterator[None]:
    """What :func:`_refuse_flags` has taken away comes back."""
    yield
    set_hook(None)


def _refuse_flags(monkeypatch: pytest.MonkeyPatch, *, but: int = 0) -> None:
    set_hook(not_plain)  # a bundle would call the kernel itself
    real = calls.renameat2

    def renameat2(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int = 0) -> None:
        if flags & ~but:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(old_fd, old, new_fd, new, flags)

    monkeypatch.setattr(calls, "renameat2", renameat2)


def _upper(tmp_path: Path) -> dict[bytes, object]:
    found = snapshot.take(tmp_path / "upper")
    return {path: (e.mode, e.rdev, e.content, e.names, sorted(e.xattrs.items())) for path, e in found.items()}


@pytest.mark.parametrize("known", [0, calls.RENAME_NOREPLACE], ids=["nfs", "ext2"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda function: function.__name__)
def test_the_upper_is_the_same(
    tmp_path: Path,
    open_union: OpenUnion,
    scenario: Callable[[Union], None],
    monkeypatch: pytest.MonkeyPatch,
    known: int,
) -> None:
    if os.geteuid() != 0:
        pytest.skip("whiteouts are devices, which only root can make")
    _lower(tmp_path / "l0")
    union = open_union()
    scenario(union)
    expected, shown = _upper(tmp_path), names(union)
    union.close()
    for name in ("upper", "work"):
        (tmp_path / name).rename(tmp_path / f"{name}-with-flags")
    _refuse_flags(monkeypatch, but=known)
    other = open_union()
    scenario(other)
    assert _upper(tmp_path) == expected
    assert names(other) == shown
    assert os.listdir(tmp_path / "work/work") == []


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_exchange_that_fails_is_undone(
    tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    union = open_union()
    upper = tmp_path / "upper"
    (upper / "one").mkdir()
    (upper / "other").write_text("other")
    _refuse_flags(monkeypatch)
    real, count = os.rename, iter(range(1, 100))

    def rename(*arguments: object, **extra: object) -> None:
        if next(count) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(*arguments, **extra)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", rename)
    fd = union.require_upper().root_fd
    with pytest.raises(OSError, match="Input/output"):
        union.work.exchange((fd, b"one"), (fd, b"other"))
    assert (upper / "one").is_dir()
    assert (upper / "other").read_text() == "other"
    assert os.listdir(tmp_path / "work/work") == []


@pytest.mark.parametrize("known", [0, calls.RENAME_NOREPLACE, calls.RENAME_NOREPLACE | calls.RENAME_EXCHANGE])
@pytest.mark.parametrize(
    "scenario",
    [file_leaves_whiteout, file_over_file, file_over_whiteout, directory_leaves_whiteout, merged_directory],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_a_rename_that_leaves_no_whiteout_is_undone(
    tmp_path: Path,
    open_union: OpenUnion,
    monkeypatch: pytest.MonkeyPatch,
    scenario: Callable[[Union], None],
    known: int,
) -> None:
    """Each of its steps fails once, in every implementation of the rename."""
    if os.geteuid() != 0:
        pytest.skip("whiteouts are devices, which only root can make")
    link, rename = os.link, os.rename
    _refuse_flags(monkeypatch, but=known)
    renameat2, rename_over = calls.renameat2, Renaming._rename_over
    before: list[object] = []
    steps = 0
    failing = -1
    undoes = False

    def step(function: Callable[..., None]) -> Callable[..., None]:
        def called(*arguments: object, **extra: object) -> None:
            nonlocal steps, undoes
            steps += bool(before) and not undoes
            if steps == failing and not undoes:
                undoes = True  # later calls undo changes, and must not fail
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            undoes = steps == failing
            try:
                function(*arguments, **extra)
            except OSError:
                undoes = bool(before) and calls.RENAME_EXCHANGE in arguments
                raise

        return called

    def observed(*arguments: object, **extra: object) -> None:
        before.append(_upper(tmp_path))
        rename_over(*arguments, **extra)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", step(link))
    monkeypatch.setattr(os, "rename", step(rename))
    monkeypatch.setattr(calls, "renameat2", step(renameat2))
    monkeypatch.setattr(Renaming, "_rename_over", observed)
    for failing in range(1, 20):
        before.clear()
        steps, undoes = 0, False
        for name in ("l0", "upper", "work"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        _lower(tmp_path / "l0")
        union = open_union()
        ended = errno_of(scenario, union)
        union.close()
        union.stack.close()
        if not ended:
            break
        assert ended == errno.EIO
        assert _upper(tmp_path) == before[0], failing
        assert os.listdir(tmp_path / "work/work") == []
    assert failing > 3


def test_what_cannot_be_linked_is_renamed(
    tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("whiteouts are devices, which only root can make")
    _lower(tmp_path / "l0")
    union = open_union()
    _refuse_flags(monkeypatch)

    def link(*arguments: object, **extra: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    file_leaves_whiteout(union)
    assert find(union, "file") is None
    assert (tmp_path / "upper/new").read_text() == "file"
    assert (tmp_path / "upper/file").is_char_device()
