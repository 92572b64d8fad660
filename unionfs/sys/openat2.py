"""openat2(2): opens a path that cannot leave a directory."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

from unionfs.sys.calls import fail

_libc = ctypes.CDLL(None, use_errno=True)

_SYS_OPENAT2: Final = 437  # include/uapi/asm-generic/unistd.h

# include/uapi/linux/openat2.h
RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10
_TRIES: Final = 20


class _OpenHow(ctypes.Structure):
    """struct open_how."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def openat2(dir_fd: int, path: bytes, flags: int, resolve: int) -> int:
    """Open ``path`` relative to ``dir_fd``; ``resolve`` of RESOLVE_*. Raises ``OSError``; needs Linux 5.6.

    Retries on EAGAIN (a rename raced with ``..``), as the man page recommends.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    for _ in range(_TRIES):
        fd = _libc.syscall(
            _SYS_OPENAT2, dir_fd, ctypes.c_char_p(path), ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )  # fmt: skip
        if fd >= 0:
            return int(fd)
        error = fail(path)
        if error.errno != errno.EAGAIN:
            raise error
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)


def open_in_root(root_fd: int, path: bytes, flags: int = os.O_PATH) -> int:
    """Open ``path`` as if ``root_fd`` were ``/``: absolute symlinks and ``..`` stay within it."""
    return openat2(root_fd, path, flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
