"""The mount API by file descriptors: private clones of directory trees, and unmounting."""

from __future__ import annotations

import ctypes
import os
from typing import Final

from unionfs.sys.calls import AT_EMPTY_PATH, AT_FDCWD, fail

_libc = ctypes.CDLL(None, use_errno=True)

# Numbers common to all architectures: include/uapi/asm-generic/unistd.h
_SYS_OPEN_TREE: Final = 428
_SYS_MOUNT_SETATTR: Final = 442

_OPEN_TREE_CLONE: Final = 1
_OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
_MOUNT_ATTR_RDONLY: Final = 0x1

MNT_DETACH: Final = 2

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4


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


def mount(source: str, target: str | bytes, fstype: str, flags: int, data: str) -> None:
    """mount(2); ``flags`` of MS_*, ``data`` the filesystem's own options."""
    done = _libc.mount(
        ctypes.c_char_p(os.fsencode(source)), ctypes.c_char_p(os.fsencode(target)),
        ctypes.c_char_p(os.fsencode(fstype)), ctypes.c_ulong(flags), ctypes.c_char_p(os.fsencode(data)),
    )  # fmt: skip
    if done != 0:
        raise fail(os.fsencode(target))


def umount2(target: str | bytes, flags: int = 0) -> None:
    """umount2(2); ``flags`` such as MNT_DETACH."""
    if _libc.umount2(ctypes.c_char_p(os.fsencode(target)), flags) != 0:
        raise fail(os.fsencode(target))
