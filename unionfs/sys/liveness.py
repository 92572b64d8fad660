"""Detects FUSE mounts whose daemon has died."""

from __future__ import annotations

import errno
import os
import threading
from typing import Final

_ANSWER_SECONDS: Final = 2.0


def is_dead(path: str) -> bool:
    """Return whether the daemon of a mount has died; False if that is not known within two seconds."""
    dead = False

    def ask() -> None:
        nonlocal dead
        try:
            # Not stat(2), which the kernel answers from its cache.
            os.statvfs(path)
        except OSError as error:
            dead = error.errno in (errno.ENOTCONN, errno.ECONNABORTED)

    # A hanging daemon would block this thread forever.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    return dead
