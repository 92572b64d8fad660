"""Storage served by the union itself: operations go to the host's directory unchanged."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.union_support import ME, OpenUnion, copy_up, get, names, read, whiteout
from tests.unit.union_support import open_union as open_union
from unionfs.core.node import Node
from unionfs.sys import calls
from unionfs.union.changes import Changes
from unionfs.union.tree import Union


@contextmanager
def fails(code: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        yield
    assert caught.value.errno == code, caught.value


def show(union: Union, path: str, source: Path, *, read_only: bool = False) -> Node:
    """Bind a host path at an existing path of the union."""
    above, _, name = path.rpartition("/")
    parent = get(union, above) if above else union.nodes.root
    layer = union.stack.bind(path, os.open(source, os.O_PATH), read_only=read_only)
    return union.bind(parent, name.encode(), layer)


@pytest.fixture
def union(open_union: OpenUnion, tmp_path: Path) -> Union:
    """A union with the host's directory ``host`` at /rw and at /ro."""
    for name in ("l0/rw", "l0/ro", "l0/other", "host/sub"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "l0/rw/covered").touch()
    (tmp_path / "host/file").write_text("host")
    found = open_union()
    show(found, "rw", tmp_path / "host")
    show(found, "ro", tmp_path / "host", read_only=True)
    return found


def test_what_is_there_is_shown(union: Union) -> None:
    assert names(union) == {b"rw", b"ro", b"other"}
    assert names(union, "rw") == {b"file", b"sub"}
    assert read(union, "rw/file") == b"host"


def test_changes_go_to_the_host_without_copy_up(union: Union, tmp_path: Path) -> None:
    changes, rw = Changes(union), get(union, "rw")
    _, _, fd = changes.create(rw, b"new", 0o640, ME)
    os.write(fd, b"written")
    os.close(fd)
    assert (tmp_path / "host/new").read_text() == "written"
    assert stat.S_IMODE((tmp_path / "host/new").stat().st_mode) == 0o640 & ~0o022
    changes.mkdir(rw, b"dir", 0o755, ME)
    changes.symlink(rw, b"link", b"file", ME)
    changes.rename(rw, b"new", get(union, "rw/dir"), b"moved", 0)
    assert (tmp_path / "host/dir/moved").read_text() == "written"
    assert read(union, "rw/dir/moved") == b"written"
    with fails(errno.ENOTEMPTY):
        changes.rmdir(rw, b"dir")
    changes.unlink(get(union, "rw/dir"), b"moved")
    changes.rmdir(rw, b"dir")
    changes.unlink(rw, b"file")
    assert sorted(os.listdir(tmp_path / "host")) == ["link", "sub"]
    # None of this affects the upper, and no whiteout is made.
    assert os.listdir(tmp_path / "upper") == []


def test_renames_within(union: Union, tmp_path: Path) -> None:
    changes, rw = Changes(union), get(union, "rw")
    (tmp_path / "host/sub/inner").write_text("inner")
    file, sub = get(union, "rw/file"), get(union, "rw/sub")
    changes.rename(rw, b"file", rw, b"sub", calls.RENAME_EXCHANGE)
    assert get(union, "rw/sub") is file
    assert get(union, "rw/file") is sub
    assert read(union, "rw/file/inner") == b"inner"
    with fails(errno.EEXIST):
        changes.rename(rw, b"sub", rw, b"file", calls.RENAME_NOREPLACE)
    changes.rename(rw, b"file", rw, b"dir", 0)
    assert read(union, "rw/dir/inner") == b"inner"
    # Over another file, which is open.
    (tmp_path / "host/victim").write_text("victim")
    victim = get(union, "rw/victim")
    victim.lookups += 1
    changes.rename(rw, b"sub", rw, b"victim", 0)
    assert get(union, "rw/victim") is file
    assert union.stat(victim).st_nlink == 0
    assert union.stat(victim).st_size == len("victim")


