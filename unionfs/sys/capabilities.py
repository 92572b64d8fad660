"""What this thread may do, capabilities(7), and giving some of it up for good."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import Final

from unionfs.sys.calls import fail

_libc: Final = ctypes.CDLL(None, use_errno=True)

NAMES: Final = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip
"""The capabilities without CAP_, by their numbers (include/uapi/linux/capability.h)."""
NUMBERS: Final = {name: number for number, name in enumerate(NAMES)}

CAP_SETGID: Final = NUMBERS["SETGID"]
CAP_SETUID: Final = NUMBERS["SETUID"]
CAP_SYS_ADMIN: Final = NUMBERS["SYS_ADMIN"]
CAP_SYS_RESOURCE: Final = NUMBERS["SYS_RESOURCE"]

# include/uapi/linux/prctl.h
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4


class _Header(ctypes.Structure):
    """struct __user_cap_header_struct, include/uapi/linux/capability.h."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    """struct __user_cap_data_struct; two of them hold 64 capabilities."""

    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


_HEADER: Final = _Header(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread


def capability_sets() -> ctypes.Array[_Data]:
    """The capability sets of this thread, for `set_capabilities`. Raises ``OSError``."""
    data = (_Data * 2)()
    if _libc.capget(ctypes.byref(_HEADER), data) != 0:
        raise fail()
    return data


def set_capabilities(data: ctypes.Array[_Data]) -> bool:
    """capset(2) of this thread; whether the kernel took it."""
    return bool(_libc.capset(ctypes.byref(_HEADER), data) == 0)


def keep_capabilities(numbers: Iterable[int]) -> None:
    """Give up all other capabilities of this thread, and of what it starts, for good. Raises ``OSError``.

    A program that uid 0 executes gets what is in the bounding set, so the set loses them too; that takes
    CAP_SETPCAP, and without it what is started may have more.
    """
    kept = set(numbers)
    for number in range(64):
        if number not in kept and _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) != 0:
            break  # EINVAL: the kernel knows no higher number; EPERM: no CAP_SETPCAP
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    data = capability_sets()
    for half in range(2):
        bits = sum(1 << (number - 32 * half) for number in kept if number // 32 == half)
        data[half].permitted &= bits
        data[half].effective &= bits
        data[half].inheritable = 0
    if not set_capabilities(data):
        raise fail()


def no_new_privileges() -> None:
    """No program that this thread executes gains privileges from then on; prctl(2). Raises ``OSError``."""
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise fail()


def has_capability(number: int) -> bool:
    """Whether this thread has capability `number` (CAP_*) in effect, in its user namespace.

    Source: proc_pid_status(5), CapEff. Without /proc it is taken for granted for uid 0.
    """
    try:
        with open("/proc/thread-self/status", "rb") as status:
            for line in status:
                if line.startswith(b"CapEff:"):
                    return bool(int(line[7:], 16) >> number & 1)
    except OSError:
        pass
    return os.geteuid() == 0


def in_initial_user_namespace() -> bool:
    """Whether every uid of the host exists here as itself, as it only does outside user namespaces."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as uid_map:
            return uid_map.read().split() == ["0", "0", "4294967295"]
    except OSError:
        return True


def is_host_root() -> bool:
    """Whether this process is root of the host, not of a user namespace."""
    return os.geteuid() == 0 and in_initial_user_namespace()


def uid_outside(uid: int) -> int:
    """The uid that ``uid`` of this user namespace is in the one around it; user_namespaces(7).

    The uid itself in the initial namespace, and where it is not mapped.
    """
    try:
        with open("/proc/self/uid_map", encoding="ascii") as uid_map:
            for line in uid_map:
                inside, outside, count = map(int, line.split())
                if inside <= uid < inside + count:
                    return outside + uid - inside
    except (OSError, ValueError):
        pass
    return uid


def may_use_trusted_xattrs() -> bool:
    """Whether `trusted.*` xattrs can be written: CAP_SYS_ADMIN of the initial user namespace; xattr(7)."""
    return has_capability(CAP_SYS_ADMIN) and in_initial_user_namespace()
