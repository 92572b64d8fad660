"""The libfuse that pyfuse3 is linked with, to ask it for its version."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def load() -> ctypes.CDLL | None:
    """libfuse 3: its file is called ``.so.4`` since 3.17, ``.so.3`` before. ``None`` where there is none."""
    for name in ("libfuse3.so.4", "libfuse3.so.3"):
        with suppress(OSError):
            return ctypes.CDLL(name)
    return None


def version(library: ctypes.CDLL) -> str:
    """Its version, such as ``3.14.0``; ``unknown`` when it does not say."""
    try:
        library.fuse_pkgversion.restype = ctypes.c_char_p
        return str(library.fuse_pkgversion().decode())
    except AttributeError:
        return "unknown"
