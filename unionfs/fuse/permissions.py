"""The little about permissions that the kernel leaves to the daemon."""

from __future__ import annotations

from unionfs.sys.process import supplementary_groups


def group_set_id_goes(file_gid: int, uid: int, gid: int, pid: int) -> bool:
    """Whether a caller who is neither root nor in the file's group loses the file its setgid bit.

    Supplementary groups are not in a request; they come from /proc/PID/status. A caller that is gone by
    then counts as being in no group.
    """
    if uid == 0 or gid == file_gid:
        return False
    return file_gid not in supplementary_groups(pid)
