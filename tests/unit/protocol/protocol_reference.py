"""The plain form of what the compiled core packs: attributes, and the entries of READDIR and READDIRPLUS.

The core must pack the same bytes. Rules of listings (fs/fuse/readdir.c, parse_dirfile and parse_dirplusfile,
Linux 6.18):
- A record is the structure, the name without a NUL, and zeros up to the next multiple of 8.
- The whole answer is at most the request's `size` bytes; a record that does not fit follows next time.
- `off` is the position *after* this entry: a cookie of the daemon, never 0, below 2**63.
- An empty name, a name with a slash, or one above 1024 bytes fails the whole listing with EIO: refused here.
- READDIRPLUS: an entry with a nodeid counts one lookup, so look it up only if it fits (`fits_plus`), and then
  add it. `NO_ENTRY` (for "." and "..", or a failed lookup) counts none.
"""

from __future__ import annotations

import os
import struct
from typing import Final

from unionfs.fuse.protocol.encode import Reply, Timeout
from unionfs.fuse.protocol.structs import ATTR_SIZE, ENTRY_OUT_SIZE, LAYOUTS

NAME_MAX: Final = 1024
"""Bytes; FUSE_NAME_MAX, supported by every kernel (newer ones may accept more)."""

_DIRENT: Final = LAYOUTS["fuse_dirent"].struct.pack
_DIRENT_SIZE: Final = LAYOUTS["fuse_dirent"].size
_DIRENTPLUS_SIZE: Final = LAYOUTS["fuse_direntplus"].size
_PLUS: Final = struct.Struct(f"={ENTRY_OUT_SIZE}s" + LAYOUTS["fuse_dirent"].format).pack
_FOUND: Final = struct.Struct("=" + LAYOUTS["fuse_direntplus"].format).pack
_PADDING: Final = tuple(bytes(-size % 8) for size in range(8))
_ATTR: Final = LAYOUTS["fuse_attr"].struct.pack
_ENTRY: Final = struct.Struct(f"=IiQQQQQII{ATTR_SIZE}s")
_NS: Final = 1_000_000_000

AttributeValues = tuple[
    int, int, int, int, int, int, int, int, int, int, int, int, int, int, int, int
]  # fmt: skip
NO_ENTRY: Final = bytes(ENTRY_OUT_SIZE)
"""fuse_entry_out with nodeid 0: in READDIRPLUS, an entry without attributes (fs/fuse/readdir.c)."""


def attributes_of(
    st: os.stat_result, ino: int, nlink: int | None = None, ctime_ns: int | None = None
) -> bytes:
    """fuse_attr from a stat, under the inode number `ino` and, if given, with another link count or ctime."""
    return _ATTR(*attribute_values(st, ino, nlink, ctime_ns))


def attribute_values(
    st: os.stat_result, ino: int, nlink: int | None = None, ctime_ns: int | None = None
) -> AttributeValues:
    """Like `attributes_of`, but returns the fields of fuse_attr in order, to pack with surrounding fields."""
    atime, mtime = st.st_atime_ns, st.st_mtime_ns
    ctime = st.st_ctime_ns if ctime_ns is None else ctime_ns
    return (
        ino,
        st.st_size,
        st.st_blocks,
        atime // _NS,
        mtime // _NS,
        ctime // _NS,
        atime % _NS,
        mtime % _NS,
        ctime % _NS,
        st.st_mode,
        st.st_nlink if nlink is None else nlink,
        st.st_uid,
        st.st_gid,
        st.st_rdev & 0xFFFFFFFF,
        st.st_blksize & 0xFFFFFFFF,
        0,
    )


def negative_entry(unique: int, entry_valid: Timeout) -> Reply:
    """LOOKUP found nothing, and the kernel may cache that; if not, answer `error(unique, ENOENT)`."""
    return [_ENTRY.pack(_ENTRY.size, 0, unique, 0, 0, entry_valid[0], 0, entry_valid[1], 0, b"")]


class Dirents:
    """The answer to one READDIR or READDIRPLUS, growing entry by entry up to `limit` bytes.

    `size` is the number of bytes so far. `add` returns whether the entry fits; stop after the first that does
    not.
    """

    __slots__ = ("_records", "limit", "size")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._records: list[bytes] = []

    def fits_plus(self, name: bytes) -> bool:
        """Whether `add_plus` with this name would fit."""
        return self.size + ((_DIRENTPLUS_SIZE + len(name) + 7) & ~7) <= self.limit

    def add(self, name: bytes, ino: int, off: int, mode: int) -> bool:
        """Add an entry of READDIR; of `mode` only the file type counts. Raises ValueError for a bad name."""
        length = len(name)
        size = self.size + ((_DIRENT_SIZE + length + 7) & ~7)
        if size > self.limit:
            return False
        if not 0 < length <= NAME_MAX or 47 in name:
            raise _bad_name(name)
        self._records.append(_DIRENT(ino, off, length, mode >> 12) + name + _PADDING[length & 7])
        self.size = size
        return True

    def add_plus(self, name: bytes, ino: int, off: int, mode: int, entry: bytes) -> bool:
        """Like `add`, for READDIRPLUS; `entry` is from `encode.entry_out`."""
        length = len(name)
        size = self.size + ((_DIRENTPLUS_SIZE + length + 7) & ~7)
        if size > self.limit:
            return False
        if not 0 < length <= NAME_MAX or 47 in name:
            raise _bad_name(name)
        self._records.append(_PLUS(entry, ino, off, length, mode >> 12) + name + _PADDING[length & 7])
        self.size = size
        return True

    def add_found(
        self,
        name: bytes,
        off: int,
        nodeid: int,
        generation: int,
        entry: Timeout,
        attr: Timeout,
        values: AttributeValues,
    ) -> None:
        """Like `add_plus`, packed with its entry in one call. The entry must fit, see `fits_plus`.

        `entry` and `attr`: the validity of name and attributes; `values`: from `attribute_values`.
        Raises ValueError for an invalid name.
        """
        length = len(name)
        if not 0 < length <= NAME_MAX or 47 in name:
            raise _bad_name(name)
        record = _FOUND(
            nodeid, generation, entry[0], attr[0], entry[1], attr[1], *values, values[0], off, length,
            values[9] >> 12,
        )  # fmt: skip
        self._records.append(record + name + _PADDING[length & 7])
        self.size += (_DIRENTPLUS_SIZE + length + 7) & ~7

    def packed(self) -> bytes:
        """The data for `encode.data`."""
        return b"".join(self._records)


def _bad_name(name: bytes) -> ValueError:
    return ValueError(f"{name!r} cannot be the name of a directory entry.")
