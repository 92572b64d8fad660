"""openat2(2): opens a path that cannot leave a directory."""

from __future__ import annotations

import os
import struct
from typing import Final

from unionfs.sys.calls import syscall

_SYS_OPENAT2: Final = 437  # include/uapi/asm-generic/unistd.h

# include/uapi/linux/openat2.h
RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10
_HOW: Final = struct.Struct("=3Q")  # struct open_how: flags, mode, resolve
_TRIES: Final = 20


def openat2(dir_fd: int, path: bytes, flags: int, resolve: int) -> int:
    """Open ``path`` relative to ``dir_fd``; ``resolve`` of RESOLVE_*. Raises ``OSError``; needs Linux 5.6.

    Retries on EAGAIN (a rename raced with ``..``), as the man page recommends.
    """
    how = _HOW.pack(flags | os.O_CLOEXEC, 0, resolve)
    for left in range(_TRIES, -1, -1):
        try:
            return syscall(_SYS_OPENAT2, dir_fd, path, how, len(how), path=path)
        except BlockingIOError:
            if not left:
                raise
    raise AssertionError("unreachable")


def open_in_root(root_fd: int, path: bytes, flags: int = os.O_PATH) -> int:
    """Open ``path`` as if ``root_fd`` were ``/``: absolute symlinks and ``..`` stay within it."""
    return openat2(root_fd, path, flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
