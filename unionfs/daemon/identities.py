"""Whether the layers of a union that is mounted anew are those of the first time.

Another user may own a directory above them, and nobody looks when a daemon mounts anew.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from unionfs.errors import UserError, on_failure, quoted
from unionfs.settings.mount import MountSettings
from unionfs.sys.calls import AT_FDCWD, FUSE_MAGIC, filesystem_magic
from unionfs.sys.fds import Owned
from unionfs.sys.openat2 import RESOLVE_NO_SYMLINKS, openat2

Layer = tuple[str, int, int]
"""A layer's path, st_dev and st_ino; 0, 0: not known."""


def identities(settings: MountSettings) -> list[Layer]:
    """The layers, and work. Call it before mounting, which may cover their paths. Raises OSError."""
    paths = (*settings.lowers, settings.upper, settings.work)
    return [_identity(path) for path in paths if path is not None]


def _identity(path: str) -> Layer:
    with Owned(openat2(AT_FDCWD, os.fsencode(path), os.O_PATH, RESOLVE_NO_SYMLINKS)) as fd:
        status = os.fstat(fd)
        # A FUSE filesystem may number its inodes anew.
        return (path, 0, 0) if filesystem_magic(fd) == FUSE_MAGIC else (path, status.st_dev, status.st_ino)


def refuse_others(layers: Sequence[Layer], mountpoint: str) -> None:
    """Raises UserError if a layer is another one by now, or a symlink is in a path."""
    for path, *known in layers:
        with on_failure(f"layer {quoted(path)} cannot be opened", "check its path"):
            found = _identity(path)[1:]
        if 0 not in (*known, *found) and found != tuple(known):
            raise UserError(f"layer {quoted(path)} was replaced meanwhile; mount again to use what is there.")
    with on_failure(f"mountpoint {quoted(mountpoint)} cannot be opened", "check its path"):
        _identity(mountpoint)
