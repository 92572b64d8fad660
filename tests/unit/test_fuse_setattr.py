"""SETATTR with a copy-up, without a mount."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from tests.unit.union_support import OpenUnion, get
from tests.unit.union_support import open_union as open_union
from unionfs.core.node import Node
from unionfs.core.opening import Handles
from unionfs.core.setting import Change
from unionfs.fuse import copying
from unionfs.fuse.inline import begin
from unionfs.fuse.operations import Named, Operations
from unionfs.union.tree import Union

PAST = 10**18


CHANGES = [
    Change(mode=0o4711),
    Change(mode=0o600),
    Change(mtime_ns=7),
    Change(size=2),
    Change(uid=os.geteuid()),
]


@pytest.fixture
def union(tmp_path: Path, open_union: OpenUnion) -> Union:
    (tmp_path / "l0/d").mkdir(parents=True)
    for name in ("f", "g"):
        (tmp_path / "l0/d" / name).write_text("data")
        (tmp_path / "l0/d" / name).chmod(0o644)
    os.utime(tmp_path / "l0/d", ns=(PAST, PAST))
    union = open_union()
    union.stack.volatile = True  # so no sync to a disk is needed
    _set(union, get(union, "d/g"), Change(mode=0o600))  # opens the directories
    return union


def _set(union: Union, node: Node, change: Change) -> Named:
    found = begin(Operations(union).setattr(node.id, change, None, 0))
    assert isinstance(found, tuple)
    return found


def _check(found: Named, change: Change) -> None:
    st = found[1].st
    assert stat.S_IMODE(st.st_mode) == (change.mode or 0o644)
    assert st.st_size == (4 if change.size is None else change.size)
    assert change.mtime_ns in (None, st.st_mtime_ns)


@pytest.mark.parametrize("change", CHANGES)
def test_all_is_done_at_once(union: Union, tmp_path: Path, change: Change) -> None:
    fds = os.listdir("/proc/self/fd")
    _check(_set(union, get(union, "d/f"), change), change)
    assert (tmp_path / "upper/d").stat().st_mtime_ns == PAST
    assert os.listdir("/proc/self/fd") == fds


@pytest.mark.parametrize("change", [one for one in CHANGES if one.size is None])
def test_a_small_file_is_not_copied_in_steps(
    union: Union, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    """The core makes its copy-up at once, with fewer system calls."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("it is copied in steps")

    monkeypatch.setattr(copying, "FileCopy", refuse)
    operations = Operations(union)
    found = begin(operations.setattr(get(union, "d/f").id, change, None, 0))
    assert isinstance(found, tuple)
    _check(found, change)
    figures = operations.figures()
    assert (figures["copy_ups"], figures["copied_bytes"]) == (1, len("data"))


@pytest.mark.parametrize("name", ["f", "link"])
@pytest.mark.parametrize("which", ["atime_ns", "mtime_ns"])
async def test_one_time_alone(union: Union, tmp_path: Path, which: str, name: str) -> None:
    """Of what is copied up in steps: a file that has to be synced, and a symlink."""
    union.stack.volatile = False
    (tmp_path / "l0/d/link").symlink_to("f")
    before = (tmp_path / "l0/d" / name).lstat()
    wanted = {"atime_ns": before.st_atime_ns, "mtime_ns": before.st_mtime_ns} | {which: 7}
    await Operations(union).setattr(get(union, f"d/{name}").id, Change(**{which: 7}), None, 0)
    st = (tmp_path / "upper/d" / name).lstat()
    assert {"atime_ns": st.st_atime_ns, "mtime_ns": st.st_mtime_ns} == wanted


def test_what_nobody_need_wait_for(union: Union, tmp_path: Path) -> None:
    """After the answer the state is final, except that files are still open."""
    change = Change(size=2)
    union.files.defer()
    fds = os.listdir("/proc/self/fd")
    _check(_set(union, get(union, "d/f"), change), change)
    assert (tmp_path / "upper/d").stat().st_mtime_ns == PAST
    assert len(os.listdir("/proc/self/fd")) > len(fds)
    union.files.close_deferred()
    assert os.listdir("/proc/self/fd") == fds


