"""The attributes preserved while a file's data is written back."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.union_support import OpenUnion, get, open_union
from unionfs.core.files import OpenFile
from unionfs.core.node import Node
from unionfs.fuse.direct.writeback import WriteBack
from unionfs.union.shortcuts import Capabilities, Shortcuts

__all__ = ["open_union"]

CAPABILITY, OTHER = (struct.pack("<5I", 0x02000001, bits, 0, 0, 0) for bits in (1 << 10, 1 << 13))
NAME = "security.capability"


@pytest.fixture
def file(tmp_path: Path, open_union: OpenUnion) -> Iterator[tuple[Node, int]]:
    """A node, and the fd of its backing file."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    (tmp_path / "l0").mkdir()
    (tmp_path / "upper").mkdir(exist_ok=True)
    (tmp_path / "upper/f").write_bytes(b"data")
    node = get(open_union(), "f")
    fd = os.open(tmp_path / "upper/f", os.O_RDWR)
    yield node, fd
    os.close(fd)


def _opened(fd: int) -> OpenFile:
    return OpenFile(fd, readable=True, writable=True, waits=False)


def _capability(fd: int) -> bytes | None:
    return os.getxattr(fd, NAME) if NAME in os.listxattr(fd) else None


def test_what_was_there(file: tuple[Node, int]) -> None:
    node, fd = file
    os.setxattr(fd, NAME, CAPABILITY)
    os.fchmod(fd, 0o6755)
    os.utime(fd, ns=(10**18, 10**18))
    with WriteBack(Capabilities(Shortcuts())).kept(node, _opened(fd)):
        os.pwrite(fd, b"more", 0)
        assert _capability(fd) is None  # so a write does remove it
        os.fchmod(fd, 0o755)  # as a write does without CAP_FSETID
    assert _capability(fd) == CAPABILITY
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o6755
    assert os.fstat(fd).st_mtime_ns == 10**18


@pytest.mark.parametrize("before", [None, CAPABILITY])
@pytest.mark.parametrize("told", [None, OTHER])
@pytest.mark.parametrize("written", ["before", "after"])
def test_what_is_told_while_a_thread_writes(
    file: tuple[Node, int], before: bytes | None, told: bytes | None, written: str
) -> None:
    """The set value counts, whether the thread's write removes the capabilities before or after it."""
    node, fd = file
    if before is not None:
        os.setxattr(fd, NAME, before)
    keeper = WriteBack(Capabilities(Shortcuts()))
    with keeper.kept(node, _opened(fd)), keeper.kept(node, _opened(fd)):
        if written == "before":
            os.pwrite(fd, b"more", 0)
        if told is not None:
            os.setxattr(fd, NAME, told)
        elif _capability(fd) is not None:
            os.removexattr(fd, NAME)
        keeper.capability_set(node, told)
        if written == "after":
            os.pwrite(fd, b"more", 0)
    assert _capability(fd) == told


@pytest.mark.parametrize("written", ["before", "after"])
def test_a_time_that_is_told_while_a_thread_writes(file: tuple[Node, int], written: str) -> None:
    """The kernel sends the time of modification in a SETATTR, which does not wait for the data."""
    node, fd = file
    told = 10**18 + 7
    os.utime(fd, ns=(10**18, 10**18))
    keeper = WriteBack(Capabilities(Shortcuts()))
    with keeper.kept(node, _opened(fd)), keeper.kept(node, _opened(fd)):
        if written == "before":
            os.pwrite(fd, b"more", 0)
        os.utime(fd, ns=(10**18, told))
        keeper.mtime_set(node, told)
        if written == "after":
            os.pwrite(fd, b"more", 0)
    assert os.fstat(fd).st_mtime_ns == told


def test_nothing_is_remembered(file: tuple[Node, int]) -> None:
    node, fd = file
    os.setxattr(fd, NAME, CAPABILITY)
    keeper = WriteBack(Capabilities(Shortcuts()))
    with keeper.kept(node, _opened(fd)):
        pass
    os.removexattr(fd, NAME)
    keeper.capability_set(node, OTHER)
    with keeper.kept(node, _opened(fd)):
        os.pwrite(fd, b"more", 0)
    assert _capability(fd) is None
