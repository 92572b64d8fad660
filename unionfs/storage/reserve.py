"""A little space of a storage root that is kept for when its filesystem is full: SQLite needs some even to
read (the files -wal and -shm), and removing a volume, which is the cure, has to be written down."""

from __future__ import annotations

import os
from contextlib import suppress

_SIZE = 256 << 10


def _path(root: str) -> str:
    return f"{root}/locks/.reserve"


def give_up(root: str) -> bool:
    """Free the reserve; whether there was one."""
    try:
        os.unlink(_path(root))
    except OSError:
        return False
    with suppress(OSError):
        # ext4 gives blocks out again when their release has been committed, not before.
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(os.path.dirname(_path(root)), flags)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    return True


def keep(root: str) -> None:
    """Set the space aside if it is not, and there is plenty. To be called by one process at a time."""
    with suppress(OSError):
        if os.path.lexists(_path(root)):
            return
        status = os.statvfs(root)
        if status.f_frsize * status.f_bavail < 8 * _SIZE:
            return
        fd = os.open(_path(root), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, _SIZE)
        except OSError:
            os.unlink(_path(root))
        finally:
            os.close(fd)
