"""One mount at a time at a mountpoint: between the check that nothing is mounted there and the mount itself,
another process could come first, and its mount would be covered."""

from __future__ import annotations

import fcntl
import os

from unionfs.daemon.errors import UserError, quoted
from unionfs.sys.mountinfo import mounted_at


class Claim:
    """Held from before the mount until it is there, by flock(2) on the directory that it will cover."""

    def __init__(self, mountpoint: str) -> None:
        """Raises UserError when somebody else is mounting there, or has."""
        try:
            self._fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1  # it cannot be read, or has gone: mounting says what is wrong with it
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mount = mounted_at(mountpoint)
        except OSError:
            self.release()
            raise UserError(
                f"mountpoint {quoted(mountpoint)} is busy: another process is just mounting there; "
                "`unionfs ls` shows when it is done."
            ) from None
        if mount is not None and mount.is_fuse:
            self.release()
            raise UserError(
                f"mountpoint {quoted(mountpoint)} is busy: a {mount.fstype} mount of {quoted(mount.source)} "
                f"has just been made there; run `unionfs umount {quoted(mountpoint)}` first."
            )

    def release(self) -> None:
        """The mount is there, or will not be."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
