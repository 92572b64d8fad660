"""Mounts that are created detached, configured, and optionally attached at a directory fd.

Needs Linux 5.2 (fsopen, open_tree, move_mount), 5.12 (mount_setattr) and CAP_SYS_ADMIN in the mount
namespace. A detached mount is in no mount table and lives as long as an fd refers to it. All functions raise
``OSError`` with the kernel's errno. Source: include/uapi/linux/mount.h.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from unionfs.sys.calls import AT_EMPTY_PATH, AT_FDCWD, syscall
from unionfs.sys.fds import Owned, Returned

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
_ATTR: Final = struct.Struct("=4Q")  # struct mount_attr: set, clear, propagation, userns_fd


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
    with Returned(syscall(_SYS_OPEN_TREE, dir_fd, path, flags, path=path or None)) as fd:
        if read_only:
            change(fd, add=READ_ONLY)
    return fd


def change(
    fd: int, *, add: int = 0, clear: int = 0, propagation: int = 0, recursive: bool = False
) -> None:
    """Clear and add attributes of the mount with root ``fd``, and set its propagation (0: unchanged)."""
    attr = _ATTR.pack(add, clear, propagation, 0)
    flags = AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    syscall(_SYS_MOUNT_SETATTR, fd, b"", flags, attr, len(attr))


def attach(mount_fd: int, target_fd: int, flags: int = 0) -> None:
    """Attach a detached mount at the file or directory ``target_fd`` (O_PATH)."""
    flags |= _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
    syscall(_SYS_MOVE_MOUNT, mount_fd, b"", target_fd, b"", flags)


def join_group(mount_fd: int, other_fd: int) -> None:
    """Join the private mount ``mount_fd`` to the peer group and master of ``other_fd`` (Linux 5.15).

    Both must be of one filesystem, and the root of ``mount_fd`` within that of ``other_fd`` (fs/namespace.c,
    do_set_group).
    """
    attach(other_fd, mount_fd, _MOVE_MOUNT_SET_GROUP)


def is_known(fstype: str) -> bool:
    """Whether the kernel has a filesystem, as a module, too; True where this process may not ask."""
    try:
        os.close(syscall(_SYS_FSOPEN, fstype.encode(), _FSOPEN_CLOEXEC))
    except OSError as error:
        return error.errno != errno.ENODEV
    return True


def new_filesystem(fstype: str, parameters: Iterable[tuple[str, str]], attributes: int = 0) -> int:
    """Create a filesystem without a device, not mounted. Returns an O_PATH fd of its root.

    ``parameters``, errors: as for `filesystem`.
    """
    with filesystem(fstype, parameters) as context:
        return syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)
    raise AssertionError("unreachable")


@contextmanager
def filesystem(fstype: str, parameters: Iterable[tuple[str, str]]) -> Iterator[int]:
    """A new filesystem that is not mounted, as the context of fsopen(2).

    ``parameters``: filesystem options; an empty value means a flag. The text of an error, also of the block,
    includes the kernel's message, which names a rejected option.
    """
    with Owned(syscall(_SYS_FSOPEN, fstype.encode(), _FSOPEN_CLOEXEC)) as context:
        try:
            for name, value in parameters:
                command = _FSCONFIG_SET_STRING if value else _FSCONFIG_SET_FLAG
                syscall(_SYS_FSCONFIG, context, command, name.encode(), os.fsencode(value) or None, 0)
            syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
            yield context
        except OSError as error:
            lines = []
            with suppress(OSError):
                while message := os.read(context, 4096):
                    # "e " is an error, "w " a warning, "i " information (fsopen's message log)
                    lines.append(os.fsdecode(message).strip().partition(" ")[2])
            if not lines:
                raise
            raise OSError(error.errno, f"{error.strerror} ({'; '.join(lines)})") from error
