"""The table of open files: the fds that they hold, which the kernel shows, and who may open more."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.world import errno_of
from tests.unit.test_core_answers import UNIQUE, Mount, in_upper, looked_up, message, released
from tests.unit.test_core_answers import mount as mount
from tests.unit.test_union_bundles import small
from tests.unit.union_support import ME, OpenUnion, copy_up, get
from tests.unit.union_support import open_union as open_union
from unionfs.core.files import OpenFile, RestingFiles
from unionfs.core.node import Node
from unionfs.core.opening import Handles, Opener, may_copy_up
from unionfs.fuse.protocol import Opcode
from unionfs.union.setids import Process
from unionfs.union.tree import Union


def held(tmp_path: Path) -> int:
    """How many fds of regular files of the upper this process has."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing
            found.append(os.fstat(int(number)))
    files = [path.stat() for path in (tmp_path / "upper").rglob("*") if path.is_file()]
    return sum(os.path.samestat(one, other) for one in found for other in files)


def opened(mount: Mount, node: Node, flags: int, uid: int = 0) -> int:
    """Open a file as a user; returns the number of the open file."""
    body = bytearray(message(Opcode.OPEN, node.id, struct.pack("=II", flags, 0)))
    struct.pack_into("=I", body, 24, uid)
    assert mount.answers.take(bytes(body))
    answer = b""
    while struct.unpack_from("=Q", answer.ljust(16), 8)[0] != UNIQUE:  # a notice with data comes before
        answer = mount.kernel.recv(1 << 16)
    assert struct.unpack_from("=i", answer, 4) == (0,)
    number: int = struct.unpack_from("=Q", answer, 16)[0]
    return number


def made(mount: Mount, name: bytes) -> Node:
    """A new file of the upper."""
    node = mount.changes.mknod(in_upper(mount), name, stat.S_IFREG | 0o600, 0, ME)[0]
    node.looked_up()
    return node


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_a_file_that_several_users_have_open(mount: Mount, tmp_path: Path, order: tuple[int, ...]) -> None:
    """The file holds its fd until its last open is closed; one of the users who have it open is charged."""
    node, users = made(mount, b"f"), (7, 8, 9)
    numbers = [opened(mount, node, os.O_RDWR, uid) for uid in users]
    left = set(users)
    for index in order:
        assert (mount.handles.fds, held(tmp_path)) == (1, 1)
        (charged,) = mount.handles.fds_of_users
        assert charged in left
        assert mount.ask(Opcode.RELEASE, node.id, released(numbers[index]))
        left.remove(users[index])
    assert (mount.handles.fds, mount.handles.fds_of_users, held(tmp_path)) == (0, {}, 0)


def test_a_file_to_read_and_one_to_write(mount: Mount, tmp_path: Path) -> None:
    node = made(mount, b"f")
    numbers = [opened(mount, node, flags) for flags in (os.O_RDONLY, os.O_RDONLY, os.O_RDWR, os.O_RDWR)]
    assert (mount.handles.fds, held(tmp_path)) == (2, 2)
    for number, left in zip(numbers, (2, 1, 1, 0), strict=True):
        assert mount.ask(Opcode.RELEASE, node.id, released(number))
        assert (mount.handles.fds, held(tmp_path)) == (left, left)


Copy = Callable[[Mount, Node], object]
COPIES: dict[str, Copy] = {
    "at once": lambda mount, node: small(mount.union).copy(node),
    "in steps": lambda mount, node: copy_up(mount.union, node),
}


@pytest.mark.parametrize("how", COPIES)
def test_readers_of_a_copied_up_file_hold_its_fd(mount: Mount, tmp_path: Path, how: str) -> None:
    """While it is a lower's the table of those closes it at any time; the copy stays open for them."""
    node = looked_up(mount, "d/f")
    numbers = [opened(mount, node, os.O_RDONLY, uid) for uid in (7, 8)]
    assert (mount.handles.fds, held(tmp_path)) == (0, 0)
    COPIES[how](mount, node)
    assert (mount.handles.fds, held(tmp_path)) == (1, 1)
    numbers.append(opened(mount, node, os.O_RDWR, 9))
    assert (mount.handles.fds, held(tmp_path)) == (1, 1)
    for number, left in zip(numbers, (1, 1, 0), strict=True):
        assert mount.ask(Opcode.RELEASE, node.id, released(number))
        assert (mount.handles.fds, held(tmp_path)) == (left, left)
    assert mount.handles.fds_of_users == {}


