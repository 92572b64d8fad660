"""setuid and setgid, which a change by an ordinary user clears (fs/attr.c, setattr_should_drop_suidgid)."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple, Protocol

from unionfs.sys.process import supplementary_groups
from unionfs.union.attributes import SET_IDS
from unionfs.union.permissions import Permissions


class Who(Protocol):
    """A process that changes a file. Requests of the kernel are some."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def pid(self) -> int: ...


class Process(NamedTuple):
    """A process, by its ids."""

    uid: int
    gid: int
    pid: int


def is_outside(who: Who, group: int) -> bool:
    """Whether a process is neither root's nor in the group.

    A request has no supplementary groups: they come from /proc/PID/status. A process that has exited counts
    as in none.
    """
    return who.uid != 0 and group != who.gid and group not in supplementary_groups(who.pid)


def mode_after(st: os.stat_result, who: Who) -> int | None:
    """The mode of a regular file after a change by a process without CAP_FSETID; None if it is the same.

    setgid without group execute stays for members of the group (fs/attr.c, setattr_should_drop_sgid).
    """
    mode = st.st_mode
    if not mode & SET_IDS:
        return None
    kept = mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP or (mode & stat.S_ISGID and is_outside(who, st.st_gid)):
        kept &= ~stat.S_ISGID
    return stat.S_IMODE(kept) if kept != mode else None


def clear(fd: int, who: Who, permissions: Permissions | None = None) -> None:
    """Clear the bits of a regular file that a change by a process without CAP_FSETID clears.

    ``permissions``: where its mode is, if not in the file.
    """
    st = os.fstat(fd)
    mode = mode_after(st if permissions is None else permissions.show(st, fd), who)
    if mode is None:
        return
    if permissions is None:
        os.fchmod(fd, mode)
    else:
        permissions.chmod(fd, mode)
