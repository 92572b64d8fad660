"""One mount at a time at a mountpoint: between the check that nothing is mounted there and the mount itself,
another process could come first, and its mount would be covered."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress

import xxhash

from unionfs.daemon.runtime import RuntimeDirectory
from unionfs.errors import UserError, quoted
from unionfs.sys.mountinfo import mounted_at


class Claim:
    """Held from before the mount until it is there: a locked file among the runtime files of the user."""

    def __init__(self, mountpoint: str, directory: RuntimeDirectory) -> None:
        """Raises UserError when another process of this user is mounting there, or has just done so."""
        self._directory = directory
        self._name = f"mounting-{xxhash.xxh3_64_hexdigest(os.fsencode(mountpoint))}.lock"
        self._fd = self._lock(mountpoint)
        mount = mounted_at(mountpoint)
        if mount is not None and mount.is_fuse:
            self.release()
            raise UserError(
                f"mountpoint {quoted(mountpoint)} is busy: a {mount.fstype} mount of {quoted(mount.source)} "
                f"has just been made there; run `unionfs umount {quoted(mountpoint)}` first."
            )

    def _lock(self, mountpoint: str) -> int:
        while True:
            try:
                fd = self._directory.open(self._name, os.O_RDWR | os.O_CREAT)
            except OSError:
                return -1  # a full disk: that is no reason not to mount
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise UserError(
                    f"mountpoint {quoted(mountpoint)} is busy: another process is just mounting there; "
                    "`unionfs ls` shows when it is done."
                ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._name, dir_fd=self._directory.fd), os.fstat(fd)):
                    return fd
            os.close(fd)  # its holder has removed it in between

    def release(self) -> None:
        """The mount is there, or will not be."""
        if self._fd >= 0:
            self._directory.remove(self._name)
            os.close(self._fd)
            self._fd = -1
