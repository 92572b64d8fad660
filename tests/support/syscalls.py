"""System calls that Python lacks, for tests only.

The tests have their own wrappers so that a mistake in ``unionfs.sys`` cannot hide itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from typing import NamedTuple

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2

MS_RDONLY = 1
MS_REMOUNT = 32
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000

DT_UNKNOWN = 0

# The same on all architectures (include/uapi/asm-generic/unistd.h).
_FSCONFIG, _FSPICK = 431, 433
_FSPICK_CLOEXEC = 1
_FSCONFIG_CMD_RECONFIGURE = 7

_libc = ctypes.CDLL(None, use_errno=True)
for _name in ("renameat2", "mount", "umount2", "utimensat", "prctl", "getdents64", "mkdirat", "unshare"):
    getattr(_libc, _name).restype = ctypes.c_int
_libc.syscall.restype = ctypes.c_long
_libc.getdents64.restype = ctypes.c_ssize_t


class Dirent(NamedTuple):
    """One record of getdents64(2)."""

    name: bytes
    ino: int
    type: int
    offset: int


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


def _check(result: int, *paths: str | bytes | None) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), *paths[:1])
    return result


def renameat2(
    old: str | bytes,
    new: str | bytes,
    flags: int = 0,
    *,
    old_dir_fd: int = AT_FDCWD,
    new_dir_fd: int = AT_FDCWD,
) -> None:
    """renameat2(2) with its flags (RENAME_*)."""
    result = _libc.renameat2(
        ctypes.c_int(old_dir_fd),
        ctypes.c_char_p(os.fsencode(old)),
        ctypes.c_int(new_dir_fd),
        ctypes.c_char_p(os.fsencode(new)),
        ctypes.c_uint(flags),
    )
    _check(result, old)


def utimensat(
    path: str | bytes, atime: tuple[int, int], mtime: tuple[int, int], *, follow: bool = True
) -> None:
    """utimensat(2): each time is (seconds, nanoseconds), where nanoseconds may be UTIME_NOW or UTIME_OMIT."""
    times = (_Timespec * 2)(_Timespec(*atime), _Timespec(*mtime))
    flags = 0 if follow else AT_SYMLINK_NOFOLLOW
    _check(_libc.utimensat(ctypes.c_int(AT_FDCWD), ctypes.c_char_p(os.fsencode(path)), times, flags), path)


def mount(source: str, target: str | os.PathLike[str], fstype: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    where = os.fspath(target)
    result = _libc.mount(
        ctypes.c_char_p(os.fsencode(source)),
        ctypes.c_char_p(os.fsencode(where)),
        ctypes.c_char_p(os.fsencode(fstype)),
        ctypes.c_ulong(flags),
        ctypes.c_char_p(os.fsencode(data)),
    )
    _check(result, where)


def umount(target: str | os.PathLike[str], flags: int = 0) -> None:
    """umount2(2)."""
    where = os.fspath(target)
    _check(_libc.umount2(ctypes.c_char_p(os.fsencode(where)), ctypes.c_int(flags)), where)


def drop_caches(inside: str | os.PathLike[str], *fds: int) -> None:
    """Let the kernel drop the unused nodes of the mount with this path, and the pages of these open files.

    Unlike /proc/sys/vm/drop_caches it does not disturb the mounts of other tests. Reconfiguring a superblock
    writes its data back and calls shrink_dcache_sb (fs/super.c, reconfigure_super); without parameters it
    changes nothing. Only pages are dropped on the filesystem of /.
    """
    top = os.path.realpath(inside)
    while not os.path.ismount(top):
        top = os.path.dirname(top)
    if top != "/":
        fd = _check(_libc.syscall(_FSPICK, AT_FDCWD, ctypes.c_char_p(os.fsencode(top)), _FSPICK_CLOEXEC), top)
        try:
            _check(_libc.syscall(_FSCONFIG, fd, _FSCONFIG_CMD_RECONFIGURE, None, None, 0), top)
        finally:
            os.close(fd)
    for fd in fds:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def set_dumpable() -> None:
    """Make /proc/self belong to the process again after a change of uid (prctl(2), PR_SET_DUMPABLE)."""
    _check(_libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0))


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends (prctl(2), PR_SET_PDEATHSIG)."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(ctypes.c_int(flags)))


def getdents(fd: int, size: int = 32768) -> list[Dirent]:
    """One getdents64(2) call: the records it returns; an empty list means the end."""
    buffer = ctypes.create_string_buffer(size)
    count = _check(_libc.getdents64(ctypes.c_int(fd), buffer, ctypes.c_size_t(size)))
    raw = buffer.raw[:count]
    entries = []
    at = 0
    while at < count:
        ino, offset, length, kind = struct.unpack_from("=QqHB", raw, at)
        name = raw[at + 19 : at + length]
        entries.append(Dirent(name[: name.index(0)], ino, kind, offset))
        at += length
    return entries


def list_directory(fd: int) -> list[Dirent]:
    """Every record of an open directory from its start, "." and ".." included."""
    os.lseek(fd, 0, os.SEEK_SET)
    entries: list[Dirent] = []
    while chunk := getdents(fd):
        entries += chunk
    return entries
