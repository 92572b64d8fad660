"""File handles (name_to_handle_at(2)) and uuids of filesystems, which together name an object for good."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import threading
from typing import Final

from unionfs.sys.calls import AT_EMPTY_PATH, fail
from unionfs.sys.fds import Owned, open_for_listing

_libc = ctypes.CDLL(None, use_errno=True)
_libc.name_to_handle_at.argtypes = (
    ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int,
)  # fmt: skip

_MAX_HANDLE: Final = 128  # include/linux/exportfs.h: MAX_HANDLE_SZ
_HEAD: Final = struct.Struct("=Ii")  # struct file_handle: handle_bytes, handle_type
# include/uapi/linux/fs.h, since Linux 6.9: FS_IOC_GETFSUUID, _IOR(0x15, 0, struct fsuuid2)
_GETFSUUID: Final = 0x80111500
# include/uapi/linux/btrfs.h: BTRFS_IOC_FS_INFO, struct btrfs_ioctl_fs_info_args with fsid at 16. A btrfs sets
# its superblock's uuid without the length that FS_IOC_GETFSUUID checks.
_BTRFS_INFO: Final = 0x8400941F
_BTRFS_INFO_SIZE: Final = 1024
_BTRFS_FSID: Final = slice(16, 32)
_UUID: Final = 16
_NO_UUID: Final = bytes(_UUID)


class _Buffers(threading.local):
    """Those of a thread's calls, as making them takes longer than a call."""

    def __init__(self) -> None:
        self.handle = ctypes.create_string_buffer(_HEAD.size + _MAX_HANDLE)
        self.mount = ctypes.c_int()
        self.addresses = ctypes.addressof(self.handle), ctypes.addressof(self.mount)


_buffers: Final = _Buffers()


def handle_at(dir_fd: int, name: bytes = b"") -> tuple[int, bytes]:
    """The type and the bytes of an object's file handle; without ``name`` of ``dir_fd`` itself (O_PATH too).

    Does not follow a symlink. Raises OSError, EOPNOTSUPP if the filesystem has none.
    """
    handle = _buffers.handle
    _HEAD.pack_into(handle, 0, _MAX_HANDLE, 0)
    if _libc.name_to_handle_at(dir_fd, name, *_buffers.addresses, 0 if name else AT_EMPTY_PATH) != 0:
        raise fail(name)
    length, kind = _HEAD.unpack_from(handle)
    return kind, ctypes.string_at(_buffers.addresses[0] + _HEAD.size, length)


def filesystem_uuid(dir_fd: int) -> bytes | None:
    """The uuid of a directory's filesystem, as the kernel has it: 16 bytes, zeros if it has none.

    None if it cannot be read, as before Linux 6.9.
    """
    if not _reads_uuids():
        return None
    try:
        with Owned(open_for_listing(dir_fd)) as fd:
            value = _ioctl(fd, _GETFSUUID, 1 + _UUID)  # struct fsuuid2: length, bytes
            if value is not None:
                return value[1 : 1 + value[0]].ljust(_UUID, b"\0")
            info = _ioctl(fd, _BTRFS_INFO, _BTRFS_INFO_SIZE)
            return _NO_UUID if info is None else info[_BTRFS_FSID]
    except OSError:
        return None


def _ioctl(fd: int, request: int, size: int) -> bytes | None:
    """The answer to an ioctl(2), None if the filesystem does not know it."""
    value = bytearray(size)
    try:
        fcntl.ioctl(fd, request, value)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
        return None
    return bytes(value)


def _reads_uuids() -> bool:
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int("".join(filter(str.isdigit, minor[:2])) or 0)) >= (6, 9)
