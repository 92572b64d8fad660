"""Filesystems in files, mounted detached through a loop device that ends with the mount."""

from __future__ import annotations

import errno
from typing import Final

from unionfs.sys import detached, loop
from unionfs.sys.fds import Owned

#: So that a filesystem and a copy of it can be mounted at the same time: they have one UUID.
_OPTIONS: Final = {"xfs": (("nouuid", ""),)}


def mount_image(file_fd: int, fstype: str, *, read_only: bool, attributes: int = 0) -> int:
    """Mount the filesystem in a file (an fd open for what is needed). Returns an O_PATH fd of its root.

    A filesystem that is to be written and is mounted already is mounted once more, not twice side by side.
    From Linux 6.12 the kernel reads erofs from the file itself (fs/erofs/super.c, erofs_fc_get_tree). Raises
    OSError.
    """
    options = [*_OPTIONS.get(fstype, ()), *([("ro", "")] if read_only else [])]
    if fstype == "erofs":
        source = f"/proc/self/fd/{file_fd}"
        try:
            return detached.new_filesystem(fstype, [("source", source), *options], attributes)
        except OSError as error:
            if error.errno != errno.ENOTBLK:
                raise
    shared = None if read_only else loop.attached(file_fd)
    device, source = shared or loop.attach(file_fd, read_only=read_only)
    with Owned(device):
        return detached.new_filesystem(fstype, [("source", source), *options], attributes)
