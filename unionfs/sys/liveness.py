"""Whether the daemon behind a FUSE mount still answers."""

from __future__ import annotations

import errno
import os
import threading
from typing import Final

_ANSWER_SECONDS: Final = 2.0


def is_dead(path: str) -> bool:
    """Whether the daemon behind a mount has died; False when that cannot be known within two seconds."""
    dead = False

    def ask() -> None:
        nonlocal dead
        try:
            # Not stat(2), which the kernel answers from its cache.
            os.statvfs(path)
        except OSError as error:
            dead = error.errno in (errno.ENOTCONN, errno.ECONNABORTED)

    # A daemon that hangs would keep us waiting for ever.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    return dead
