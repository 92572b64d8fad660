"""Ways to change a file in a worker, in two steps: opened and changed, then synced and closed."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

OLD = b"the old data " * 15
PROGRAM = b"\x7fELF" + OLD * 400
"""What hybrid takes for a program: see `tests/mount/test_programs.py`."""
NEW = b"what is new " * 30
SHORT = 50
PAGE = 4096


@dataclass(frozen=True)
class Writer:
    """A way to change a file, and its content afterwards, made of the old one."""

    flags: int
    how: str
    final: Callable[[bytes], bytes]


def _written(old: bytes) -> bytes:
    return NEW + old[len(NEW) :]


def _cut(old: bytes) -> bytes:
    return old[:SHORT]


WRITERS = {
    "O_RDWR": Writer(os.O_RDWR, "write", _written),
    "O_TRUNC": Writer(os.O_RDWR | os.O_TRUNC, "write", lambda old: NEW),
    "O_APPEND": Writer(os.O_RDWR | os.O_APPEND, "write", lambda old: old + NEW),
    "O_CREAT": Writer(os.O_RDWR | os.O_CREAT, "write", _written),
    "/proc/self/fd": Writer(os.O_RDONLY, "reopen", _written),
    "mmap": Writer(os.O_RDWR, "map", lambda old: NEW[:100] + old[100:]),
    "ftruncate": Writer(os.O_RDWR, "truncate", _cut),
    "truncate": Writer(-1, "truncate", _cut),
}

_open: list[int] = []
_mapped: list[mmap.mmap] = []


def begin(path: str, name: str, unlinked: bool) -> None:
    """In the worker: open and change the file; if ``unlinked``, its name is removed in between."""
    writer = WRITERS[name]
    if writer.flags < 0:
        os.truncate(path, SHORT)
        return
    _open.append(os.open(path, writer.flags))
    if unlinked:
        os.unlink(path)
    if writer.how == "reopen":
        _open.append(os.open(f"/proc/self/fd/{_open[-1]}", os.O_RDWR))
    fd = _open[-1]
    if writer.how == "map":
        _mapped.append(mmap.mmap(fd, 0))
        _mapped[0][:100] = NEW[:100]
    elif writer.how == "truncate":
        os.ftruncate(fd, SHORT)
    else:
        os.write(fd, NEW)


def end() -> bytes | None:
    """In the worker: sync and close the file; return its content, if it is open."""
    content = None
    try:
        for mapping in _mapped:
            mapping.flush()
            mapping.close()
        if _open:
            os.fsync(_open[-1])
            content = os.pread(_open[-1], 2 * len(PROGRAM), 0)
    finally:
        for fd in _open:
            os.close(fd)
        _open.clear()
        _mapped.clear()
    return content


def lock(path: str, call: str) -> None:
    """In the worker: take an exclusive lock through a new descriptor, or fail at once."""
    fd = os.open(path, os.O_RDWR)
    try:
        getattr(fcntl, call)(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)
