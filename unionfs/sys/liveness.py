"""Detects FUSE mounts whose daemon has died."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Container
from contextlib import suppress
from typing import Final

from unionfs.sys.fds import Owned
from unionfs.sys.mountinfo import MountEntry
from unionfs.sys.unmount import open_mount

_ANSWER_SECONDS: Final = 2.0
_REFUSALS: Final = (errno.ENOTCONN, errno.ECONNABORTED)


def is_dead(path: str) -> bool:
    """Return whether the daemon of a mount has died; False if that is not known within two seconds."""
    # Not stat(2), which the kernel answers from its cache.
    return _soon(lambda: _is_refused(path))


def is_dead_mount(mount: MountEntry, *, given_up: bool = False) -> bool:
    """Like `is_dead`, for this mount alone: False if another one covers it, or a dead one is above it.

    `given_up`: a holder without a daemon may answer all requests with EIO.
    """
    refusals = (*_REFUSALS, errno.EIO) if given_up else _REFUSALS

    def ask() -> bool:
        with suppress(OSError), Owned(open_mount(mount)) as root:
            return _is_refused(root, refusals)
        return False

    return _soon(ask)


def _is_refused(place: str | int, refusals: Container[int] = _REFUSALS) -> bool:
    try:
        os.statvfs(place)
    except OSError as error:
        return error.errno in refusals
    return False


def _soon(ask: Callable[[], bool]) -> bool:
    """Return what `ask` returns, or False after two seconds."""
    dead = False

    def note() -> None:
        nonlocal dead
        dead = ask()

    # A hanging daemon would block this thread forever.
    thread = threading.Thread(target=note, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    return dead
