"""The permission checks that the kernel leaves to the daemon."""

from __future__ import annotations

from unionfs.sys.process import supplementary_groups


def group_set_id_goes(file_gid: int, uid: int, gid: int, pid: int) -> bool:
    """Whether a change by this caller clears the file's setgid bit: neither root nor in the file's group.

    A request has no supplementary groups; they come from /proc/PID/status. A caller that has exited counts as
    being in no group.
    """
    if uid == 0 or gid == file_gid:
        return False
    return file_gid not in supplementary_groups(pid)
