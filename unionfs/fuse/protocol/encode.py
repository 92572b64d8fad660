"""Answers to requests, as buffers for one writev(2).

Rules:
- Every function takes the request's `unique` first and returns a list of buffers: the whole answer, without
  copying data. One writev(2) must carry one answer; `os.writev(fd, encode.entry(...))`.
- An answer with an error is a header alone (fs/fuse/dev.c, fuse_dev_do_write: anything after it is EINVAL).
- A timeout is a pair (seconds, nanoseconds), such as `FOREVER` and `NEVER`.
- An object's attributes are passed as the 88 bytes of fuse_attr (`core.stats` packs them), an entry of CREATE
  as the 128 bytes of `entry_out`.
- FORGET and BATCH_FORGET get no answer.
- A value that does not fit its field is a bug of ours, and raises struct.error.

Source: include/uapi/linux/fuse.h 7.45; how the kernel reads answers, fs/fuse/dir.c, file.c, xattr.c,
ioctl.c of Linux 6.18. A number like 7.40 is the protocol version of a feature; without, before 7.23.
"""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple

from unionfs.fuse.protocol.structs import ATTR_SIZE, ENTRY_OUT_SIZE, LAYOUTS, OUT_HEADER_SIZE

Buffer = bytes | bytearray | memoryview
Reply = list[Buffer]
Timeout = tuple[int, int]

FOREVER: Final[Timeout] = (1 << 32, 0)
"""136 years: converted, it fits the kernel's clock on every machine (fs/fuse/dir.c, time_to_jiffies)."""
NEVER: Final[Timeout] = (0, 0)

_MAX_ERRNO: Final = 511  # fs/fuse/dev.c: an error of -512 or below is an invalid answer
_EIO: Final = 5


def _header(layout: str) -> struct.Struct:
    """The header of an answer, and a structure, as one."""
    return struct.Struct("=IiQ" + LAYOUTS[layout].format)


_EMPTY: Final = struct.Struct("=IiQ").pack
_ENTRY_OUT: Final = struct.Struct(f"=QQQQII{ATTR_SIZE}s").pack
_ENTRY: Final = struct.Struct(f"=IiQQQQQII{ATTR_SIZE}s").pack
_ENTRY_SIZE: Final = OUT_HEADER_SIZE + ENTRY_OUT_SIZE
_ATTR_OUT: Final = struct.Struct(f"=IiQQI4x{ATTR_SIZE}s").pack
_ATTR_OUT_SIZE: Final = OUT_HEADER_SIZE + LAYOUTS["fuse_attr_out"].size
_STATX_OUT: Final = _header("fuse_statx_out")
_STATX_INO: Final = LAYOUTS["fuse_statx"].names.index("ino")
_OPEN: Final = _header("fuse_open_out")
_CREATE: Final = struct.Struct(f"=IiQ{ENTRY_OUT_SIZE}s{LAYOUTS['fuse_open_out'].format}")
_SIZE: Final = _header("fuse_write_out")  # fuse_getxattr_out is the same
_STATFS: Final = _header("fuse_statfs_out")
_COPIED: Final = _header("fuse_copy_file_range_out")
_LSEEK: Final = _header("fuse_lseek_out")
_IOCTL: Final = _header("fuse_ioctl_out")
_INIT: Final = _header("fuse_init_out")


class InitReply(NamedTuple):
    """fuse_init_out. `flags` has all 64 bits. Sizes: bytes, time_gran: nanoseconds."""

    major: int
    minor: int
    max_readahead: int
    flags: int
    max_background: int
    congestion_threshold: int
    max_write: int
    time_gran: int
    max_pages: int
    max_stack_depth: int


# -- file attributes ------------------------------------------------------------------------------------


def entry_out(nodeid: int, generation: int, entry_valid: Timeout, attr_valid: Timeout, attr: bytes) -> bytes:
    """fuse_entry_out, 128 bytes, for CREATE. Each one sent counts one lookup of `nodeid`."""
    return _ENTRY_OUT(nodeid, generation, entry_valid[0], attr_valid[0], entry_valid[1], attr_valid[1], attr)


# -- answers --------------------------------------------------------------------------------------------


def error(unique: int, errno: int) -> Reply:
    """Failure with `errno` (positive). A value that the kernel would refuse becomes EIO."""
    return [_EMPTY(OUT_HEADER_SIZE, -errno if 0 < errno <= _MAX_ERRNO else -_EIO, unique)]


def ok(unique: int) -> Reply:
    """Success without data: UNLINK, RMDIR, RENAME, FLUSH, RELEASE, FSYNC, SETXATTR, ..."""
    return [_EMPTY(OUT_HEADER_SIZE, 0, unique)]