def test_hard_links_have_one_number(union: Union) -> None:
    changes, rw = Changes(union), get(union, "rw")
    changes.link(get(union, "rw/file"), rw, b"second")
    one, two = get(union, "rw/file"), get(union, "rw/second")
    assert one is not two
    assert one.ino == two.ino
    assert union.attributes(one).nlink == 2
    assert rw.territory.number(rw, b"second") == (one.ino, stat.S_IFREG)


def test_markers_are_plain_data(union: Union, tmp_path: Path) -> None:
    whiteout(tmp_path / "host/device")
    os.setxattr(tmp_path / "host/sub", "user.overlay.opaque", b"y")
    os.setxattr(tmp_path / "host/file", "user.overlay.metacopy", b"")
    assert names(union, "rw") == {b"file", b"sub", b"device"}
    assert get(union, "rw/device").kind == stat.S_IFCHR
    assert read(union, "rw/file") == b"host"
    sub = get(union, "rw/sub")
    assert sub.territory.stored_name(b"user.overlay.opaque") == b"user.overlay.opaque"
    assert sub.territory.shown_names([b"user.overlay.opaque"]) == [b"user.overlay.opaque"]
    if os.geteuid() == 0:
        Changes(union).mknod(get(union, "rw"), b"made", stat.S_IFCHR | 0o600, 0, ME)
        assert (tmp_path / "host/made").stat().st_rdev == 0


def test_no_change_makes_a_marker(union: Union, tmp_path: Path) -> None:
    """Nor a copy, though the lower below the bound directory has the same names."""
    changes, host = Changes(union), tmp_path / "host"
    for name in ("file", "other", "sub", "gone", "new"):
        (tmp_path / "l0/rw" / name).touch()
    for name in ("other", "third"):
        (host / name).write_text(name)
    (host / "gone").mkdir()
    (host / "sub/inner").mkdir()
    rw = get(union, "rw")
    changes.unlink(rw, b"file")
    changes.rmdir(rw, b"gone")
    changes.mkdir(rw, b"gone", 0o755, ME)
    changes.mkdir(rw, b"new", 0o755, ME)
    with fails(errno.EEXIST):
        changes.mkdir(rw, b"new", 0o755, ME)
    changes.rename(rw, b"other", rw, b"third", 0)
    changes.rename(rw, b"new", rw, b"gone", 0)
    changes.rename(rw, b"gone", rw, b"sub", calls.RENAME_EXCHANGE)
    changes.rename(get(union, "rw/gone"), b"inner", rw, b"inner", 0)
    changes.link(get(union, "rw/third"), rw, b"linked")
    whiteout(host / "device")
    with fails(errno.EEXIST):
        changes.create(rw, b"device", 0o600, ME)
    (host / "device").unlink()
    found = {path: os.listxattr(path) for path in sorted(host.rglob("*"))}
    expected = ("gone", "inner", "linked", "sub", "third")
    assert found == {host / name: [] for name in expected}
    assert not any(stat.S_ISCHR(path.lstat().st_mode) for path in found)
    assert os.listdir(tmp_path / "upper") == []


def test_the_border_is_one_between_filesystems(union: Union, tmp_path: Path) -> None:
    changes, root = Changes(union), union.nodes.root
    rw, other = get(union, "rw"), get(union, "other")
    with fails(errno.EXDEV):
        changes.rename(rw, b"file", other, b"file", 0)
    changes.mkdir(root, b"mine", 0o755, ME)
    with fails(errno.EXDEV):
        changes.rename(root, b"mine", rw, b"mine", 0)
    with fails(errno.EXDEV):
        changes.link(get(union, "rw/file"), other, b"file")
    with fails(errno.EXDEV):
        changes.rename(rw, b"file", get(union, "ro"), b"file2", 0)
    for change in (
        lambda: changes.rmdir(root, b"rw"),
        lambda: changes.rename(root, b"rw", root, b"rw2", 0),
        lambda: changes.rename(root, b"mine", root, b"rw", 0),
    ):
        with fails(errno.EBUSY):
            change()


