"""One entry of a tree, as stored in an archive."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from xxhash import xxh3_64_hexdigest, xxh3_128, xxh3_128_hexdigest

FILE, SPARSE, DIRECTORY, SYMLINK, HARDLINK, FIFO, CHARACTER, BLOCK = "f", "s", "d", "l", "h", "p", "c", "b"

NO_DIGEST = "-"
MOST_SEGMENTS = 1 << 20
"""A file with more data segments is stored without holes: each segment costs the reader memory."""
_BLOCK = 4096
_ZEROS = bytes(_BLOCK)
_RUN = struct.Struct("<QQ")
NO_XATTRS: Final[Mapping[bytes, bytes]] = {}


class Entry(NamedTuple):
    """Attributes as in lstat(2). Names are bytes: `path` is relative without `./`, and empty for the root."""

    path: bytes
    kind: str
    mode: int  # the permission bits, 07777
    uid: int
    gid: int
    size: int  # of the content; 0 unless it is a file
    mtime: int  # nanoseconds
    ctime: int = 0
    ino: int = 0
    rdev: tuple[int, int] = (0, 0)
    link: bytes = b""  # a symlink's target as it is, or the path of a hard link's first name
    xattrs: Mapping[bytes, bytes] = NO_XATTRS
    segments: Sequence[tuple[int, int]] = ()  # of a sparse file: offset and length of the data

    def attributes(self) -> str:
        """A digest of the attributes that the manifest's line omits: link, device number and xattrs."""
        if not self.link and not self.xattrs and self.rdev == (0, 0):
            return NO_DIGEST
        parts = [self.link, b"%d:%d" % self.rdev]
        for name in sorted(self.xattrs):
            parts += (name, self.xattrs[name])
        return xxh3_64_hexdigest(b"".join(b"%d:%s" % (len(part), part) for part in parts))


def digest_of(data: bytes) -> str:
    """The digest of a file's content: xxh3-128, in hexadecimal digits."""
    return xxh3_128_hexdigest(data)


class Digest(Protocol):
    """The digest of a file's content, updated piece by piece in ascending offsets."""

    def update(self, offset: int, data: bytes) -> None: ...

    def hexdigest(self, size: int) -> str:
        ...


def new_digest(entry: Entry) -> Digest:
    """The digest that the manifest uses for this kind of file."""
    return SparseDigest() if entry.kind == SPARSE else _WholeDigest()


class _WholeDigest:
    """Like `digest_of`, for a file without holes."""

    def __init__(self) -> None:
        self._data = xxh3_128()

    def update(self, offset: int, data: bytes) -> None:
        self._data.update(data)

    def hexdigest(self, size: int) -> str:
        return self._data.hexdigest()


class SparseDigest:
    """The digest of a file with holes, independent of how the filesystem records the holes.

    Data is split into blocks of 4096 bytes; all-zero blocks count as holes. The digest covers the digest of
    the other blocks, their positions (runs of offset and length), and the size. So a hole costs nothing, even
    one of exabytes.
    """

    def __init__(self) -> None:
        self._data = xxh3_128()
        self._runs = xxh3_128()
        self._start = self._end = -1
        self._left = b""
        self._at = 0  # the offset of `_left`, a multiple of the block

    def update(self, offset: int, data: bytes) -> None:
        """Add data at an offset at or after the end of the previous data."""
        if self._left and offset != self._at + len(self._left):
            self._flush_left()
        if not self._left:
            # The part of the first block before the data is a hole.
            self._at = offset - offset % _BLOCK
            if offset % _BLOCK:
                self._left = bytes(offset % _BLOCK)
        whole = self._left + data if self._left else data
        end = len(whole) - len(whole) % _BLOCK
        if end:
            self._blocks(self._at, whole[:end] if end != len(whole) else whole)
        self._left = whole[end:]
        self._at += end

    def _flush_left(self) -> None:
        if self._left:
            block = self._left.ljust(_BLOCK, b"\0")
            at, self._left = self._at, b""
            self._blocks(at, block)

    def _blocks(self, offset: int, data: bytes) -> None:
        if data.find(_ZEROS) < 0:
            self._run(offset, data)
            return
        for at in range(0, len(data), _BLOCK):
            block = data[at : at + _BLOCK]
            if block != _ZEROS:
                self._run(offset + at, block)

    def _run(self, offset: int, data: bytes) -> None:
        if offset != self._end:
            if self._end > self._start:
                self._runs.update(_RUN.pack(self._start, self._end - self._start))
            self._start = offset
        self._end = offset + len(data)
        self._data.update(data)

    def hexdigest(self, size: int) -> str:
        self._flush_left()
        if self._end > self._start:
            self._runs.update(_RUN.pack(self._start, self._end - self._start))
            self._start = self._end
        return xxh3_128_hexdigest(self._data.digest() + self._runs.digest() + _RUN.pack(size, 0))
