"""Serializes mounts at a mountpoint: otherwise another process could mount there between the check and the
mount itself, and its mount would be covered."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from functools import partial
from typing import Final

from unionfs.daemon.runtime import RuntimeDirectory
from unionfs.errors import UserError, quoted
from unionfs.sys import filelocks
from unionfs.sys.fds import close_quietly
from unionfs.sys.mountinfo import MountEntry, mounted_at

_PREFIX: Final = "mounting-"
_SUFFIX: Final = ".lock"
_MOMENT: Final = 0.1
"""Seconds; `clear_orphans` holds a lock for far less, and a mount in progress for longer."""


class Claim:
    """A locked file in the user's runtime directory, held until the mount is complete."""

    def __init__(
        self, mountpoint: str, directory: RuntimeDirectory, *, dead: MountEntry | None = None
    ) -> None:
        """`dead` may be mounted there. Raises UserError if another process of this user is mounting there or
        has just done so.
        """
        # For start-up time: other commands only clear orphans.
        import xxhash

        self._directory = directory
        self._name = f"{_PREFIX}{xxhash.xxh3_64_hexdigest(os.fsencode(mountpoint))}{_SUFFIX}"
        self._fd = self._lock(mountpoint)
        mount = mounted_at(mountpoint)
        if mount is not None and mount.is_fuse and (dead is None or mount.mount_id != dead.mount_id):
            self.release()
            raise UserError(
                f"mountpoint {quoted(mountpoint)} is busy: a {mount.fstype} mount of {quoted(mount.source)} "
                f"has just been made there; run `unionfs umount {quoted(mountpoint)}` first."
            )

    def _lock(self, mountpoint: str) -> int:
        def open_file() -> int:
            return self._directory.open(self._name, os.O_RDWR | os.O_CREAT)

        deadline = time.monotonic() + _MOMENT
        try:
            while (fd := filelocks.take(open_file, self._name, self._directory.fd)) is None:
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"mountpoint {quoted(mountpoint)} is busy: another process is just mounting there; "
                        "`unionfs ls` shows when it is done."
                    )
                time.sleep(_MOMENT / 20)
        except OSError:
            return -1  # such as a full disk: mount anyway
        return fd

    def release(self) -> None:
        if self._fd >= 0:
            self._directory.remove(self._name)
            close_quietly(self._fd)
            self._fd = -1


def clear_orphans(directory: RuntimeDirectory) -> None:
    """Remove the claims of processes that were killed while they mounted."""
    for name in directory.names():
        if not (name.startswith(_PREFIX) and name.endswith(_SUFFIX)):
            continue
        with suppress(OSError):
            fd = filelocks.take(partial(directory.open, name, os.O_RDWR), name, directory.fd)
            if fd is not None:
                directory.remove(name)
                close_quietly(fd)
