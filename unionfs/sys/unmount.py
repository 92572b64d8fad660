"""Unmounts by umount2(2), checked by mount id, or by fusermount3 where umount2 is not permitted."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from unionfs.sys import fusermount
from unionfs.sys.calls import AT_FDCWD, fail, libc
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability
from unionfs.sys.fds import Owned
from unionfs.sys.mountinfo import MountEntry, mount_id_of_fd
from unionfs.sys.openat2 import RESOLVE_NO_SYMLINKS, openat2

MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8


def umount2(target: str | bytes, flags: int = 0) -> None:
    """umount2(2); ``flags`` such as MNT_DETACH."""
    if libc.umount2(os.fsencode(target), flags) != 0:
        raise fail(os.fsencode(target))


@contextmanager
def _beside(path: str, mount_id: int) -> Iterator[str]:
    """Yield a path for the mountpoint ``path`` through an fd of its parent, which nobody can redirect.

    A mountpoint cannot be renamed in its own mount namespace, only from an older copy of it. Raises
    ``OSError``: ELOOP for a symlink in the path, EINVAL if a mount other than ``mount_id`` is there.
    """
    above, name = os.path.split(path)
    flags = os.O_PATH | os.O_DIRECTORY
    with Owned(openat2(AT_FDCWD, os.fsencode(above), flags, RESOLVE_NO_SYMLINKS)) as fd:
        here = f"/proc/self/fd/{fd}/{name}"
        with Owned(os.open(here, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)) as root:
            if mount_id_of_fd(root) != mount_id:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        yield here


def open_mount(mount: MountEntry) -> int:
    """Return an O_PATH fd of the root of this mount. Raises ``OSError`` like :func:`unmount_id`."""
    with _beside(mount.mountpoint, mount.mount_id) as here:
        return os.open(here, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)


def unmount_id(path: str, mount_id: int, flags: int = 0) -> None:
    """Like :func:`umount2`, for the mount with this id, even if others may change its parent directories.

    Raises ``OSError``: ELOOP for a symlink in the path, EINVAL if a mount other than ``mount_id`` is there.
    """
    with _beside(path, mount_id) as here:
        umount2(here, flags | UMOUNT_NOFOLLOW)


def unmount(mount: MountEntry, *, lazy: bool = False) -> None:
    """Unmount this mount, by fusermount3 where umount2(2) is not permitted.

    With ``lazy``, detach the mount at once; it ends with its last user. Raises ``OSError``: EBUSY if it is
    in use, EINVAL if it is gone or another mount is there.
    """
    try:
        unmount_id(mount.mountpoint, mount.mount_id, MNT_DETACH if lazy else 0)
    except PermissionError:
        # Not for root: the helper uses the path alone, which the owner of a directory could redirect.
        if has_capability(CAP_SYS_ADMIN) or not fusermount.unmount(mount.mountpoint, lazy=lazy):
            raise
