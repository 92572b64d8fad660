"""Answers that are spliced from a file into the device, for which a pipe stands here."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from unionfs.core.files import OpenFile
from unionfs.fuse.direct.splicing import Splicer

PAGE = mmap.PAGESIZE
SIZE = 5 * PAGE + 100
DATA = os.urandom(SIZE)


class World:
    """A splicer, the file that it reads, and what it sends."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(DATA)
        self.path = path
        self.file = OpenFile(os.open(path, os.O_RDONLY), readable=True, writable=False, waits=False)
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK)
        self.told: list[int] = []
        self.splicer = Splicer(self.writer, self.told.append)

    def sent(self) -> bytes:
        try:
            return os.read(self.reader, 1 << 20)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.splicer.close()
        self.file.release()
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    before = os.listdir("/proc/self/fd")
    found = World(tmp_path / "file")
    yield found
    found.close()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("offset", "size"), [(0, SIZE), (0, PAGE), (PAGE, 2 * PAGE), (99, PAGE + 3), (PAGE, 1 << 20)]
)
def test_a_part_of_a_file(world: World, offset: int, size: int) -> None:
    """The answer is as pread(2) says, also beyond the end; its request is named once."""
    wanted = DATA[offset : offset + size]
    for unique in (7, 8):
        assert world.splicer.answer(unique, world.file, offset, size) == len(wanted)
        assert world.sent() == struct.pack("=IiQ", 16 + len(wanted), 0, unique) + wanted
    assert world.told == [7, 8]


@pytest.mark.parametrize(
    ("offset", "size"), [(0, PAGE - 1), (SIZE - 100, 1 << 20), (SIZE, 1 << 20), (SIZE + PAGE, 1 << 20)]
)
def test_too_little(world: World, offset: int, size: int) -> None:
    """The caller has to answer."""
    assert world.splicer.answer(7, world.file, offset, size) == 0
    assert (world.sent(), world.told) == (b"", [])


def test_a_file_that_ends_early(world: World) -> None:
    """As one of sysfs, whose size is always that of a page."""
    with open("/sys/devices/system/cpu/online", "rb") as source:
        assert os.fstat(source.fileno()).st_size == PAGE
        file = OpenFile(os.dup(source.fileno()), readable=True, writable=False, waits=False)
    assert world.splicer.answer(7, file, 0, PAGE) == 0
    file.release()
    assert (world.sent(), world.told) == (b"", [])


def test_too_much(world: World) -> None:
    """As much as was promised fits the pipe, more does not."""
    most = world.splicer.capacity()
    assert most % PAGE == 0
    os.truncate(world.path, 2 * most)
    assert world.splicer.answer(7, world.file, 0, most + 1) == 0
    assert (world.sent(), world.told) == (b"", [])