def test_who_may_copy_up_a_file_that_is_open(tmp_path: Path, open_union: OpenUnion) -> None:
    """Who changes a file of a lower that somebody reads takes a further fd; none while nobody has it open, or
    if its fd is there already."""
    (tmp_path / "l0").mkdir()
    for name in "abc":
        (tmp_path / "l0" / name).touch()
    union = open_union()
    handles = Handles(union.nodes, 4)
    open_, read, counted = (get(union, name) for name in "abc")
    fd = os.open(tmp_path, os.O_PATH)
    file = OpenFile(fd, readable=True, writable=True, waits=False)
    numbers = [handles.register(counted, file, Process(7, 0, 1), writes=True)]
    may_copy_up(read, 7)
    lowers = union.files.lend(read, write=False)
    numbers.append(handles.register(read, lowers, Process(8, 0, 1), writes=False))
    may_copy_up(read, 7)
    more = OpenFile(os.dup(fd), readable=True, writable=True, waits=False)
    numbers.append(handles.register(union.nodes.root, more, Process(7, 0, 1), writes=True))
    assert (handles.fds, handles.fds_of_users) == (2, {7: 2})
    assert errno_of(may_copy_up, read, 7) == errno.EMFILE
    may_copy_up(read, 8)
    may_copy_up(open_, 7)
    may_copy_up(counted, 7)
    for number in numbers:
        handles.release(number)
    may_copy_up(read, 7)


def test_who_may_open_more(tmp_path: Path, open_union: OpenUnion) -> None:
    """Below half of the fds any user may; then only users below an equal share; above three quarters none."""
    union = open_union()
    handles, numbers = Handles(union.nodes, 16), []

    def open_files(uid: int, count: int) -> None:
        for _ in range(count):
            handles.may_hold(uid)
            fd = os.open(tmp_path, os.O_PATH)
            file = OpenFile(fd, readable=True, writable=True, waits=False)
            numbers.append(handles.register(union.nodes.root, file, Process(uid, 0, 1), writes=True))

    open_files(7, 8)
    assert errno_of(handles.may_hold, 7) == errno.EMFILE
    open_files(8, 4)
    assert (handles.fds, handles.fds_of_users) == (12, {7: 8, 8: 4})
    for uid in (7, 8, 9):
        assert errno_of(handles.may_hold, uid) == errno.EMFILE
    handles.release(numbers.pop(0))
    for uid, refused in ((7, True), (8, False), (9, False)):
        assert (errno_of(handles.may_hold, uid) == errno.EMFILE) == refused
    for number in numbers:
        handles.release(number)
    assert (handles.fds, handles.fds_of_users) == (0, {})
    unlimited = Handles(union.nodes)
    unlimited.may_hold(7)


class Lowers:
    """Open files of a lower, of which two may have an fd at a time."""

    def __init__(self, union: Union, tmp_path: Path) -> None:
        self.resting, self.top = RestingFiles(2), tmp_path / "l0"
        opener = Opener(
            union.gate, union.stack.markers.metacopy, self._open, self.resting, remembers=True, unread=True
        )
        self._opener, self.handles, self.files = opener, Handles(union.nodes), []
        for name in sorted(os.listdir(self.top)):
            node = get(union, name)
            file = opener.lend_unread(node, node.in_use())
            assert file is not None
            self.handles.register(node, file, None, writes=False)
            self.files.append(file)

    def _open(self, node: Node) -> OpenFile:
        file = self._opener.open_plain(node)
        assert file is not None
        return file

    def fds(self) -> list[int]:
        """Which of the files have an fd, as the kernel shows it."""
        found = []
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # that of the listing
                found.append(os.fstat(int(number)))
        return [
            index for index in range(len(self.files))
            if any(os.path.samestat((self.top / str(index)).stat(), one) for one in found)
        ]  # fmt: skip


def test_few_files_of_lowers_have_an_fd(tmp_path: Path, open_union: OpenUnion) -> None:
    """Those opened first are closed, unless somebody uses them just now, and opened again to be read."""
    (tmp_path / "l0").mkdir()
    for number in range(5):
        (tmp_path / f"l0/{number}").write_text(f"content {number}")
    lowers = Lowers(open_union(), tmp_path)
    assert (lowers.fds(), len(lowers.resting)) == ([], 0)
    for turn in range(2):
        for number, file in enumerate(lowers.files):
            assert file.read(100, 0) == b"content %d" % number
            expected = sorted({(number - 1) % 5, number} if turn or number else {number})
            assert (lowers.fds(), len(lowers.resting)) == (expected, len(expected))
    with lowers.files[3]:
        for number in range(3):
            lowers.files[number].read(1, 0)
            assert lowers.fds() == sorted([number, 3])
    lowers.files[0].read(1, 0)
    assert lowers.fds() == [0, 2]
    assert lowers.handles.fds == 0
    lowers.handles.release(1)
    assert (lowers.fds(), len(lowers.resting)) == ([2], 1)
    for number in range(2, 6):
        lowers.handles.release(number)
    assert (lowers.fds(), len(lowers.resting)) == ([], 0)
