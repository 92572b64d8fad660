"""Lowers in image files: squashfs, erofs, ext4 and xfs, mounted where only the daemon sees them.

The mount is detached, read-only, and ends with its last fd, so with the daemon, however that ends; so does
the loop device.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from unionfs.errors import LayerError, quoted, reason
from unionfs.sys import calls, detached, loop
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability
from unionfs.sys.fds import Owned
from unionfs.sys.images import mount_image
from unionfs.sys.openat2 import RESOLVE_NO_SYMLINKS, openat2

#: Filesystem, offset and bytes of its magic number (include/uapi/linux/magic.h; xfs_format.h).
_MAGICS: Final = (
    ("squashfs", 0, b"hsqs"),
    ("xfs", 0, b"XFSB"),
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    ("ext4", 1080, b"\x53\xef"),
)
_PROBED: Final = 1082
#: The union's own mount decides on devices and set-id programs.
_ATTRIBUTES: Final = detached.READ_ONLY | detached.ATTRIBUTES["nosuid"] | detached.ATTRIBUTES["nodev"]


def is_image(path: str) -> bool:
    """Whether a lower is an image: any regular file."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def check_image(path: str) -> None:
    """Raise LayerError for an image that cannot be mounted, as far as can be told without mounting it."""
    with Owned(_open(path)) as fd:
        _kind(fd, path)
    _refuse_without_root(path)
    _refuse_writers(path)


def open_image(path: str) -> int:
    """Mount an image. Returns an O_PATH fd of its root, which keeps it mounted. Raises LayerError."""
    with Owned(_open(path)) as fd:
        kind = _kind(fd, path)
        _refuse_without_root(path)
        _refuse_writers(path)
        try:
            return mount_image(fd, kind, read_only=True, attributes=_ATTRIBUTES)
        except OSError as error:
            raise _explained(path, kind, error) from error


def _open(path: str) -> int:
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        return openat2(calls.AT_FDCWD, os.fsencode(path), flags, RESOLVE_NO_SYMLINKS)
    except OSError as error:
        raise LayerError(
            f"lower {quoted(path)} cannot be read: {reason(error)}; check the path and the permissions."
        ) from error


def _kind(fd: int, path: str) -> str:
    if stat.S_ISREG(os.fstat(fd).st_mode):
        start = os.pread(fd, _PROBED, 0)
        for kind, offset, magic in _MAGICS:
            if start[offset : offset + len(magic)] == magic:
                return kind
    raise LayerError(
        f"lower {quoted(path)} is neither a directory nor a squashfs, erofs, ext4 or xfs image; name one of "
        "these."
    )


def _refuse_without_root(path: str) -> None:
    if not has_capability(CAP_SYS_ADMIN):
        raise LayerError(
            f"lower {quoted(path)} is an image, which only root can mount; run as root, or give a directory "
            "with its content."
        )


def _refuse_writers(path: str) -> None:
    for device in loop.devices_of(path):
        if not device.read_only:
            raise LayerError(
                f"lower {quoted(path)} is in use by {device.path}, which may change it; unmount that first."
            )


def _explained(path: str, kind: str, error: OSError) -> LayerError:
    shown = f"lower {quoted(path)} cannot be mounted as {kind}: {reason(error)}"
    if error.errno == errno.ENODEV:
        return LayerError(f"{shown}; this kernel lacks {kind}, so load the module or unpack the image.")
    if error.errno in (errno.EPERM, errno.EACCES):
        return LayerError(f"{shown}; a user namespace or container cannot, so give a directory there.")
    if error.errno == errno.EROFS:
        return LayerError(f"{shown}; mount it writable once, which replays its journal.")
    if error.errno in (errno.ENOENT, errno.ENXIO):
        return LayerError(f"{shown}; loop devices are missing here, so load the module loop.")
    return LayerError(f"{shown}; check that the image is whole.")