def test_a_directory_above_can_be_renamed(union: Union, tmp_path: Path) -> None:
    changes, root = Changes(union), union.nodes.root
    changes.mkdir(root, b"above", 0o755, ME)
    changes.mkdir(get(union, "above"), b"point", 0o755, ME)
    show(union, "above/point", tmp_path / "host")
    changes.rename(root, b"above", root, b"renamed", 0)
    assert read(union, "renamed/point/file") == b"host"
    with fails(errno.ENOTEMPTY):
        changes.rmdir(root, b"renamed")


def test_read_only(union: Union, tmp_path: Path) -> None:
    changes, ro = Changes(union), get(union, "ro")
    file = get(union, "ro/file")
    for change in (
        lambda: changes.create(ro, b"x", 0o600, ME),
        lambda: changes.mkdir(ro, b"x", 0o700, ME),
        lambda: changes.unlink(ro, b"file"),
        lambda: changes.rmdir(ro, b"sub"),
        lambda: changes.rename(ro, b"file", ro, b"x", 0),
        lambda: changes.link(file, ro, b"x"),
        lambda: file.territory.require_writable(),
        lambda: union.files.lend(file, write=True),
    ):
        with fails(errno.EROFS):
            change()
    assert sorted(os.listdir(tmp_path / "host")) == ["file", "sub"]


def test_what_the_host_changes_is_seen(union: Union, tmp_path: Path) -> None:
    rw, host = get(union, "rw"), tmp_path / "host"
    old = get(union, "rw/file")
    old.lookups += 1
    (host / "fresh").write_text("changed")
    (host / "fresh").rename(host / "file")  # as an editor saves
    assert get(union, "rw/file") is not old
    assert read(union, "rw/file") == b"changed"
    (host / "file").unlink()
    assert union.lookup(rw, b"file") is None
    (host / "file").mkdir()
    assert get(union, "rw/file").is_dir
    union.nodes.forget(old, 1)
    (host / "sub/new").touch()
    assert names(union, "rw/sub") == {b"new"}
    (host / "sub").rename(host / "sub2")
    (host / "sub").mkdir()
    assert names(union, "rw/sub") == set()
    assert names(union, "rw/sub2") == {b"new"}


def test_one_file(open_union: OpenUnion, tmp_path: Path) -> None:
    (tmp_path / "l0/etc").mkdir(parents=True)
    (tmp_path / "l0/etc/conf").write_text("lower")
    (tmp_path / "conf").write_text("host")
    union = open_union()
    node = show(union, "etc/conf", tmp_path / "conf")
    assert read(union, "etc/conf") == b"host"
    file = union.files.lend(node, write=True)
    file.write(b"HOST", 0)
    union.files.take_back(node, file)
    assert (tmp_path / "conf").read_text() == "HOST"
    changes, etc = Changes(union), get(union, "etc")
    with fails(errno.EBUSY):
        changes.unlink(etc, b"conf")
    os.close(changes.create(etc, b"mine", 0o600, ME)[2])
    with fails(errno.EBUSY):
        changes.rename(etc, b"mine", etc, b"conf", 0)
    assert read(union, "etc/conf") == b"HOST"


def test_storage_within_storage(union: Union, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/x").write_text("x")
    show(union, "rw/sub", tmp_path / "inner")
    assert read(union, "rw/sub/x") == b"x"
    changes, rw = Changes(union), get(union, "rw")
    with fails(errno.EBUSY):
        changes.rmdir(rw, b"sub")
    with fails(errno.EXDEV):
        changes.rename(rw, b"file", get(union, "rw/sub"), b"file", 0)
    assert rw.territory.number(rw, b"sub") == (get(union, "rw/sub").ino, stat.S_IFDIR)
    assert names(union, "rw") == {b"file", b"sub"}


def test_unbound_again(union: Union, tmp_path: Path) -> None:
    node = show(union, "other", tmp_path / "host")
    assert names(union, "other") == {b"file", b"sub"}
    union.nodes.forget(node, 1)
    assert names(union, "other") == set()
    Changes(union).rmdir(union.nodes.root, b"other")


def test_lowers_are_still_copied_up_beside_it(union: Union, tmp_path: Path) -> None:
    (tmp_path / "l0/other/low").write_text("low")
    copy_up(union, get(union, "other/low"))
    assert (tmp_path / "upper/other/low").read_text() == "low"
