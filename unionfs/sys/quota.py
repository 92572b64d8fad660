"""Project quotas: a limit for all below one directory, where kernel and filesystem have them (xfs, ext4).

Sources: quotactl(2), include/uapi/linux/quota.h, include/uapi/linux/fs.h (struct fsxattr).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import zlib
from typing import Final

from unionfs.sys.calls import fail

_libc = ctypes.CDLL(None, use_errno=True)

_SYS_QUOTACTL_FD: Final = 443
_PRJQUOTA: Final = 2
_Q_GETINFO: Final = 0x800005
_Q_SETQUOTA: Final = 0x800008
_QIF_BLIMITS: Final = 1
# struct if_dqblk: 8 fields of 64 bits and one of 32, padded
_DQBLK: Final = struct.Struct("=8QI4x")
# struct fsxattr: xflags, extsize, nextents, projid, cowextsize, padding of 8
_FSXATTR: Final = struct.Struct("=5I8x")
_FS_IOC_FSGETXATTR: Final = 0x801C581F
_FS_IOC_FSSETXATTR: Final = 0x401C5820
_FS_XFLAG_PROJINHERIT: Final = 0x200
_BLOCK: Final = 1024  # QIF_DQBLKSIZE


def _quotactl(fd: int, command: int, project: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
    done = _libc.syscall(
        _SYS_QUOTACTL_FD, ctypes.c_uint(fd), ctypes.c_uint((command << 8) | _PRJQUOTA),
        ctypes.c_uint(project), buffer,
    )  # fmt: skip
    if done != 0:
        raise fail()


def has_project_quota(fd: int) -> bool:
    """Whether the filesystem that holds `fd` counts and enforces project quotas now (quotactl_fd, Linux
    5.14).
    """
    try:
        _quotactl(fd, _Q_GETINFO, 0, ctypes.create_string_buffer(64))
    except OSError:
        return False
    return True


def _project_of(status: os.stat_result) -> int:
    # Any number will do that no other directory of the filesystem has; those of Docker and xfs_quota are
    # small.
    return 0x40000000 | zlib.crc32(b"%d:%d" % (status.st_dev, status.st_ino)) & 0x3FFFFFFF


def _set(fd: int, project: int, size: int) -> None:
    blocks = -(-size // _BLOCK)
    limits = ctypes.create_string_buffer(_DQBLK.pack(blocks, blocks, 0, 0, 0, 0, 0, 0, _QIF_BLIMITS))
    _quotactl(fd, _Q_SETQUOTA, project, limits)


def limit_directory(path: str, size: int) -> bool:
    """Limit what is and will be below an empty directory to `size` bytes; False where there are no quotas.

    Another call for the same directory changes the limit. Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not has_project_quota(fd):
            return False
        project = _project_of(os.fstat(fd))
        attributes = bytearray(_FSXATTR.size)
        fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, attributes)
        flags, extsize, nextents, _, cow = _FSXATTR.unpack(attributes)
        fcntl.ioctl(
            fd, _FS_IOC_FSSETXATTR,
            _FSXATTR.pack(flags | _FS_XFLAG_PROJINHERIT, extsize, nextents, project, cow),
        )  # fmt: skip
        _set(fd, project, size)
        return True
    finally:
        os.close(fd)


def unlimit_directory(path: str) -> None:
    """Take the limit away again; nothing where there was none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if has_project_quota(fd):
            _set(fd, _project_of(os.fstat(fd)), 0)
    finally:
        os.close(fd)
