"""New namespaces for this process; unshare(2), user_namespaces(7)."""

from __future__ import annotations

import os
from typing import Final

from unionfs.sys.calls import fail, libc

# linux/sched.h
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000


def unshare(flags: int) -> None:
    """unshare(2); ``flags`` of CLONE_*. In a new user namespace the effective ids map to themselves, so files
    inside belong to the user outside. Raises ``OSError``.
    """
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(flags) != 0:
        raise fail()
    if flags & CLONE_NEWUSER:
        maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w", encoding="ascii") as setting:
                setting.write(text)
