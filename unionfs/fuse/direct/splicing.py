"""Answers large reads without copying the data through this process: file, pipe, device.

The file's pages are spliced into a pipe after the answer's header and from there into the device, which
copies them to the reader: one copy instead of two, and no buffer. Source: fs/fuse/dev.c,
fuse_dev_splice_write: one splice(2) must carry a whole answer, so its length must be correct from the start,
and all of it must fit the pipe.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from typing import Final

from unionfs.core.files import OpenFile
from unionfs.fuse.direct.device import GONE

_HEADER: Final = struct.Struct("=IiQ")  # struct fuse_out_header: len, error, unique
_SIZES: Final = (4 << 20, 2 << 20, 1 << 20)


class _Pipe:
    __slots__ = ("capacity", "reader", "writer")

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # Above the host's limit (initially 1 MiB) only with CAP_SYS_RESOURCE; pipe(7).
        for size in _SIZES:
            with contextlib.suppress(OSError):
                fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, size)
                break
        size = fcntl.fcntl(self.writer, fcntl.F_GETPIPE_SZ)
        #: Bytes of a file that fit. A pipe has one slot per page: one holds the header, one a split page.
        self.capacity = size - 2 * mmap.PAGESIZE

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class Splicer:
    """Splices large parts of files into a device. Thread-safe."""

    def __init__(self, device_fd: int, written: Callable[[int], None]) -> None:
        """``written`` is called with the id of every answered request, in the answering thread."""
        self._device = device_fd
        self._free: list[_Pipe] = []
        self._written = written

    def capacity(self) -> int:
        """The largest answer in bytes, a multiple of the page size."""
        if not self._free:
            self._free.append(_Pipe())
        return self._free[-1].capacity

    def answer(self, unique: int, file: OpenFile, offset: int, size: int) -> int:
        """Answer a READ with up to ``size`` bytes; returns their number, or 0 if it sent no answer and the
        caller must."""
        length = min(size, os.fstat(file.fd).st_size - offset)
        if length < mmap.PAGESIZE:
            return 0
        try:
            pipe = self._free.pop()
        except IndexError:
            pipe = _Pipe()
        sent = False
        try:
            sent = length <= pipe.capacity and self._send(pipe, unique, file.fd, offset, length)
        except OSError as error:
            if error.errno not in GONE:
                raise
            return length  # the caller is gone
        finally:
            if sent:
                self._free.append(pipe)
            else:
                pipe.close()  # it may contain a rest
        if not sent:
            return 0
        self._written(unique)
        return length

    def _send(self, pipe: _Pipe, unique: int, fd: int, offset: int, length: int) -> bool:
        os.write(pipe.writer, _HEADER.pack(_HEADER.size + length, 0, unique))
        end = offset + length
        while offset < end:
            try:
                count = os.splice(fd, pipe.writer, end - offset, offset)
            except OSError:  # a filesystem without support, or a pipe that is full early
                return False
            if count == 0:
                return False  # the file was truncated
            offset += count
        os.splice(pipe.reader, self._device, _HEADER.size + length)
        return True

    def close(self) -> None:
        """Close the pipes."""
        while self._free:
            self._free.pop().close()
