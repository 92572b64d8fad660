"""The namespaces of this process: new ones, and those of another process; namespaces(7)."""

from __future__ import annotations

import os
from typing import Final

from unionfs.sys.calls import fail, libc

# linux/sched.h
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
_FLAGS: Final = {
    "mnt": CLONE_NEWNS, "user": CLONE_NEWUSER, "pid": CLONE_NEWPID, "cgroup": 0x02000000,
    "uts": 0x04000000, "ipc": 0x08000000, "net": 0x40000000,
}  # fmt: skip
"""The names below /proc/PID/ns."""


def unshare(flags: int, *, own_ids: bool = True) -> None:
    """unshare(2); ``flags`` of CLONE_*. In a new user namespace the effective ids map to themselves, so files
    inside belong to the user outside; without ``own_ids`` another process maps them. Raises ``OSError``.
    """
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(flags) != 0:
        raise fail()
    if flags & CLONE_NEWUSER and own_ids:
        maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w", encoding="ascii") as setting:
                setting.write(text)


def other_namespaces(pid: int) -> int:
    """Return the flags (CLONE_*) of the namespaces that `pid` does not share with this process.

    Raises ``OSError``, also if this process may not trace `pid` (ptrace(2), PTRACE_MODE_READ_FSCREDS).
    """
    found = 0
    for name, flag in _FLAGS.items():
        try:
            same = os.path.samestat(os.stat(f"/proc/self/ns/{name}"), os.stat(f"/proc/{pid}/ns/{name}"))
        except FileNotFoundError:
            if not os.path.exists(f"/proc/{pid}"):
                raise
            continue  # a kernel without this kind
        found |= 0 if same else flag
    return found


def enter(namespace: int) -> None:
    """Enter the namespace of an fd of /proc/PID/ns; setns(2). Raises ``OSError``."""
    if libc.setns(namespace, 0) != 0:
        raise fail()


def join(pidfd: int, flags: int) -> None:
    """Join the namespaces of a process; setns(2) with a pidfd, Linux 5.8. Raises ``OSError``.

    All are joined or none. With CLONE_NEWNS, root and working directory become the root of that namespace;
    with CLONE_NEWPID, children are in that namespace; CLONE_NEWUSER gives all capabilities there, also in the
    bounding set.
    """
    if libc.setns(pidfd, flags) != 0:
        raise fail()
