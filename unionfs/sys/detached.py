"""Mounts that are created detached, configured, and optionally attached at a directory fd.

Needs Linux 5.2 (fsopen, open_tree, move_mount), 5.12 (mount_setattr) and CAP_SYS_ADMIN in the mount
namespace. A detached mount is in no mount table and lives as long as an fd refers to it. All functions raise
``OSError`` with the kernel's errno. Source: include/uapi/linux/mount.h.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from unionfs.sys.calls import AT_EMPTY_PATH, AT_FDCWD, fail

_libc = ctypes.CDLL(None, use_errno=True)

# include/uapi/asm-generic/unistd.h
_SYS_OPEN_TREE: Final = 428
_SYS_MOVE_MOUNT: Final = 429
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
_SYS_MOUNT_SETATTR: Final = 442

_OPEN_TREE_CLONE: Final = 1
_AT_RECURSIVE: Final = 0x8000
_FSOPEN_CLOEXEC: Final = 1
_FSMOUNT_CLOEXEC: Final = 1
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
_MOVE_MOUNT_SET_GROUP: Final = 0x100

READ_ONLY: Final = 0x1
ATTRIBUTES: Final = {
    "ro": READ_ONLY, "nosuid": 0x2, "nodev": 0x4, "noexec": 0x8, "relatime": 0x0, "noatime": 0x10,
    "strictatime": 0x20, "nodiratime": 0x80, "nosymfollow": 0x200000,
}  # fmt: skip
"""MOUNT_ATTR_*, by mount(8)'s names."""
ATIME: Final = 0x70 | 0x80
"""All attributes about access times: MOUNT_ATTR__ATIME, MOUNT_ATTR_NODIRATIME."""
PROPAGATION: Final = {"private": 1 << 18, "slave": 1 << 19, "shared": 1 << 20}
"""MS_PRIVATE and so on, for mount_setattr(2)."""


class _MountAttr(ctypes.Structure):
    """struct mount_attr."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def clone(source: int | str | bytes, *, recursive: bool = False, read_only: bool = False) -> int:
    """Make a detached bind mount of a file or directory (O_PATH fd or path). Returns an O_PATH fd of it.

    ``recursive`` includes the mounts below; ``read_only`` does not affect those.
    """
    dir_fd, path, flags = AT_FDCWD, b"", _OPEN_TREE_CLONE | os.O_CLOEXEC
    if isinstance(source, int):
        dir_fd, flags = source, flags | AT_EMPTY_PATH
    else:
        path = os.fsencode(source)
    if recursive:
        flags |= _AT_RECURSIVE
    fd = _libc.syscall(_SYS_OPEN_TREE, dir_fd, ctypes.c_char_p(path), flags)
    if fd < 0:
        raise fail(path or None)
    if read_only:
        try:
            change(fd, add=READ_ONLY)
        except BaseException:
            os.close(fd)
            raise
    return int(fd)


def change(
    fd: int, *, add: int = 0, clear: int = 0, propagation: int = 0, recursive: bool = False
) -> None:
    """Clear and add attributes of the mount with root ``fd``, and set its propagation (0: unchanged)."""
    attr = _MountAttr(attr_set=add, attr_clr=clear, propagation=propagation)
    flags = AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    done = _libc.syscall(
        _SYS_MOUNT_SETATTR, fd, ctypes.c_char_p(b""), flags,
        ctypes.byref(attr), ctypes.c_size_t(ctypes.sizeof(attr)),
    )  # fmt: skip
    if done != 0:
        raise fail()


def attach(mount_fd: int, target_fd: int) -> None:
    """Attach a detached mount at the file or directory ``target_fd`` (O_PATH)."""
    done = _libc.syscall(
        _SYS_MOVE_MOUNT, mount_fd, ctypes.c_char_p(b""), target_fd, ctypes.c_char_p(b""),
        _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH,
    )  # fmt: skip
    if done != 0:
        raise fail()


def join_group(mount_fd: int, other_fd: int) -> None:
    """Join the private mount ``mount_fd`` to the peer group and master of ``other_fd`` (Linux 5.15).

    Both must be of one filesystem, and the root of ``mount_fd`` within that of ``other_fd`` (fs/namespace.c,
    do_set_group).
    """
    done = _libc.syscall(
        _SYS_MOVE_MOUNT, other_fd, ctypes.c_char_p(b""), mount_fd, ctypes.c_char_p(b""),
        _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH | _MOVE_MOUNT_SET_GROUP,
    )  # fmt: skip
    if done != 0:
        raise fail()


def new_filesystem(fstype: str, parameters: Iterable[tuple[str, str]], attributes: int = 0) -> int:
    """Create a filesystem without a device, not mounted. Returns an O_PATH fd of its root.

    ``parameters``: filesystem options; an empty value means a flag. The error text includes the kernel's
    message, which names a rejected option.
    """
    context = _libc.syscall(_SYS_FSOPEN, ctypes.c_char_p(fstype.encode()), _FSOPEN_CLOEXEC)
    if context < 0:
        raise fail()
    try:
        for name, value in parameters:
            _configure(context, name, value)
        if _libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0) != 0:
            raise _explained(context)
        fd = _libc.syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)
        if fd < 0:
            raise _explained(context)
        return int(fd)
    finally:
        os.close(context)


def _configure(context: int, name: str, value: str) -> None:
    if value:
        done = _libc.syscall(
            _SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, ctypes.c_char_p(name.encode()),
            ctypes.c_char_p(os.fsencode(value)), 0,
        )  # fmt: skip
    else:
        done = _libc.syscall(
            _SYS_FSCONFIG, context, _FSCONFIG_SET_FLAG, ctypes.c_char_p(name.encode()), None, 0
        )
    if done != 0:
        raise _explained(context)


def _explained(context: int) -> OSError:
    """Return the error of the last call with the messages from the filesystem context's log."""
    error = fail()
    lines = []
    with suppress(OSError):
        while message := os.read(context, 4096):
            # "e " is an error, "w " a warning, "i " information (fsopen's message log)
            lines.append(os.fsdecode(message).strip().partition(" ")[2])
    if lines:
        return OSError(error.errno, f"{error.strerror} ({'; '.join(lines)})")
    return error
