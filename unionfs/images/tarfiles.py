"""An image's archive: a tar on disk whose files are read by name, and never unpacked."""

from __future__ import annotations

import os
from typing import Final

from unionfs.errors import quoted
from unionfs.images.rules import Refused
from unionfs.storage.archive.entry import DIRECTORY, FILE, HARDLINK, SYMLINK, Entry
from unionfs.storage.archive.foreign import ForeignReader
from unionfs.storage.archive.headers import Malformed

_MOST_FILES: Final = 20_000
_MOST_LINKS: Final = 8
_COMPRESSED: Final = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")


class _File:
    """A source that can skip data, since nothing but headers is needed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.at = 0

    def read(self, size: int, /) -> bytes:
        # The reader takes whole chunks; a record at a time leaves the data of members alone.
        data = os.pread(self._fd, min(size, 512), self.at)
        self.at += len(data)
        return data

    def skip(self, size: int) -> None:
        self.at += size


class _Headers(ForeignReader):
    """Reads the headers of a tar, and where the data of its members is."""

    def __init__(self, file: _File) -> None:
        super().__init__(file)
        self._file = file

    def places(self) -> list[tuple[Entry, int]]:
        """Each member, and the offset of its data."""
        found: list[tuple[Entry, int]] = []
        while (member := self._next()) is not None:
            entry, size = member
            if len(found) >= _MOST_FILES:
                raise Malformed(f"it has more than {_MOST_FILES} files")
            found.append((entry, self._file.at))
            self._file.skip(size + -size % 512)
        return found


class TarFiles:
    """The files of an archive by name. The fd stays the caller's. Raises Malformed and OSError."""

    def __init__(self, fd: int) -> None:
        start = os.pread(fd, 6, 0)
        if start.startswith(_COMPRESSED):
            raise Refused("it is compressed as a whole, so its parts cannot be found", "decompress it first")
        self._places: dict[bytes, tuple[int, int]] = {}
        self._links: dict[bytes, bytes] = {}
        size = os.fstat(fd).st_size
        for entry, offset in _Headers(_File(fd)).places():
            name = _inside(entry.path, b"")
            if entry.kind == DIRECTORY:
                continue
            if name in self._places or name in self._links:
                raise Malformed(f"it has two files with the name {quoted(name)}")
            if entry.kind == FILE:
                if offset + entry.size > size:
                    raise Malformed("it is cut off")
                self._places[name] = (offset, entry.size)
            elif entry.kind == SYMLINK:
                self._links[name] = _inside(entry.link, name.rpartition(b"/")[0])
            elif entry.kind == HARDLINK:
                self._links[name] = _inside(entry.link, b"")
            else:
                raise Malformed(f"{quoted(name)} is neither a file nor a link")

    def find(self, name: str) -> tuple[int, int]:
        """The offset and size of a file. Raises Malformed."""
        path = _inside(os.fsencode(name), b"")
        for _ in range(_MOST_LINKS):
            if path in self._places:
                return self._places[path]
            if path not in self._links:
                raise Malformed(f"it has no file {quoted(name)}")
            path = self._links[path]
        raise Malformed(f"its file {quoted(name)} is a link that leads nowhere")

    def has(self, name: str) -> bool:
        """Whether it has a file of that name."""
        path = os.fsencode(name)
        return path in self._places or path in self._links


def _inside(name: bytes, directory: bytes) -> bytes:
    """A name in the archive, relative to one of its directories, as a path. Raises Malformed."""
    if name.startswith(b"/") or b"\0" in name:
        raise Malformed(f"its file {quoted(name)} is absolute")
    parts = directory.split(b"/") if directory else []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                raise Malformed(f"its file {quoted(name)} leads out of it")
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)
