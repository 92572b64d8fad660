"""Subvolumes of btrfs: ioctls on the directory that contains them. Source: include/uapi/linux/btrfs.h.

All functions raise ``OSError``.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final

from unionfs.sys.fds import directory

MAGIC: Final = 0x9123683E
"""The magic number of statfs(2)."""
FIRST_INODE: Final = 256
"""The inode number of the root of every subvolume, and of no other directory."""

# _IOW(0x94, N, struct btrfs_ioctl_vol_args): an fd and a name
_SNAP_CREATE: Final = 0x50009401
_SUBVOL_CREATE: Final = 0x5000940E
_SNAP_DESTROY: Final = 0x5000940F
_ARGUMENTS: Final = struct.Struct("=q4088s")


def create(path: str) -> None:
    """Create an empty subvolume."""
    _call(path, _SUBVOL_CREATE)


def snapshot(source: str, path: str) -> None:
    """Create a writable snapshot of the subvolume ``source``."""
    with directory(source) as fd:
        _call(path, _SNAP_CREATE, fd)


def destroy(path: str) -> None:
    """Remove a subvolume with everything in it; ENOTEMPTY if it contains another one."""
    _call(path, _SNAP_DESTROY)


def _call(path: str, number: int, fd: int = 0) -> None:
    above, name = os.path.split(path)
    with directory(above) as at:
        # A bytearray: fcntl copies immutable arguments of at most 1024 bytes.
        fcntl.ioctl(at, number, bytearray(_ARGUMENTS.pack(fd, os.fsencode(name))))
