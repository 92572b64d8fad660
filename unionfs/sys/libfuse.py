"""The version of the libfuse that pyfuse3 is linked with."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def load() -> ctypes.CDLL | None:
    """Load libfuse 3 (``.so.4`` since 3.17, ``.so.3`` before). Returns ``None`` if it is missing."""
    for name in ("libfuse3.so.4", "libfuse3.so.3"):
        with suppress(OSError):
            return ctypes.CDLL(name)
    return None


def version(library: ctypes.CDLL) -> str:
    """Return its version, such as ``3.14.0``, or ``unknown``."""
    try:
        library.fuse_pkgversion.restype = ctypes.c_char_p
        return str(library.fuse_pkgversion().decode())
    except AttributeError:
        return "unknown"
