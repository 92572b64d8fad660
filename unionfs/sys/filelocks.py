"""Locks on files by flock(2): taking one, and the holders, from /proc/locks (proc_locks(5))."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable
from contextlib import suppress

from unionfs.sys.fds import Returned, close_quietly


def take(
    open_file: Callable[[], int],
    name: str,
    at: int | None = None,
    operation: int = fcntl.LOCK_EX | fcntl.LOCK_NB,
) -> int | None:
    """Return a locked fd, or None while another process holds the lock. Raises OSError.

    `open_file` opens or creates the lock's file, `name` in the directory `at`. If its last holder has removed
    it meanwhile, it is opened again, so that two processes never hold two locks of one name. `operation`: of
    flock(2); without LOCK_NB it waits.
    """
    while True:
        with Returned(open_file()) as fd:
            try:
                fcntl.flock(fd, operation)
            except BlockingIOError:
                close_quietly(fd)
                return None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=at, follow_symlinks=False)):
                    return fd
        close_quietly(fd)


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
    """Return the visible processes that hold flock(2) on the file with these attributes.

    The taker may have ended, and have left the open file to another process, as the daemon of a mount that
    outlives it; so its pid in /proc/locks counts only where no process is seen to have the file open.
    """
    # /proc/locks shows the superblock's device, which on btrfs is not st_dev: compare inodes only.
    inode = f":{status.st_ino}"
    if found := _openers(inode):
        return found
    with open("/proc/locks", encoding="ascii") as locks:
        for line in locks:
            words = line.split()
            if len(words) > 5 and words[1] == "FLOCK" and words[5].endswith(inode):
                found.append(int(words[4]))
    return [pid for pid in found if os.path.exists(f"/proc/{pid}")]


def _openers(inode: str) -> list[int]:
    """Return the visible processes with an open file that holds the lock.

    In a pid namespace, /proc/locks leaves out the locks whose taker has ended, though another process has the
    file open (fs/locks.c, locks_show); fdinfo shows them (proc_pid_fdinfo(5)).
    """
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            opened = f"/proc/{pid}/fdinfo"
            if any(_shows_lock(f"{opened}/{fd}", inode) for fd in os.listdir(opened)):
                found.append(int(pid))
    return found


def _shows_lock(path: str, inode: str) -> bool:
    with suppress(OSError), open(path, encoding="ascii", errors="replace") as lines:
        words = (line.split() for line in lines if line.startswith("lock:"))
        return any("FLOCK" in line and any(word.endswith(inode) for word in line) for line in words)
    return False


def _uid(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None
