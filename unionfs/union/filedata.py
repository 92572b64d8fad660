"""Copies the bytes of a regular file from one fd to another: shared, copied by the kernel, or read."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final

from unionfs.core import layercalls, marks
from unionfs.sys import calls

_CHUNK: Final = 8 * 1024 * 1024
_READ: Final = 1024 * 1024
_NO_RANGE_COPY: Final = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
_NO_HOLES: Final = (errno.EINVAL, errno.EOPNOTSUPP)
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_NEVER_CLONES: Final = (errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY)


def clone(source: int, target: int, device: int, never: set[int]) -> bool:
    """Share all blocks of the source (FICLONE); returns False if the filesystems cannot.

    ``never``: devices whose files cannot be cloned into the target's filesystem; the source's ``device`` is
    added after a failure.
    """
    if device in never:
        return False
    try:
        calls.clone_file(target, source)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        if error.errno in _NEVER_CLONES:
            never.add(device)
        return False
    return True


def copy_data(
    source: int,
    target: int,
    size: int,
    told: Callable[[int], None] = lambda position: None,
    *,
    dense: bool = False,
) -> None:
    """Copy the first ``size`` bytes, preserving holes.

    ``told`` is called between pieces, with the position that the copy has reached. ``dense``: the file has no
    holes.
    """
    if dense and size <= _CHUNK and copy_piece(source, target, size, 0) == size:
        return
    position = 0
    while position < size:
        start, end = (position, size) if dense else _next_data(source, position, size)
        while start < end:
            told(start)
            done = copy_piece(source, target, min(end - start, _CHUNK), start)
            if done == 0:
                end = start  # the source was truncated
            start += done
        position = end if end > position else size
    if not dense:
        os.ftruncate(target, size)


def copy_piece(source: int, target: int, count: int, offset: int) -> int:
    """Copy up to ``count`` bytes at ``offset`` to the same offset. Returns their number, 0 at the end."""
    if not marks.slow(source):
        try:
            done = os.copy_file_range(source, target, count, offset, offset)
            if done:
                return done
        except OSError as error:
            if error.errno not in _NO_RANGE_COPY:
                raise
    # Some filesystems copy nothing and report no error.
    data = layercalls.read(source, min(count, _READ), offset)
    written = 0
    while written < len(data):
        written += os.pwrite(target, memoryview(data)[written:], offset + written)
    return written


def _next_data(fd: int, position: int, size: int) -> tuple[int, int]:
    """Start and end of the next data from ``position``; ``(size, size)`` if only a hole is left."""
    try:
        start = layercalls.call(os.lseek, fd, position, os.SEEK_DATA)
        return start, min(layercalls.call(os.lseek, fd, start, os.SEEK_HOLE), size)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size, size
        if error.errno in _NO_HOLES:
            return position, size
        raise
