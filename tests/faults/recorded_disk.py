"""A block device that records what is written to it: a FUSE filesystem with one file, for a loop device.

    python -m tests.faults.recorded_disk IMAGE TARGET LOG

shows the file IMAGE as TARGET/disk. The kernel's loop driver sends the block layer's writes as WRITE and its
flushes as FSYNC (drivers/block/loop.c); a write with FUA becomes one that a flush follows
(block/blk-flush.c). Each goes to the log before it is answered, so a write that was complete when a flush was
sent stands before it.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyfuse3
import trio

#: Offset and length of a write, whose data follows; a flush has the length 0.
_RECORD = struct.Struct("=QQ")
_DISK = pyfuse3.InodeT(pyfuse3.ROOT_INODE + 1)


class Write(NamedTuple):
    """A write; a flush has no data."""

    end: int
    """The size of the log after it."""
    offset: int
    data: bytes


def records(log: Path) -> Iterator[Write]:
    """What was written, in order."""
    with log.open("rb") as file:
        while head := file.read(_RECORD.size):
            offset, length = _RECORD.unpack(head)
            data = file.read(length)
            yield Write(file.tell(), offset, data)


class Disk(pyfuse3.Operations):  # type: ignore[misc,unused-ignore]
    """One file."""

    def __init__(self, image: str, log: str) -> None:
        super().__init__()
        self.image = os.open(image, os.O_RDWR)
        self.log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def entry(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.st_mode = 0o100600 if inode == _DISK else 0o040700
        entry.st_size = os.fstat(self.image).st_size if inode == _DISK else 0
        entry.st_blocks = entry.st_size // 512
        entry.st_nlink = 1
        entry.attr_timeout = entry.entry_timeout = 1e6
        return entry

    async def lookup(self, parent_inode, name, ctx):  # type: ignore[no-untyped-def]
        if name != b"disk":
            raise pyfuse3.FUSEError(2)
        return self.entry(_DISK)

    async def getattr(self, inode, ctx):  # type: ignore[no-untyped-def]
        return self.entry(inode)

    async def setattr(self, inode, attr, fields, fh, ctx):  # type: ignore[no-untyped-def]
        return self.entry(inode)  # its times

    async def open(self, inode, flags, ctx):  # type: ignore[no-untyped-def]
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(1), keep_cache=True)

    async def read(self, fh, off, size):  # type: ignore[no-untyped-def]
        return os.pread(self.image, size, off)

    async def write(self, fh, off, buf):  # type: ignore[no-untyped-def]
        os.pwrite(self.image, buf, off)
        os.write(self.log, _RECORD.pack(off, len(buf)) + buf)
        return len(buf)

    async def flush(self, fh):  # type: ignore[no-untyped-def]
        pass

    async def fsync(self, fh, datasync):  # type: ignore[no-untyped-def]
        os.write(self.log, _RECORD.pack(0, 0))

    async def release(self, fh):  # type: ignore[no-untyped-def]
        pass


async def main(image: str, target: str, log: str) -> None:
    options = {"fsname=recorded"}
    pyfuse3.init(Disk(image, log), target, options)
    try:
        await pyfuse3.main()
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:4])
