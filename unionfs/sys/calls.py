"""System calls that the ``os`` module lacks.

Every function raises ``OSError`` with the kernel's errno; nothing is retried or hidden.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys as _sys
from typing import Any, Final

libc: Final = ctypes.CDLL(None, use_errno=True)

AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
AT_SYMLINK_NOFOLLOW: Final = 0x100
_AT_EACCESS: Final = 0x200

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
RENAME_WHITEOUT: Final = 4

# FS_*_FL, include/uapi/linux/fs.h
FS_SYNC: Final = 0x8
FS_IMMUTABLE: Final = 0x10
FS_APPEND: Final = 0x20
FS_NOATIME: Final = 0x80
# The 64-bit numbers, though the argument is an int
FS_IOC_GETFLAGS: Final = 0x80086601
FS_IOC_SETFLAGS: Final = 0x40086602

# FALLOC_FL_*, include/uapi/linux/falloc.h
KEEP_SIZE: Final = 1
PUNCH_HOLE: Final = 2

_SYNC_FILE_RANGE_WRITE: Final = 2
_UTIME_OMIT: Final = (1 << 30) - 2
# _IOW(0x94, 9, int), include/uapi/linux/fs.h
_FICLONE: Final = 0x40049409

# arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h, include/uapi/linux/keyctl.h
_SYS_KEYCTL: Final = {"x86_64": 250}.get(os.uname().machine, 219)
_KEYCTL_JOIN_SESSION_KEYRING: Final = 1

# Magic numbers of statfs(2), include/uapi/linux/magic.h
OVERLAYFS_MAGIC: Final = 0x794C7630
FUSE_MAGIC: Final = 0x65735546
NFS_MAGIC: Final = 0x6969


_TIMES: Final = struct.Struct("@llll")  # struct timespec, twice
_STX_BIRTH: Final = struct.Struct("=80xqI")  # stx_btime
_STATX_BTIME: Final = 0x800
_STX_ATTRIBUTES: Final = struct.Struct("=8xQ")  # of struct statx, include/uapi/linux/stat.h
libc.renameat2.argtypes = (
    ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint,
)  # fmt: skip
libc.utimensat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int)
libc.futimens.argtypes = (ctypes.c_int, ctypes.c_char_p)
libc.fchownat.argtypes = (
    ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_int,
)  # fmt: skip
libc.syncfs.argtypes = (ctypes.c_int,)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
libc.statx.argtypes = (
    ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p,
)  # fmt: skip
libc.faccessat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int)
libc.setfsuid.argtypes = libc.setfsgid.argtypes = (ctypes.c_uint,)
libc.mount.argtypes = (
    ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p,
)  # fmt: skip
libc.syscall.restype = ctypes.c_long
libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_char_p)


def os_error(code: int) -> OSError:
    """Return the ``OSError`` for an errno."""
    return OSError(code, os.strerror(code))


def fail(what: bytes | None = None) -> OSError:
    """Return the ``OSError`` for the errno of this thread's last libc call."""
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), *([] if what is None else [what]))


def syscall(number: int, *arguments: Any, path: bytes | None = None) -> int:
    """Make a system call without a function in the C library: int as long, bytes as char *, None as NULL.

    `path` becomes the error's `filename`.
    """
    found = libc.syscall(
        ctypes.c_long(number),
        *(ctypes.c_long(value) if isinstance(value, int) else value for value in arguments),
    )
    if found < 0:
        raise fail(path)
    return int(found)


PR_SET_PDEATHSIG = 1
"""An option of `prctl`; include/uapi/linux/prctl.h."""


def prctl(option: int, *arguments: int | bytes) -> None:
    if libc.prctl(option, *(*arguments, 0, 0, 0, 0)[:4]) != 0:
        raise fail()


def new_session_keyring() -> None:
    """Join a new, empty, anonymous session keyring, which children inherit; keyctl(2).

    ENOSYS on a kernel without keyrings; EDQUOT if the user has too many keys.
    """
    syscall(_SYS_KEYCTL, _KEYCTL_JOIN_SESSION_KEYRING, None)


def mount(source: str, target: str, fstype: str, flags: int = 0, options: str = "") -> None:
    """mount(2); ``flags`` of MS_*."""
    words = (os.fsencode(source), os.fsencode(target), fstype.encode())
    if libc.mount(*words, flags, os.fsencode(options)) != 0:
        raise fail(words[1])


