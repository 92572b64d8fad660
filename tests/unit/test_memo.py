"""Calls on slow layers: wanted first, and then known. Results are compared with those of the same calls."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest

from tests.support.world import errno_of
from unionfs.core import layercalls, marks, memo
from unionfs.core.entries import Entries
from unionfs.core.memo import Memo, Wanted
from unionfs.core.places import Layer

_T = TypeVar("_T")
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class World:
    """A slow layer, and the memo of a request."""

    def __init__(self, top: Path) -> None:
        (top / "inner").mkdir()
        (top / "file").write_bytes(b"content" * 1000)
        (top / "inner/other").write_text("other")
        os.setxattr(top / "file", "user.any", b"value")
        self.top, self.fd = top, os.open(top, os.O_PATH)
        self.layer = Layer(0, str(top), self.fd, is_upper=False)
        self.layer.is_slow()
        self.memo = Memo()

    def answer(self, handler: Callable[[], _T]) -> tuple[_T, int]:
        """The result of a handler, and how often it was begun."""
        for turn in range(1, 100):
            try:
                with self.memo:
                    return handler(), turn
            except Wanted:
                self.make()
        raise AssertionError("it wants calls for ever")

    def make(self) -> None:
        calls = self.memo.wanted()
        assert calls
        for call in calls:
            call.make(self.memo)
        self.memo.made(calls)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    yield found
    found.memo.close()
    os.close(found.fd)


def _fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def _fds_of(path: Path) -> list[int]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing
            if os.path.samestat(os.fstat(int(number)), path.stat()):
                found.append(int(number))
    return found


def test_wanted_and_then_known(world: World) -> None:
    found, turns = world.answer(
        lambda: layercalls.call(os.stat, b"file", dir_fd=world.fd, follow_symlinks=False)
    )
    assert found == os.stat(world.top / "file")
    assert turns == 2


def test_results_do_not_change_during_a_request(world: World) -> None:
    def handler() -> int:
        return layercalls.call(os.stat, b"file", dir_fd=world.fd, follow_symlinks=False).st_size

    before, _ = world.answer(handler)
    (world.top / "file").write_bytes(b"")
    assert world.answer(handler) == (before, 1)


def test_results_are_outdated(world: World) -> None:
    """A request that is in progress when the layers are looked at again has the new results."""

    def handler() -> int:
        return layercalls.call(os.stat, b"file", dir_fd=world.fd, follow_symlinks=False).st_size

    assert world.answer(handler) == (7000, 1 + 1)
    (world.top / "file").write_bytes(b"")
    memo.outdate()
    assert world.answer(handler) == (0, 1 + 1)


def test_a_directory_is_listed_from_its_first_name(world: World) -> None:
    """Also if somebody has read it before."""
    fd = os.open(world.top, os.O_RDONLY | os.O_DIRECTORY)
    marked = layercalls.call(os.open, b"/proc/self/fd/%d/." % world.fd, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(2):

            def handler() -> list[bytes]:
                found = Entries([None])
                found.read(0, marked)
                return sorted(found.names())

            assert world.answer(handler)[0] == sorted(os.fsencode(name) for name in os.listdir(fd))
            memo.outdate()
    finally:
        os.close(fd)
        os.close(marked)


def test_no_directory(world: World) -> None:
    """`dir_fd` may be None."""
    path = b"/proc/self/fd/%d/file" % world.fd
    natively = os.stat(world.top / "file")
    assert world.answer(lambda: layercalls.call(os.stat, path, dir_fd=None))[0] == natively


def test_errors(world: World) -> None:
    def handler() -> os.stat_result:
        return layercalls.call(os.stat, b"missing", dir_fd=world.fd, follow_symlinks=False)

    with pytest.raises(FileNotFoundError):
        world.answer(handler)


def test_what_is_opened_is_slow_too(world: World) -> None:
    """And every run gets an fd of its own."""

    def handler() -> tuple[int, list[str], bytes]:
        fd = layercalls.call(os.open, b"file", os.O_RDONLY, dir_fd=world.fd)
        try:
            names = layercalls.call(os.listxattr, fd)
            return layercalls.call(os.fstat, fd).st_size, names, layercalls.read(fd, 7000, 0)
        finally:
            marks.close_fd(fd)

    before = _fds()
    found, turns = world.answer(handler)
    assert found == (7000, os.listxattr(world.top / "file"), b"content" * 1000)
    assert turns == 2  # these calls are made along with the open
    world.memo.close()
    assert _fds() == before


def test_a_walk(world: World) -> None:
    def handler() -> bytes:
        inner = layercalls.call(os.open, b"inner", _PATH | os.O_DIRECTORY, dir_fd=world.fd)
        try:
            with_data = layercalls.call(os.open, b"other", os.O_RDONLY, dir_fd=inner)
        finally:
            marks.close_fd(inner)
        try:
            assert marks.slow(with_data)
            return layercalls.read(with_data, 5, 0)
        finally:
            marks.close_fd(with_data)

    found, turns = world.answer(handler)
    assert found == b"other"
    assert turns == 3


def test_functions_and_paths(world: World) -> None:
    where = b"/proc/self/fd/%d/file" % world.fd
    found, _ = world.answer(lambda: layercalls.call(os.getxattr, where, b"user.any", follow_symlinks=False))
    assert found == b"value"
    with pytest.raises(OSError, match=r"No data"):
        world.answer(lambda: layercalls.call(os.getxattr, where, b"user.none", follow_symlinks=False))


def test_a_request_that_ended_before_its_call(world: World) -> None:
    before = _fds()
    with world.memo, pytest.raises(Wanted):
        layercalls.call(os.open, b"file", os.O_RDONLY, dir_fd=world.fd)
    world.memo.close()
    assert _fds() == before


def test_a_request_that_ends_during_its_call(world: World) -> None:
    """Then the thread that makes the call closes what it opened."""
    before = _fds()
    fifo = world.top / "fifo"
    os.mkfifo(fifo)
    with world.memo, pytest.raises(Wanted):
        layercalls.call(os.open, b"fifo", os.O_RDONLY, dir_fd=world.fd)
    (call,) = world.memo.wanted()
    thread = threading.Thread(target=call.make, args=(world.memo,))
    thread.start()
    state = Path(f"/proc/self/task/{thread.native_id}/stat")
    while not state.read_text().rpartition(")")[2].startswith(" S"):
        time.sleep(0.001)
    world.memo.close()
    os.close(os.open(fifo, os.O_RDWR))  # lets the open return
    thread.join()
    assert _fds() == before


def test_what_a_call_opened_is_closed_once(world: World) -> None:
    """The request may end while the thread is about to see that it has ended: both drop the call."""
    with world.memo, pytest.raises(Wanted):
        layercalls.call(os.open, b"file", os.O_RDONLY, dir_fd=world.fd)
    (call,) = world.memo.wanted()
    call.make(world.memo)
    (opened,) = _fds_of(world.top / "file")
    call.drop()
    assert _fds_of(world.top / "file") == []
    others = [os.open("/", os.O_PATH) for _ in range(8)]
    assert opened in others
    call.drop()
    for other in others:
        os.close(other)  # EBADF if it was closed


def test_an_fd_that_was_closed_elsewhere(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    fd = layercalls.call(os.open, b"file", os.O_RDONLY, dir_fd=world.fd)
    assert marks.slow(fd)
    os.close(fd)
    other = tmp_path_factory.mktemp("other") / "file"
    other.write_text("fast")
    again, beside = os.open(other, os.O_RDONLY), os.open(other, os.O_RDONLY)
    try:
        assert again == fd
        assert not marks.slow(again)
        assert not marks.slow(beside)
    finally:
        os.close(again)
        os.close(beside)


def test_other_threads_and_times_just_call(world: World) -> None:
    natively = os.stat(world.top / "file")
    assert layercalls.call(os.stat, b"file", dir_fd=world.fd, follow_symlinks=False) == natively
    found: list[os.stat_result] = []

    def run() -> None:
        found.append(layercalls.call(os.stat, b"file", dir_fd=world.fd, follow_symlinks=False))

    with world.memo:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert found == [natively]
    assert not world.memo.used


def test_copies_of_fds_are_the_same_object(world: World) -> None:
    def handler() -> int:
        copy = marks.duplicate(world.fd)
        try:
            return layercalls.call(os.fstat, copy).st_ino
        finally:
            marks.close_fd(copy)

    assert world.answer(handler) == (os.fstat(world.fd).st_ino, 2)


def test_a_copy_of_what_is_not_open(world: World) -> None:
    fd = os.dup(world.fd)
    os.close(fd)
    assert errno_of(marks.duplicate, fd) == errno_of(os.dup, fd) == errno.EBADF
    # A mark that was left behind does not count.
    fd = layercalls.call(os.open, b"file", os.O_RDONLY, dir_fd=world.fd)
    os.close(fd)
    assert errno_of(marks.duplicate, fd) == errno.EBADF
    assert errno_of(marks.close_fd, fd) == errno.EBADF


def test_files_are_closed_aside(world: World) -> None:
    """Not directories, for which close(2) does not wait."""
    closed: list[tuple[int, int]] = []
    fd = layercalls.call(os.open, b"file", os.O_RDONLY, dir_fd=world.fd)
    inner = layercalls.call(os.open, b"inner", _PATH, dir_fd=world.fd)
    marks.close_with(lambda fd, layer: closed.append((fd, layer)))
    try:
        marks.close_fd(fd)
        marks.close_fd(inner)
    finally:
        marks.close_with(None)
        os.close(fd)
    assert closed == [(fd, world.layer.slow)]
