"""The holders of flock(2) locks on a file, from /proc/locks (proc_locks(5))."""

from __future__ import annotations

import os
import stat


def may_be_a_mounts(fd: int) -> bool:
    """Return whether the lock on the directory ``fd`` may belong to a mount of a user who may write there.

    True if unknown, as for a process in another pid namespace. A mount's daemon takes the lock itself and
    holds it while it lives.
    """
    status = os.fstat(fd)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return True
    found = holders(status)
    return not found or any(_uid(pid) in (0, os.geteuid(), status.st_uid) for pid in found)


def holders(status: os.stat_result) -> list[int]:
    """Return the visible processes that hold flock(2) on the file with these attributes."""
    # /proc/locks shows the superblock's device, which on btrfs is not st_dev: compare inodes only.
    inode = f":{status.st_ino}"
    found = []
    with open("/proc/locks", encoding="ascii") as locks:
        for line in locks:
            words = line.split()
            if len(words) > 5 and words[1] == "FLOCK" and words[5].endswith(inode):
                found.append(int(words[4]))
    return found


def _uid(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None
