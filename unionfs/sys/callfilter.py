"""Filters of system calls; seccomp(2)."""

from __future__ import annotations

import ctypes
from typing import Final

from unionfs.sys.calls import fail, libc

# include/uapi/linux/prctl.h, include/uapi/linux/seccomp.h
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_INSTRUCTION_BYTES: Final = 8  # struct sock_filter, include/uapi/linux/filter.h


class _Program(ctypes.Structure):
    """struct sock_fprog, include/uapi/linux/filter.h."""

    _fields_ = (("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filter_calls(instructions: bytes) -> None:
    """Filter this thread's system calls from now on, by an array of struct sock_filter.

    Needs no_new_privs or CAP_SYS_ADMIN. Raises ``OSError``.
    """
    program = _Program(len(instructions) // _INSTRUCTION_BYTES, instructions)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        raise fail()