def renameat2(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int = 0) -> None:
    """renameat2(2); ``flags`` of RENAME_*."""
    if flags == 0:
        os.rename(old, new, src_dir_fd=old_fd, dst_dir_fd=new_fd)  # a third of the cost of ctypes
        return
    if libc.renameat2(old_fd, old, new_fd, new, flags) != 0:
        raise fail(old)


def _times(atime_ns: int | None, mtime_ns: int | None) -> bytes:
    atime = (0, _UTIME_OMIT) if atime_ns is None else divmod(atime_ns, 1_000_000_000)
    mtime = (0, _UTIME_OMIT) if mtime_ns is None else divmod(mtime_ns, 1_000_000_000)
    return _TIMES.pack(*atime, *mtime)


def futimens(fd: int, atime_ns: int | None, mtime_ns: int | None) -> None:
    """Set times in nanoseconds; ``None`` leaves a time unchanged (UTIME_OMIT)."""
    if libc.futimens(fd, _times(atime_ns, mtime_ns)) != 0:
        raise fail()


def set_times(fd: int, atime_ns: int | None, mtime_ns: int | None) -> None:
    """Like :func:`futimens`, with O_PATH too; since Linux 5.8. By a path of /proc/self/fd it takes four times
    as long."""
    if libc.utimensat(fd, b"", _times(atime_ns, mtime_ns), AT_EMPTY_PATH) != 0:
        raise fail()


def chown_fd(fd: int, uid: int, gid: int) -> None:
    """Change the owner of the object ``fd`` (O_PATH and symlinks too); -1 leaves an id unchanged."""
    if libc.fchownat(fd, b"", uid & 0xFFFFFFFF, gid & 0xFFFFFFFF, AT_EMPTY_PATH) != 0:
        raise fail()


def syncfs(fd: int) -> None:
    """syncfs(2): write the whole filesystem of ``fd`` to disk."""
    if libc.syncfs(fd) != 0:
        raise fail()


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); ``mode`` of FALLOC_FL_*, ``offset`` and ``length`` in bytes."""
    if libc.fallocate(fd, mode, offset, length) != 0:
        raise fail()


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Start writing a range of a file to disk, without waiting; sync_file_range(2)."""
    if libc.sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE) != 0:
        raise fail()


def may_access(path: str, access: int) -> bool:
    """faccessat(2) with the effective ids. Unlike os.access raises OSError if that is not known."""
    if libc.faccessat(AT_FDCWD, os.fsencode(path), access, _AT_EACCESS) == 0:
        return True
    error = fail(os.fsencode(path))
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        raise error
    return False


def statx(dir_fd: int, name: bytes, flags: int, mask: int) -> bytes:
    """Return struct statx of statx(2), 256 bytes. ``flags`` of AT_*; AT_EMPTY_PATH and b"": the fd itself."""
    buffer = ctypes.create_string_buffer(256)
    if libc.statx(dir_fd, name, flags, mask, buffer) != 0:
        raise fail(name)
    return buffer.raw


def statx_flags(dir_fd: int, name: bytes, flags: int) -> int:
    """The ``stx_attributes`` of :func:`statx`, where FS_IMMUTABLE and FS_APPEND have the bits that they have
    in a file's flags (include/uapi/linux/stat.h)."""
    return int(_STX_ATTRIBUTES.unpack_from(statx(dir_fd, name, flags, 0))[0])


def birth_ns(dir_fd: int, name: bytes, flags: int) -> int:
    """When a file was made, in nanoseconds since the epoch; 0 if its filesystem does not know."""
    seconds, nanoseconds = _STX_BIRTH.unpack_from(statx(dir_fd, name, flags, _STATX_BTIME))
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def get_flags(fd: int) -> int:
    """Return the flags of a file or directory (FS_*); ioctl FS_IOC_GETFLAGS."""
    value = bytearray(8)
    fcntl.ioctl(fd, FS_IOC_GETFLAGS, value)
    return int.from_bytes(value[:4], _sys.byteorder)


def set_flags(fd: int, flags: int) -> None:
    """Set the flags of a file or directory; ioctl FS_IOC_SETFLAGS."""
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, flags.to_bytes(8, _sys.byteorder))


def clone_file(target_fd: int, source_fd: int) -> None:
    """ioctl FICLONE: share all blocks of the source with the target (reflink)."""
    fcntl.ioctl(target_fd, _FICLONE, source_fd)


def filesystem_magic(fd: int) -> int:
    """Return ``f_type`` of statfs(2) for the filesystem of ``fd`` (O_PATH suffices)."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs takes 120 bytes on 64-bit Linux
    if libc.fstatfs(fd, buffer) != 0:
        raise fail()
    return int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], _sys.byteorder) & 0xFFFFFFFF
