"""Changes the flags of a mount and its filesystem by mount(2) with MS_REMOUNT."""

from __future__ import annotations

import ctypes
import os
from typing import Final

from unionfs.sys.calls import fail
from unionfs.sys.fds import Owned
from unionfs.sys.mountinfo import MountEntry
from unionfs.sys.unmount import open_mount

_libc = ctypes.CDLL(None, use_errno=True)

_MS_REMOUNT: Final = 32
READ_ONLY: Final = 1
FLAGS: Final = {
    "ro": READ_ONLY, "nosuid": 2, "nodev": 4, "noexec": 8, "sync": 16, "dirsync": 128, "nosymfollow": 256,
    "noatime": 1024, "nodiratime": 2048, "relatime": 1 << 21, "strictatime": 1 << 24, "lazytime": 1 << 25,
}  # fmt: skip
"""MS_*, by mount(8)'s names; include/uapi/linux/mount.h."""


def remount(mount: MountEntry, flags: int) -> None:
    """Replace all flags of a mount and its filesystem. Raises ``OSError``."""
    with Owned(open_mount(mount)) as root:
        path = b"/proc/self/fd/%d" % root
        # FUSE ignores options, as they are those of the first mount (fs/fuse/inode.c, fuse_parse_param).
        done = _libc.mount(
            None, ctypes.c_char_p(path), None, ctypes.c_ulong(_MS_REMOUNT | flags), None
        )
        if done != 0:
            raise fail(os.fsencode(mount.mountpoint))
