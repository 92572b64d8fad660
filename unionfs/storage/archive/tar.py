"""Writes the members of a tar into a sink."""

from __future__ import annotations

import os
import time
from typing import IO

from unionfs.storage.archive.compress import Sink
from unionfs.storage.archive.entry import SPARSE, Entry
from unionfs.storage.archive.headers import PlainFiles, encode, sparse_map, special_file, stored_size

_CHUNK = 1 << 20
_FLUSH = 1 << 20
_ZEROS = bytes(512)


class Members:
    """Receives the members of an archive; this class drops them, for a manifest alone."""

    def plain_header(
        self, path: bytes, mode: int, uid: int, gid: int, size: int, mtime: int
    ) -> bytes | None:
        """The headers of a regular file for `add_plain`; None if the file needs `add`."""
        return b""

    def add_plain(self, header: bytes, data: bytes) -> None:
        """Add a file by its headers and content."""

    def add(self, entry: Entry, data: bytes = b"") -> None:
        """Add an entry with its content in one piece."""

    def begin(self, entry: Entry) -> None:
        """Begin a file; its content follows through `put`."""

    def put(self, data: bytes) -> None:
        """Add data to the current member."""

    def end(self, entry: Entry) -> None:
        """End the file started by `begin`."""


class Tar(Members):
    """Writes the members to a sink, about 1 MiB at a time."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._parts: list[bytes] = []
        self._size = 0
        self._plain = PlainFiles()

    def plain_header(
        self, path: bytes, mode: int, uid: int, gid: int, size: int, mtime: int
    ) -> bytes | None:
        return self._plain.encode(path, mode, uid, gid, size, mtime)

    def add_plain(self, header: bytes, data: bytes) -> None:
        size = len(data)
        self._parts += header, data, _ZEROS[: -size % 512]
        self._size += size + 1536
        if self._size >= _FLUSH:
            self._flush()

    def add(self, entry: Entry, data: bytes = b"") -> None:
        self.put(encode(entry, len(data)) + data + _ZEROS[: -len(data) % 512])

    def begin(self, entry: Entry) -> None:
        self.put(encode(entry, stored_size(entry)))
        if entry.kind == SPARSE:
            self.put(sparse_map(entry.segments))

    def put(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)
        if self._size >= _FLUSH:
            self._flush()

    def end(self, entry: Entry) -> None:
        self.put(_ZEROS[: -stored_size(entry) % 512])

    def special(self, name: bytes, content: IO[bytes]) -> None:
        """Add one of the archive's own members, with the whole content of a file."""
        size = content.seek(0, os.SEEK_END)
        self.put(special_file(name, size, time.time_ns()))
        content.seek(0)
        while chunk := content.read(_CHUNK):
            self.put(chunk)
        self.put(_ZEROS[: -size % 512])

    def finish(self) -> None:
        self.put(bytes(1024))
        self._flush()

    def _flush(self) -> None:
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts, self._size = [], 0
        self._sink.write(data)
