"""The capabilities of this thread (capabilities(7)), and dropping them for good."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from unionfs.sys.calls import fail, libc, prctl

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

CAP_CHOWN: Final = NUMBERS["CHOWN"]
CAP_DAC_OVERRIDE: Final = NUMBERS["DAC_OVERRIDE"]
CAP_SETGID: Final = NUMBERS["SETGID"]
CAP_SETUID: Final = NUMBERS["SETUID"]
CAP_SYS_ADMIN: Final = NUMBERS["SYS_ADMIN"]
CAP_SYS_RESOURCE: Final = NUMBERS["SYS_RESOURCE"]

# include/uapi/linux/prctl.h
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_RAISE: Final = 2
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
    """Return this thread's capability sets, for `set_capabilities`. Raises ``OSError``."""
    data = (_Data * 2)()
    if libc.capget(ctypes.byref(_HEADER), data) != 0:
        raise fail()
    return data


def set_capabilities(data: ctypes.Array[_Data]) -> bool:
    """Call capset(2) for this thread. Returns whether it succeeded."""
    return bool(libc.capset(ctypes.byref(_HEADER), data) == 0)


def drop_from_bounding_set(numbers: Iterable[int]) -> None:
    """Reduce what execve(2) can grant, as far as possible: not without CAP_SETPCAP (EPERM)."""
    with suppress(OSError):  # EINVAL: past the kernel's last capability
        for number in sorted(numbers):
            prctl(_PR_CAPBSET_DROP, number)


def keep_capabilities(numbers: Iterable[int]) -> None:
    """Drop all other capabilities of this thread and its children for good. Raises ``OSError``.

    A program executed by uid 0 gains the bounding set, so they are dropped from it too; without CAP_SETPCAP
    that is not possible, and child processes may have more.
    """
    kept = set(numbers)
    drop_from_bounding_set(set(range(64)) - kept)
    with suppress(OSError):
        prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    data = capability_sets()
    for half in range(2):
        bits = sum(1 << (number - 32 * half) for number in kept if number // 32 == half)
        data[half].permitted &= bits
        data[half].effective &= bits
        data[half].inheritable = 0
    if not set_capabilities(data):
        raise fail()


def have_only(numbers: Iterable[int]) -> None:
    """Reduce all capability sets of this thread, also the bounding set, to these; raise ambient ones.

    So a program that it executes has them, whatever its uid. Raises ``OSError``.
    """
    kept = set(numbers)
    drop_from_bounding_set(set(range(64)) - kept)
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    data = capability_sets()
    for half in range(2):
        bits = sum(1 << (number - 32 * half) for number in kept if number // 32 == half)
        data[half].permitted &= bits
        data[half].effective = data[half].inheritable = data[half].permitted
    if not set_capabilities(data):
        raise fail()
    for number in kept:
        if data[number // 32].permitted >> number % 32 & 1:
            prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number)


def no_new_privileges() -> None:
    """Set no_new_privs (prctl(2)) on this thread: execve(2) grants no privileges. Raises ``OSError``."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def has_capability(number: int) -> bool:
    """Return whether capability `number` (CAP_*) is effective for this thread in its user namespace."""
    return bool(capability_sets()[number // 32].effective >> number % 32 & 1)


def in_initial_user_namespace() -> bool:
    """Return whether uid_map maps every uid to itself, as only the initial user namespace does."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as uid_map:
            return uid_map.read().split() == ["0", "0", "4294967295"]
    except OSError:
        return True


def is_host_root() -> bool:
    """Return whether this process is root of the host, not of a user namespace."""
    return os.geteuid() == 0 and in_initial_user_namespace()


def uid_outside(uid: int) -> int:
    """Map ``uid`` of this user namespace to the parent namespace; user_namespaces(7).

    Returns ``uid`` itself in the initial namespace or if unmapped.
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
    """Return whether `trusted.*` xattrs are writable: initial user namespace, CAP_SYS_ADMIN; xattr(7)."""
    return has_capability(CAP_SYS_ADMIN) and in_initial_user_namespace()
