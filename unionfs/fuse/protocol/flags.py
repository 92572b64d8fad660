"""The numbers of the FUSE ABI: opcodes, notification codes, flags, ioctls.

Source: include/uapi/linux/fuse.h, protocol 7.45 (Linux 6.18). Names are the header's, without the FUSE_
prefix where an enumeration provides the context.

Rules:
- Numbers that are printed (opcodes, INIT flags) are enumerations; those tested by a handler for each request
  are plain integers, because `IntFlag` arithmetic costs a microsecond.
- `SINCE` maps a flag of INIT to the protocol that introduced it; `LINUX` maps that to a release.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

KERNEL_VERSION: Final = 7
KERNEL_MINOR_VERSION: Final = 45
"""The newest protocol spoken here: 7.45, Linux 6.18."""

PRUNE_MINOR: Final = 45
"""The first protocol with Notify.PRUNE."""

UNIQUE_RESEND: Final = 1 << 63
"""Set in the unique of a request that was sent before, to a daemon that is gone (7.40), and in its answer."""


class Opcode(IntEnum):
    """The kinds of requests that the kernel sends to this daemon."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    IOCTL = 39
    POLL = 40
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class Notify(IntEnum):
    """The kinds of notifications; sent in the error field of a reply."""

    INVAL_INODE = 2
    INVAL_ENTRY = 3
    STORE = 4
    RESEND = 7
    PRUNE = 9


class Init(IntFlag):
    """Flags of INIT that are wanted; bits from 32 on travel in `flags2`, and count only with INIT_EXT."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


SINCE: Final[dict[Init, int]] = {
    Init.WRITEBACK_CACHE: 23,
    Init.NO_OPEN_SUPPORT: 23,
    Init.PARALLEL_DIROPS: 25,
    Init.POSIX_ACL: 26,
    Init.ABORT_ERROR: 27,
    Init.MAX_PAGES: 28,
    Init.CACHE_SYMLINKS: 28,
    Init.NO_OPENDIR_SUPPORT: 29,
    Init.EXPLICIT_INVAL_DATA: 30,
    Init.HANDLE_KILLPRIV_V2: 33,
    Init.SETXATTR_EXT: 33,
    Init.INIT_EXT: 36,
    Init.PASSTHROUGH: 40,
    Init.HAS_RESEND: 40,
}
"""The protocol minor that introduced a flag, from the header's changelog: of wanted flags, none older."""

LINUX: Final[dict[int, str]] = {
    23: "3.15", 24: "4.5", 25: "4.7", 26: "4.9", 27: "4.18", 28: "4.20", 29: "5.1", 30: "5.2", 31: "5.2",
    32: "5.10", 33: "5.11", 34: "5.14", 35: "5.16", 36: "5.17", 37: "6.1", 38: "6.2", 39: "6.6", 40: "6.9",
    41: "6.12", 42: "6.14", 43: "6.15", 44: "6.16", 45: "6.18",
}  # fmt: skip
"""The Linux release of a protocol minor. For messages only: older kernels may have it as a backport."""

# fuse_setattr_in.valid
FATTR_MODE: Final = 1 << 0
FATTR_UID: Final = 1 << 1
FATTR_GID: Final = 1 << 2
FATTR_SIZE: Final = 1 << 3
FATTR_ATIME: Final = 1 << 4
FATTR_MTIME: Final = 1 << 5
FATTR_FH: Final = 1 << 6
FATTR_LOCKOWNER: Final = 1 << 9
FATTR_CTIME: Final = 1 << 10  # 7.23, with WRITEBACK_CACHE
FATTR_KILL_SUIDGID: Final = 1 << 11  # 7.33, with HANDLE_KILLPRIV_V2

# fuse_open_out.open_flags
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_NOFLUSH: Final = 1 << 5  # 7.35; nothing under WRITEBACK_CACHE
FOPEN_PASSTHROUGH: Final = 1 << 7  # 7.40; never with FOPEN_KEEP_CACHE (fs/fuse/iomode.c: EIO)

WRITE_CACHE: Final = 1 << 0
"""Writeback from the page cache: the file handle is a guess, the caller's ids are not the writer's."""
WRITE_KILL_SUIDGID: Final = 1 << 2  # with HANDLE_KILLPRIV_V2, 7.33
OPEN_KILL_SUIDGID: Final = 1 << 0  # 7.33
SETXATTR_ACL_KILL_SGID: Final = 1 << 0  # 7.33, with SETXATTR_EXT
FSYNC_FDATASYNC: Final = 1 << 0


# ioctls of /dev/fuse; the numbers are those of x86, arm and riscv (asm-generic/ioctl.h)
DEV_IOC_BACKING_OPEN: Final = 0x4010E501  # _IOW(229, 1, struct fuse_backing_map), 7.40
DEV_IOC_BACKING_CLOSE: Final = 0x4004E502  # _IOW(229, 2, uint32_t), 7.40


def since(flag: Init) -> str:
    """The Linux release that introduced an INIT flag, for messages; flags older than 3.15 say so."""
    minor = SINCE.get(flag)
    return f"Linux {LINUX[minor]}" if minor is not None else "Linux before 3.15"
