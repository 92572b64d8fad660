"""Project quotas: a limit for all below one directory, where kernel and filesystem have them (xfs, ext4).

Sources: quotactl(2), include/uapi/linux/quota.h, include/uapi/linux/fs.h (struct fsxattr).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import zlib
from typing import Final

from unionfs.sys.calls import fail
from unionfs.sys.fds import Owned

_libc = ctypes.CDLL(None, use_errno=True)

_SYS_QUOTACTL_FD: Final = 443
_PRJQUOTA: Final = 2
_Q_GETQUOTA: Final = 0x800007
_Q_SETQUOTA: Final = 0x800008
# include/uapi/linux/dqblk_xfs.h: Q_XGETQSTAT, and of struct fs_quota_stat the flags, FS_QUOTA_PDQ_ENFD
_Q_XGETQSTAT: Final = 0x5805
_STATE_FLAGS: Final = struct.Struct("=2xH")
_PROJECT_ENFORCED: Final = 0x20
_QIF_BLIMITS: Final = 1
# struct if_dqblk: 8 fields of 64 bits and one of 32, padded
_DQBLK: Final = struct.Struct("=8QI4x")
# struct fsxattr: xflags, extsize, nextents, projid, cowextsize, padding of 8
_FSXATTR: Final = struct.Struct("=5I8x")
_FS_IOC_FSGETXATTR: Final = 0x801C581F
_FS_IOC_FSSETXATTR: Final = 0x401C5820
_FS_XFLAG_PROJINHERIT: Final = 0x200
_BLOCK: Final = 1024  # QIF_DQBLKSIZE
_PROJECTS: Final = 0x40000000
_PROJECT_MASK: Final = 0x3FFFFFFF


def _quotactl(fd: int, command: int, project: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
    done = _libc.syscall(
        _SYS_QUOTACTL_FD, ctypes.c_uint(fd), ctypes.c_uint((command << 8) | _PRJQUOTA),
        ctypes.c_uint(project), buffer,
    )  # fmt: skip
    if done != 0:
        raise fail()


def has_project_quota(fd: int) -> bool:
    """Whether the filesystem that holds `fd` counts and enforces project quotas now (quotactl_fd, Linux
    5.14). An ext4 with the feature that is mounted without `prjquota` only counts.
    """
    state = ctypes.create_string_buffer(256)
    try:
        _quotactl(fd, _Q_XGETQSTAT, 0, state)
    except OSError:
        return False
    return bool(_STATE_FLAGS.unpack_from(state)[0] & _PROJECT_ENFORCED)


def _attributes(fd: int) -> tuple[int, int, int, int, int]:
    attributes = bytearray(_FSXATTR.size)
    fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, attributes)
    flags, extsize, nextents, project, cow = _FSXATTR.unpack(attributes)
    return flags, extsize, nextents, project, cow


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _project_of(fd: int) -> int:
    """The project of a directory that `limit_directory` made one; 0 for another."""
    flags, _, _, project, _ = _attributes(fd)
    return project if flags & _FS_XFLAG_PROJINHERIT and project & ~_PROJECT_MASK == _PROJECTS else 0


def _new_project(fd: int) -> int:
    """A number that nothing on the filesystem has; those of Docker and xfs_quota are small."""
    status = os.fstat(fd)
    project = zlib.crc32(b"%d:%d" % (status.st_dev, status.st_ino))
    while True:
        project = _PROJECTS | project & _PROJECT_MASK
        hard, soft, space, *_ = _quota(fd, project)
        if not (hard or soft or space):
            return project
        project += 1


def _quota(fd: int, project: int) -> tuple[int, ...]:
    """The fields of struct if_dqblk; limits in blocks, space in bytes."""
    found = ctypes.create_string_buffer(_DQBLK.size)
    try:
        _quotactl(fd, _Q_GETQUOTA, project, found)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESRCH, errno.ENOSYS):  # none, or quotas are off
            raise
    return _DQBLK.unpack(found)


def _set(fd: int, project: int, size: int) -> None:
    blocks = -(-size // _BLOCK)
    limits = ctypes.create_string_buffer(_DQBLK.pack(blocks, blocks, 0, 0, 0, 0, 0, 0, _QIF_BLIMITS))
    _quotactl(fd, _Q_SETQUOTA, project, limits)


def limit_directory(path: str, size: int) -> bool:
    """Limit what will be below an empty directory to `size` bytes; False where there are no quotas.

    Raises OSError.
    """
    with Owned(_open(path)) as fd:
        if not has_project_quota(fd):
            return False
        project = _new_project(fd)
        flags, extsize, nextents, _, cow = _attributes(fd)
        fcntl.ioctl(
            fd, _FS_IOC_FSSETXATTR,
            _FSXATTR.pack(flags | _FS_XFLAG_PROJINHERIT, extsize, nextents, project, cow),
        )  # fmt: skip
        _set(fd, project, size)
        return True


def change_limit(path: str, size: int) -> bool:
    """Change what `limit_directory` has set; False where there is nothing to change. Raises OSError."""
    with Owned(_open(path)) as fd:
        project = _project_of(fd) if has_project_quota(fd) else 0
        if project:
            _set(fd, project, size)
        return bool(project)


def space_used(path: str) -> int:
    """How many bytes count for the limit that `limit_directory` has set; 0 without one. Raises OSError."""
    with Owned(_open(path)) as fd:
        project = _project_of(fd)  # 0 is everything else on the filesystem
        return _quota(fd, project)[2] if project else 0


def unlimit_directory(path: str) -> None:
    """Take the limit away again; nothing where there was none."""
    try:
        fd = _open(path)
    except OSError:
        return
    try:
        project = _project_of(fd) if has_project_quota(fd) else 0
        if project:
            _set(fd, project, 0)
    finally:
        os.close(fd)