@pytest.mark.parametrize("begun", ["before", "after"])
def test_a_listing_between_two_copy_ups(union: Union, tmp_path: Path, begun: str) -> None:
    """The upper's directory keeps that access time, if its filesystem records any. A thread reads a large
    one, and a copy-up may come between its start and its access."""
    (tmp_path / "native").mkdir()
    (tmp_path / "l0/d/h").touch()
    files, directory = [get(union, "d/f"), get(union, "d/h")], get(union, "d")
    os.utime(tmp_path / "native", ns=(PAST, PAST))
    os.utime(tmp_path / "upper/d", ns=(PAST, PAST))
    early = directory.territory.listing(directory)
    _set(union, files[0], Change(mode=0o600))  # the directory's attributes are not requested from here on
    (early if begun == "before" else directory.territory.listing(directory)).names()
    os.listdir(tmp_path / "native")
    _set(union, files[1], Change(mode=0o600))
    noted = [(tmp_path / name).stat().st_atime_ns > PAST for name in ("upper/d", "native")]
    assert noted[0] == noted[1]
    early.names()  # which closes the directory


def test_under_a_umask(tmp_path: Path, open_union: OpenUnion) -> None:
    """The permissions equal the requested ones for every user of the union."""
    (tmp_path / "l0/d").mkdir(parents=True)
    (tmp_path / "l0/d/f").touch()
    before = os.umask(0o077)
    try:
        union = open_union()
        union.stack.volatile = True
        _set(union, get(union, "d/f"), Change(mode=0o666))
        _set(union, get(union, "d"), Change(mode=0o757))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "upper/d/f").stat().st_mode) == 0o666
    assert stat.S_IMODE((tmp_path / "upper/d").stat().st_mode) == 0o757


@pytest.mark.parametrize("time", [-1, 10**9, 13_569_465_600 * 10**9 + 5, -13_569_465_600 * 10**9 - 5])
def test_times_that_64_bits_of_nanoseconds_cannot_hold(
    tmp_path: Path, open_union: OpenUnion, time: int
) -> None:
    """As `touch -d 2400-01-01` makes; compared with the same calls on the native filesystem."""
    native, lower = tmp_path / "native", tmp_path / "l0/d"
    lower.mkdir(parents=True)
    (lower / "f").touch()
    native.touch()
    os.utime(native, ns=(time, time))
    expected = native.stat().st_mtime_ns
    os.utime(lower, ns=(time, time))
    union = open_union()
    union.stack.volatile = True
    for _ in range(2):  # with a copy-up, and without
        _, found = _set(union, get(union, "d/f"), Change(mtime_ns=time))
        assert (found.st.st_mtime_ns, found.packed()[32:40]) == (
            expected, (expected // 10**9).to_bytes(8, "little", signed=True),
        )  # fmt: skip
        assert (tmp_path / "upper/d/f").stat().st_mtime_ns == expected
    assert (tmp_path / "upper/d").stat().st_mtime_ns == expected
    assert get(union, "d").attributes_of(native.stat()).st.st_mtime_ns == expected


def test_a_copy_up_while_the_close_of_the_lower_reports_an_error(
    union: Union, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a FUSE or NFS server may let close(2) do, which closes the fd nevertheless. Of a file that was only
    read it says nothing; the copy's fd, which is in use from then on, must stay open."""
    close = os.close

    def report(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, "")

    node = get(union, "d/f")
    handles = Handles(union.nodes)
    number = handles.register(node, union.files.lend(node, write=False), None, writes=False)
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "close", report)
        _set(union, node, Change(mode=0o600))
    assert node.use is not None
    assert node.use.file is not None
    assert node.use.file.read(9, 0) == b"data"
    assert len(os.listdir("/proc/self/fd")) == before
    handles.release(number)


def test_a_node_is_forgotten_although_a_close_reports_an_error(
    union: Union, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = os.close

    def report(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, "")

    node = get(union, "d/f")
    handles = Handles(union.nodes)
    number = handles.register(node, union.files.lend(node, write=False), None, writes=False)
    with monkeypatch.context() as patched:
        patched.setattr(os, "close", report)
        with pytest.raises(OSError, match="Errno 5"):
            handles.release(number)
    assert union.nodes.named(node.id) is None
