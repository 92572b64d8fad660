"""The work directory: files put in place, and leftovers."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from tests.unit.union_support import ME, OpenUnion, get, names, open_union
from unionfs.core.steps import Workplace
from unionfs.union.changes import Changes

__all__ = ["open_union"]


def test_only_what_was_not_put_into_place_is_discarded(tmp_path: Path, open_union: OpenUnion) -> None:
    union = open_union()
    root, work = union.require_upper().root_fd, tmp_path / "work/work"
    with union.work.temporary() as placed, union.work.temporary() as left:
        for temporary in (placed, left):
            os.close(temporary.mkdir())
            (work / os.fsdecode(temporary.name) / "in").touch()
        placed.put(root, b"there")
        # a new file that got its name would not be removed
        (work / os.fsdecode(placed.name)).touch()
    assert os.listdir(work) == [os.fsdecode(placed.name)]
    assert os.listdir(tmp_path / "upper/there") == ["in"]


def test_names_differ_between_daemons() -> None:
    """Another host may use the same directory when this one removes what it has left there by its name."""
    ours, others = ({Workplace(-1).next_name() for _ in range(9)} for _ in range(2))
    assert len(ours | others) == 18
    assert all(re.fullmatch(rb"#[0-9a-f]+", name) for name in ours)


def test_a_change_that_was_made_does_not_fail_by_what_is_left(
    tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "l0/d").mkdir(parents=True)
    (tmp_path / "l0/d/f").touch()
    union = open_union()
    changes, root, d = Changes(union), union.nodes.root, get(union, "d")
    changes.unlink(d, b"f")
    os.close(changes.create(d, b"f", 0o644, ME)[2])

    changes.unlink(d, b"f")
    with monkeypatch.context() as patched:
        patched.setattr(union.work, "_remove", _refuse)
        changes.rmdir(root, b"d")
    assert names(union) == set()
    assert len(os.listdir(tmp_path / "work/work")) == 1
    with union.work.temporary():
        pass
    assert os.listdir(tmp_path / "work/work") == []


def test_what_is_left_is_removed_at_the_end(
    tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    union = open_union()
    with monkeypatch.context() as patched, union.work.temporary() as temporary:
        os.close(temporary.mkdir())
        patched.setattr(union.work, "_remove", _refuse)
        temporary.discard()
    assert len(os.listdir(tmp_path / "work/work")) == 1
    union.close()
    assert os.listdir(tmp_path / "work/work") == []


def test_a_directory_is_not_moved_if_the_whiteout_cannot_be_removed(
    tmp_path: Path, open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whiteout of the new name has the old one for a moment."""
    (tmp_path / "l0").mkdir()
    (tmp_path / "l0/gone").touch()
    union = open_union()
    changes, root = Changes(union), union.nodes.root
    changes.unlink(root, b"gone")
    changes.mkdir(root, b"made", 0o755, ME)
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", _refuse)
        with pytest.raises(OSError, match="Input/output"):
            changes.rename(root, b"made", root, b"gone", 0)
    assert names(union) == {b"made"}
    assert sorted(os.listdir(tmp_path / "upper")) == ["gone", "made"]
    changes.rename(root, b"made", root, b"gone", 0)
    assert names(union) == {b"gone"}
    assert os.listdir(tmp_path / "upper") == ["gone"]


def test_nothing_is_kept_of_what_the_kernel_does_not_know(tmp_path: Path, open_union: OpenUnion) -> None:
    """It will not forget it either: what a request found anew, since it was replaced."""
    (tmp_path / "upper").mkdir()
    for name in "ab":
        (tmp_path / "upper" / name).touch()
    union = open_union()
    changes, root = Changes(union), union.nodes.root
    changes.rename(root, b"a", root, b"b", 0, tried=True)
    changes.unlink(root, b"b", tried=True)
    opened = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path)]
    assert not [path for path in opened if path.endswith(("/a (deleted)", "/b (deleted)"))]


def _refuse(name: bytes, *, dir_fd: int = -1) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))
