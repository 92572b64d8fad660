"""Locks of the store: flock(2) on files that are removed with what they guard."""

from __future__ import annotations

import fcntl
import os

from unionfs.errors import on_failure, quoted
from unionfs.sys import filelocks
from unionfs.sys.fds import Owned

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def hold(path: str, *, alone: bool) -> Owned:
    """Wait for a lock, and return it. Raises UserError."""
    lock = _take(path, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    assert lock is not None
    return lock


def try_alone(path: str) -> Owned | None:
    """Return an exclusive lock, or None while others hold it. Raises UserError."""
    return _take(path, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _take(path: str, operation: int) -> Owned | None:
    with on_failure(f"the lock {quoted(path)} cannot be taken", "check the storage root"):
        fd = filelocks.take(lambda: os.open(path, _FLAGS, 0o600), path, operation=operation)
    return None if fd is None else Owned(fd)
