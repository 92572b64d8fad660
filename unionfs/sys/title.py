"""The command line and the environment of this process, as ps(1) and /proc show them."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

from unionfs.sys.calls import libc, prctl

# include/uapi/linux/prctl.h
_PR_SET_NAME: Final = 15
_PR_SET_MM: Final = 35
_PR_SET_MM_MAP: Final = 14

_PLACES: Final = {
    "start_code": 26, "end_code": 27, "start_data": 45, "end_data": 46, "start_brk": 47, "start_stack": 28,
}  # fmt: skip
"""Fields of proc_pid_stat(5), by their numbers."""


class _Map(ctypes.Structure):
    """struct prctl_mm_map, include/uapi/linux/prctl.h."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in (
            "start_code", "end_code", "start_data", "end_data", "start_brk", "brk", "start_stack",
            "arg_start", "arg_end", "env_start", "env_end", "auxv",
        )),
        ("auxv_size", ctypes.c_uint32),
        ("exe_fd", ctypes.c_uint32),
    )  # fmt: skip


def set_title(arguments: Sequence[str], environment: Mapping[bytes, bytes]) -> None:
    """Show these arguments and variables. A kernel without CONFIG_CHECKPOINT_RESTORE shows the name alone."""
    with suppress(OSError):
        prctl(_PR_SET_NAME, os.fsencode(os.path.basename(arguments[0]))[:15])
    shown = b"".join(os.fsencode(word) + b"\0" for word in arguments)
    more = b"".join(name + b"=" + value + b"\0" for name, value in environment.items())
    memory = mmap.mmap(-1, len(shown) + len(more), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = shown + more
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _mapped.append(memory)  # the kernel reads it as long as the process lives
    with open("/proc/self/stat", "rb") as stat:
        fields = stat.read().rpartition(b")")[2].split()
    new = _Map(**{name: int(fields[number - 3]) for name, number in _PLACES.items()})
    new.arg_start, new.arg_end = address, address + len(shown)
    new.env_start, new.env_end = address + len(shown), address + len(shown) + len(more)
    new.exe_fd = 0xFFFFFFFF
    where, size = ctypes.byref(new), ctypes.c_ulong(ctypes.sizeof(new))
    # Last, because every allocation may move it.
    new.brk = libc.sbrk(0)
    libc.prctl(_PR_SET_MM, _PR_SET_MM_MAP, where, size, 0)


_mapped: list[mmap.mmap] = []
libc.sbrk.restype = ctypes.c_uint64
libc.sbrk.argtypes = (ctypes.c_ssize_t,)
