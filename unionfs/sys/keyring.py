"""The session keyring of a process: keyctl(2), which has no wrapper in the C library."""

from __future__ import annotations

import ctypes
import platform
from typing import Final

from unionfs.sys.calls import fail

_libc: Final = ctypes.CDLL(None, use_errno=True)

# arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h
_SYS_KEYCTL: Final = {"x86_64": 250}.get(platform.machine(), 219)
_KEYCTL_JOIN_SESSION_KEYRING: Final = 1  # include/uapi/linux/keyctl.h


def new_session_keyring() -> None:
    """Join a new, empty, anonymous session keyring, which children inherit. Raises ``OSError``.

    ENOSYS on a kernel without keyrings; EDQUOT if the user has too many keys.
    """
    if _libc.syscall(_SYS_KEYCTL, _KEYCTL_JOIN_SESSION_KEYRING, None) < 0:
        raise fail()