def data(unique: int, *buffers: Buffer) -> Reply:
    """READ, READLINK, READDIR, READDIRPLUS, and GETXATTR and LISTXATTR with a size. Views: flat, of bytes."""
    return [_EMPTY(OUT_HEADER_SIZE + sum(map(len, buffers)), 0, unique), *buffers]


def entry(
    unique: int, nodeid: int, generation: int, entry_valid: Timeout, attr_valid: Timeout, attr: bytes
) -> Reply:
    """LOOKUP, MKNOD, MKDIR, SYMLINK, LINK. Counts one lookup of `nodeid`."""
    return [
        _ENTRY(
            _ENTRY_SIZE, 0, unique, nodeid, generation, entry_valid[0], attr_valid[0], entry_valid[1],
            attr_valid[1], attr,
        )
    ]  # fmt: skip


def attr(unique: int, attr_valid: Timeout, attr: bytes) -> Reply:
    """GETATTR, SETATTR."""
    return [_ATTR_OUT(_ATTR_OUT_SIZE, 0, unique, attr_valid[0], attr_valid[1], attr)]


def statx(unique: int, attr_valid: Timeout, raw: Buffer, ino: int) -> Reply:
    """STATX (7.39). `raw` is a struct statx from statx(2); only its inode number is replaced.

    Its fields after `dev_minor` (mount id, alignments) have no place in fuse_statx and are dropped.
    """
    fields = list(LAYOUTS["fuse_statx"].struct.unpack_from(raw))
    fields[_STATX_INO] = ino
    return [_STATX_OUT.pack(_STATX_OUT.size, 0, unique, attr_valid[0], attr_valid[1], 0, *fields)]


def opened(unique: int, fh: int, open_flags: int, backing_id: int = 0) -> Reply:
    """OPEN, OPENDIR. `open_flags` are FOPEN_*; `backing_id` counts only with FOPEN_PASSTHROUGH (7.40)."""
    return [_OPEN.pack(_OPEN.size, 0, unique, fh, open_flags, backing_id)]


def created(unique: int, entry: bytes, fh: int, open_flags: int, backing_id: int = 0) -> Reply:
    """CREATE, TMPFILE: an entry from `entry_out`, and the fields of OPEN's answer. Counts one lookup."""
    return [_CREATE.pack(_CREATE.size, 0, unique, entry, fh, open_flags, backing_id)]


def written(unique: int, size: int) -> Reply:
    """WRITE, COPY_FILE_RANGE: bytes written (32 bits)."""
    return [_SIZE.pack(_SIZE.size, 0, unique, size)]


def copied(unique: int, size: int) -> Reply:
    """COPY_FILE_RANGE_64 (7.45): bytes copied."""
    return [_COPIED.pack(_COPIED.size, 0, unique, size)]


def xattr_size(unique: int, size: int) -> Reply:
    """GETXATTR and LISTXATTR with size 0: bytes needed."""
    return [_SIZE.pack(_SIZE.size, 0, unique, size)]


def statfs(unique: int, st: os.statvfs_result) -> Reply:
    """STATFS. Counts are in units of `f_frsize` bytes."""
    return [
        _STATFS.pack(
            _STATFS.size, 0, unique, st.f_blocks, st.f_bfree, st.f_bavail, st.f_files, st.f_ffree, st.f_bsize,
            st.f_namemax, st.f_frsize,
        )
    ]  # fmt: skip


def lseek(unique: int, offset: int) -> Reply:
    """LSEEK (7.24): where the data or hole begins."""
    return [_LSEEK.pack(_LSEEK.size, 0, unique, offset)]


def ioctl(unique: int, result: int, out: Buffer = b"") -> Reply:
    """IOCTL: the return value of ioctl(2), and its output, at most the request's `out_size` bytes."""
    return [_IOCTL.pack(_IOCTL.size + len(out), 0, unique, result, 0, 0, 0), *([out] if out else [])]


def init(unique: int, reply: InitReply) -> Reply:
    """INIT, as `negotiate` decided. All 64 bytes of fuse_init_out: known since 7.23, the oldest we serve."""
    flags = reply.flags
    return [
        _INIT.pack(
            _INIT.size, 0, unique, reply.major, reply.minor, reply.max_readahead, flags & 0xFFFFFFFF,
            reply.max_background, reply.congestion_threshold, reply.max_write, reply.time_gran,
            reply.max_pages, 0, flags >> 32, reply.max_stack_depth, 0,
        )
    ]  # fmt: skip
