"""What this thread may do: capabilities(7), as /proc tells them."""

from __future__ import annotations

import os
from typing import Final

# linux/capability.h
CAP_SETGID: Final = 6
CAP_SETUID: Final = 7
CAP_SYS_ADMIN: Final = 21
CAP_SYS_RESOURCE: Final = 24


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
