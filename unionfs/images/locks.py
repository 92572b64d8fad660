"""Locks of the store: flock(2) on files that are removed with what they guard."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress

from unionfs.errors import on_failure, quoted
from unionfs.sys.fds import Returned, close_quietly

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def hold(path: str, *, alone: bool) -> int:
    """Wait for a lock; return the fd that holds it. Raises UserError."""
    fd = _take(path, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    assert fd is not None
    return fd


def try_alone(path: str) -> int | None:
    """Return an fd that holds the lock alone, or None while others hold it. Raises UserError."""
    return _take(path, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _take(path: str, operation: int) -> int | None:
    with on_failure(f"the lock {quoted(path)} cannot be taken", "check the storage root"):
        while True:
            with Returned(os.open(path, _FLAGS, 0o600)) as fd:
                try:
                    fcntl.flock(fd, operation)
                except BlockingIOError:
                    close_quietly(fd)
                    return None
                # Its last holder may have removed the file meanwhile.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False)):
                        return fd
            close_quietly(fd)
