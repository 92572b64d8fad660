"""Uuids of filesystems; with a file handle they name an object for good. And objects opened by handles."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import Final

from unionfs.sys.calls import fail, libc
from unionfs.sys.fds import Owned, open_for_listing
from unionfs.sys.kernel import kernel_version

# include/uapi/linux/fs.h, since Linux 6.9: FS_IOC_GETFSUUID, _IOR(0x15, 0, struct fsuuid2)
_GETFSUUID: Final = 0x80111500
# include/uapi/linux/btrfs.h: BTRFS_IOC_FS_INFO, struct btrfs_ioctl_fs_info_args with fsid at 16. A btrfs sets
# its superblock's uuid without the length that FS_IOC_GETFSUUID checks.
_BTRFS_INFO: Final = 0x8400941F
_BTRFS_INFO_SIZE: Final = 1024
_BTRFS_FSID: Final = slice(16, 32)
_UUID: Final = 16
_NO_UUID: Final = bytes(_UUID)


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


def filesystem_identity(dir_fd: int) -> str:
    """What tells a directory's filesystem, or subvolume, from others, also after it was mounted again.

    Raises OSError.
    """
    with Owned(open_for_listing(dir_fd)) as fd:
        value = _ioctl(fd, _GETFSUUID, 1 + _UUID)
        if value is not None and any(value[1:]):
            return value[1:].hex()
        # Of a btrfs made of uuid and subvolume (fs/btrfs/super.c, btrfs_statfs).
        return f"{os.fstatvfs(fd).f_fsid:x}"


def open_handle(dir_fd: int, kind: int, handle: bytes) -> int:
    """An O_PATH fd of the object with that file handle, on a directory's filesystem; open_by_handle_at(2).

    Raises OSError: ESTALE if there is none, EPERM without CAP_DAC_READ_SEARCH.
    """
    given = struct.pack("=Ii", len(handle), kind) + handle  # struct file_handle
    with Owned(open_for_listing(dir_fd)) as fd:  # O_PATH does not do
        found = int(libc.open_by_handle_at(fd, ctypes.c_char_p(given), os.O_PATH | os.O_CLOEXEC))
    if found < 0:
        raise fail()
    return found


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
    return kernel_version() >= (6, 9)
