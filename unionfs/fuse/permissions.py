"""The little about permissions that the kernel leaves to the daemon."""

from __future__ import annotations

import pyfuse3


def group_set_id_goes(file_gid: int, uid: int, gid: int, pid: int) -> bool:
    """Whether a caller who is neither root nor in the file's group loses the file its setgid bit.

    Supplementary groups are not in a request; they come from /proc/PID/status. A caller that is gone by
    then counts as being in no group.
    """
    if uid == 0 or gid == file_gid:
        return False
    try:
        return file_gid not in pyfuse3.get_sup_groups(pid)
    except (OSError, RuntimeError):
        return True
