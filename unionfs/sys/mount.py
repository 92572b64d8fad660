"""The mount API by file descriptors: private clones of directory trees, and unmounting."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from unionfs.sys.calls import AT_EMPTY_PATH, AT_FDCWD, fail
from unionfs.sys.mountinfo import mount_id_of_fd
from unionfs.sys.openat2 import RESOLVE_NO_SYMLINKS, openat2

_libc = ctypes.CDLL(None, use_errno=True)

# Numbers common to all architectures: include/uapi/asm-generic/unistd.h
_SYS_OPEN_TREE: Final = 428
_SYS_MOUNT_SETATTR: Final = 442

_OPEN_TREE_CLONE: Final = 1
_OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
_MOUNT_ATTR_RDONLY: Final = 0x1

MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8


class _MountAttr(ctypes.Structure):
    """struct mount_attr, include/uapi/linux/mount.h."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def clone_tree(path: str | bytes, *, readonly: bool) -> int:
    """A detached bind mount of the directory ``path`` (not of mounts below it); returns an O_PATH fd.

    The mount is in no namespace and lives as long as an fd refers to it. open_tree(2) with
    OPEN_TREE_CLONE needs Linux 5.2, mount_setattr(2) 5.12, both CAP_SYS_ADMIN.
    """
    fd = _libc.syscall(
        _SYS_OPEN_TREE, AT_FDCWD, ctypes.c_char_p(os.fsencode(path)), _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC
    )
    if fd < 0:
        raise fail(os.fsencode(path))
    if readonly:
        attr = _MountAttr(attr_set=_MOUNT_ATTR_RDONLY)
        done = _libc.syscall(
            _SYS_MOUNT_SETATTR, fd, ctypes.c_char_p(b""), AT_EMPTY_PATH,
            ctypes.byref(attr), ctypes.c_size_t(ctypes.sizeof(attr)),
        )  # fmt: skip
        if done != 0:
            error = fail(os.fsencode(path))
            os.close(fd)
            raise error
    return int(fd)


def umount2(target: str | bytes, flags: int = 0) -> None:
    """umount2(2); ``flags`` such as MNT_DETACH."""
    if _libc.umount2(ctypes.c_char_p(os.fsencode(target)), flags) != 0:
        raise fail(os.fsencode(target))


@contextmanager
def _beside(path: str, mount_id: int) -> Iterator[str]:
    """A path for the mountpoint ``path`` by an fd of the directory above it, which nobody can lead elsewhere.

    A mountpoint cannot be renamed in its own mount namespace, only from one that was copied before. Raises
    ``OSError``: ELOOP for a symlink on the way, EINVAL when another mount than ``mount_id`` is there.
    """
    above, name = os.path.split(path)
    fd = openat2(AT_FDCWD, os.fsencode(above), os.O_PATH | os.O_DIRECTORY, RESOLVE_NO_SYMLINKS)
    try:
        here = f"/proc/self/fd/{fd}/{name}"
        root = os.open(here, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if mount_id_of_fd(root) != mount_id:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        finally:
            os.close(root)
        yield here
    finally:
        os.close(fd)


def open_mount(path: str, mount_id: int) -> int:
    """An O_PATH fd of the root of the mount with this id. Raises ``OSError`` as :func:`unmount_id`."""
    with _beside(path, mount_id) as here:
        return os.open(here, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)


def unmount_id(path: str, mount_id: int, flags: int = 0) -> None:
    """As :func:`umount2`, of the mount with this id, whoever may change the directories above ``path``.

    Raises ``OSError``: ELOOP for a symlink on the way, EINVAL when another mount than ``mount_id`` is there.
    """
    with _beside(path, mount_id) as here:
        umount2(here, flags | UMOUNT_NOFOLLOW)
