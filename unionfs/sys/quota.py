"""Project quotas: size limits for directory trees, where kernel and filesystem support them (xfs, ext4).

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

from unionfs.sys.calls import syscall
from unionfs.sys.fds import Owned

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
    syscall(_SYS_QUOTACTL_FD, fd, (command << 8) | _PRJQUOTA, project, buffer)


def has_project_quota(fd: int) -> bool:
    """Return whether the filesystem of `fd` counts and enforces project quotas (quotactl_fd, Linux 5.14).

    An ext4 with the feature but mounted without `prjquota` only counts.
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
    """Return the project id that `limit_directory` assigned to a directory; 0 if none."""
    flags, _, _, project, _ = _attributes(fd)
    return project if flags & _FS_XFLAG_PROJINHERIT and project & ~_PROJECT_MASK == _PROJECTS else 0


def _new_project(fd: int) -> int:
    """Return a project id unused on the filesystem; Docker and xfs_quota use small ones."""
    status = os.fstat(fd)
    project = zlib.crc32(b"%d:%d" % (status.st_dev, status.st_ino))
    while True:
        project = _PROJECTS | project & _PROJECT_MASK
        hard, soft, space, *_ = _quota(fd, project)
        if not (hard or soft or space):
            return project
        project += 1


def _quota(fd: int, project: int) -> tuple[int, ...]:
    """Return the fields of struct if_dqblk; limits in blocks, space in bytes."""
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
    """Limit an empty directory's tree to `size` bytes. Returns False without quota support.

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
    """Change the limit set by `limit_directory`. Returns False if there is none. Raises OSError."""
    with Owned(_open(path)) as fd:
        if has_project_quota(fd) and (project := _project_of(fd)):
            _set(fd, project, size)
            return True
        return False


def space_used(path: str) -> int:
    """Return the bytes used of the limit set by `limit_directory`; 0 without one. Raises OSError."""
    with Owned(_open(path)) as fd:
        project = _project_of(fd)  # 0 is everything else on the filesystem
        return _quota(fd, project)[2] if project else 0


def unlimit_directory(path: str) -> None:
    """Remove the limit, if any."""
    try:
        opened = Owned(_open(path))
    except OSError:
        return
    with opened as fd:
        if has_project_quota(fd) and (project := _project_of(fd)):
            _set(fd, project, 0)
