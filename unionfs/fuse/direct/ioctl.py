"""The ioctls of chattr(1) and lsattr(1), for files and directories (fs/fuse/ioctl.c, fuse_fileattr_get).

The kernel has checked the caller's rights (fs/file_attr.c, fileattr_set_prepare). As in overlayfs (inode.c,
ovl_fileattr_set), immutable and append-only are kept in an xattr of the upper's object; see `union.flags`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from typing import Final, NamedTuple

from unionfs.core import layercalls
from unionfs.core.node import Node
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import Reply, encode
from unionfs.fuse.protocol import requests as rq
from unionfs.sys import calls
from unionfs.sys.calls import os_error
from unionfs.sys.fds import Owned
from unionfs.union.flags import APPEND, IMMUTABLE


class _Command(NamedTuple):
    """Both arguments begin with 32 bits of flags: an int, or struct fsxattr (include/uapi/linux/fs.h)."""

    writes: bool
    immutable: int
    append: int


_COMMANDS: Final = {
    calls.FS_IOC_GETFLAGS: _Command(False, IMMUTABLE, APPEND),
    calls.FS_IOC_SETFLAGS: _Command(True, IMMUTABLE, APPEND),
    0x801C581F: _Command(False, 0x8, 0x10),  # FS_IOC_FSGETXATTR
    0x401C5820: _Command(True, 0x8, 0x10),  # FS_IOC_FSSETXATTR
}


async def answer(operations: Operations, request: rq.Ioctl) -> Reply:
    """The answer to an IOCTL. Raises ``OSError``, ENOTTY for other commands and types."""
    command = _COMMANDS.get(request.cmd)
    node = operations.node(request.nodeid)
    if command is None or node.kind not in (stat.S_IFREG, stat.S_IFDIR):
        raise os_error(errno.ENOTTY)
    value = bytearray(request.data)
    value.extend(bytes(max(request.out_size, 32) - len(value)))
    if command.writes:
        await operations.copy_ups.ensure(node, request.uid)
        node.changes()
    with Owned(_open(operations, node)) as fd:
        result: int
        if not node.territory.has_markers:
            result = fcntl.ioctl(fd, request.cmd, value)
        elif command.writes:
            result = _set(operations, node, fd, request.cmd, value)
            operations.invalidations.of_node(node)  # for its ctime
        else:
            result, value[:] = layercalls.call(_ioctl, fd, request.cmd, bytes(value))
            others = _get(value) & ~(command.immutable | command.append)
            _put(value, others | _shown(operations, node, command))
    return encode.ioctl(request.unique, result, bytes(value[: request.out_size]))


def _ioctl(fd: int, command: int, value: bytes) -> tuple[int, bytes]:
    """The result of ioctl(2), and what it has left in its argument."""
    left = bytearray(value)
    return fcntl.ioctl(fd, command, left), bytes(left)


def _open(operations: Operations, node: Node) -> int:
    """A new fd of the object that has the node's metadata."""
    if node.is_dir:
        return operations.union.gate.open_for_listing(node.parts[0])
    with operations.union.checked_path(node) as path:
        return layercalls.call(os.open, path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def _shown(operations: Operations, node: Node, command: _Command) -> int:
    flags = operations.union.flags.of(node)
    return (command.immutable if flags & IMMUTABLE else 0) | (command.append if flags & APPEND else 0)


def _set(operations: Operations, node: Node, fd: int, number: int, value: bytearray) -> int:
    """Set the flags of an object of the upper (``fd``)."""
    command, wanted = _COMMANDS[number], _get(value)
    _put(value, wanted & ~(command.immutable | command.append))
    result: int = fcntl.ioctl(fd, number, value)
    flags = (IMMUTABLE if wanted & command.immutable else 0) | (APPEND if wanted & command.append else 0)
    if flags != operations.union.flags.of(node):
        operations.union.flags.store(fd, flags)
        node.know_flags(flags)
    return result


def _get(value: bytearray) -> int:
    return int.from_bytes(value[:4], sys.byteorder)


def _put(value: bytearray, flags: int) -> None:
    value[:4] = flags.to_bytes(4, sys.byteorder)
