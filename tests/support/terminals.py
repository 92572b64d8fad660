"""What a program prints on a pseudo-terminal."""

from __future__ import annotations

import os
from contextlib import suppress


def read_to_end(controller: int) -> bytes:
    """Read until the terminal has no user any more (EIO, pty(7)), and close the fd."""
    text = b""
    with suppress(OSError):
        while piece := os.read(controller, 65536):
            text += piece
    os.close(controller)
    return text
