"""Reads an archive as entries. The archive is not trusted: names, sizes, order and content are checked."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

from xxhash import xxh3_128

from unionfs.storage.archive import manifest
from unionfs.storage.archive.compress import Source
from unionfs.storage.archive.entry import (
    FILE,
    MOST_SEGMENTS,
    NO_DIGEST,
    SPARSE,
    Entry,
    digest_of,
    new_digest,
)
from unionfs.storage.archive.headers import (
    DELETED,
    INFO,
    MANIFEST,
    RECORD,
    Header,
    Malformed,
    check_pax_size,
    checked_path,
    decode,
    parse_records,
)
from unionfs.storage.archive.manifest import Line, line_of, lines_of, read_manifest, unescape

_CHUNK = 1 << 20
_MOST_INFO = 1 << 20
_END = bytes(RECORD)


class ArchiveReader:
    """Reads one archive to its end: `info`, then `entries`, then `deleted` and `manifest_lines`.

    Every method may raise Malformed, and OSError of the source.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._buffer = b""
        self._at = 0
        self._left = 0  # bytes of the current member's data that are not read
        self._padding = 0
        self._digest = NO_DIGEST  # of the current file, once it has been read
        self._content: Iterable[tuple[int, bytes]] = ()
        self._seen: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=8 << 20)  # noqa: SIM115
        self._lines: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=8 << 20)  # noqa: SIM115
        self._deleted: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=1 << 20)  # noqa: SIM115
        self.count = 0
        self.read_bytes = 0
        self.complete = False
        self.info = self._read_info()

    # -- bytes --------------------------------------------------------------------------------------------

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._buffer):
            parts = [self._buffer[self._at :]]
            have = len(parts[0])
            while have < size:
                more = self._source.read(max(_CHUNK, size - have))
                if not more:
                    raise Malformed("it is cut off")
                parts.append(more)
                have += len(more)
            self._buffer, self._at, end = b"".join(parts), 0, size
        data = self._buffer[self._at : end]
        self._at = end
        return data

    def _rest(self) -> Iterator[bytes]:
        while self._left:
            chunk = self._take(min(self._left, _CHUNK))
            self._left -= len(chunk)
            yield chunk
        self._skip_padding()

    def _skip_padding(self) -> None:
        if self._padding:
            if self._take(self._padding).strip(b"\0"):
                raise Malformed("something fills what should be empty")
            self._padding = 0

    def _open_data(self, size: int) -> None:
        self._left, self._padding = size, -size % RECORD

    # -- members ------------------------------------------------------------------------------------------

    def _next_member(self) -> tuple[Entry, bytes, int] | None:
        """The next member's headers; None at the end of the archive."""
        raw = self._take(RECORD)
        if raw == _END:
            if self._take(RECORD) != _END:
                raise Malformed("something follows its end")
            self._expect_nothing()
            return None
        header = Header(raw)
        records: list[tuple[bytes, bytes]] = []
        if header.kind == b"x":
            check_pax_size(header.size)
            self._open_data(header.size)
            records = list(parse_records(b"".join(self._rest())))
            header = Header(self._take(RECORD))
            if header.kind == b"x":
                raise Malformed("two extended headers belong to one member")
        return decode(header, records)

    def _expect_nothing(self) -> None:
        """Check that only zeros follow, as padding to tar's block size."""
        rest = self._buffer[self._at :]
        total = 0
        while True:
            if rest.strip(b"\0"):
                raise Malformed("something follows its end")
            total += len(rest)
            if total > 1 << 20:
                raise Malformed("it does not end")
            rest = self._source.read(_CHUNK)
            if not rest:
                return

    def _read_info(self) -> dict[str, Any]:
        try:
            member = self._next_member()
        except Malformed as error:
            raise Malformed(f"it is not a backup made by `unionfs volume backup` ({error})") from None
        if member is None or member[1] != INFO or member[2] > _MOST_INFO or member[0].kind != FILE:
            raise Malformed("it is not a backup made by `unionfs volume backup`: it does not begin as one")
        self._open_data(member[2])
        try:
            text = b"".join(self._rest())
            self._members = {b"info.json": digest_of(text)}
            found = json.loads(text)
            if not isinstance(found, dict) or not isinstance(found["id"], str):
                raise TypeError
            if found["format"] != 1:
                raise Malformed(f"it has format {found['format']!r}, which a newer unionfs wrote")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Malformed("its description of itself is malformed") from None
        return found

    def entries(self) -> Iterator[Entry]:
        """The volume's entries; `content` reads the data of the current one.

        At the end of the iteration the archive is fully read, and every entry agrees with the manifest.
        """
        while True:
            member = self._next_member()
            if member is None:
                raise Malformed("it has no manifest")
            entry, name, size = member
            if not name.startswith(b"./"):
                self._tail(name, size, entry)
                return
            self.count += 1
            self._open_data(size)
            if entry.kind == SPARSE:
                entry = entry._replace(segments=self._read_map(entry))
            self._digest = NO_DIGEST
            if entry.kind == FILE and size <= _CHUNK:
                self._content = self._read_small(size)
            elif entry.kind in (FILE, SPARSE):
                self._content = self._read_large(entry)
            else:
                self._content = ()
            yield entry
            for _ in self._content:
                pass
            self._seen.write(line_of(entry, self._digest) + b"\n")

    def content(self) -> Iterable[tuple[int, bytes]]:
        """(offset, data) of the current file; empty for other entries. Can be iterated once."""
        return self._content

    def _read_small(self, size: int) -> Iterable[tuple[int, bytes]]:
        data = self._take(size)
        self._left = 0
        self._skip_padding()
        self.read_bytes += size
        self._digest = digest_of(data)
        return ((0, data),) if data else ()

    def _read_large(self, entry: Entry) -> Iterator[tuple[int, bytes]]:
        digest = new_digest(entry)
        for offset, length in entry.segments if entry.kind == SPARSE else ((0, entry.size),):
            end = offset + length
            while offset < end:
                chunk = self._take(min(end - offset, _CHUNK))
                digest.update(offset, chunk)
                self.read_bytes += len(chunk)
                yield offset, chunk
                offset += len(chunk)
        self._left = 0
        self._skip_padding()
        self._digest = digest.hexdigest(entry.size)

    def _read_map(self, entry: Entry) -> list[tuple[int, int]]:
        """The map at the start of a sparse file's data; the rest is the content."""
        text, wanted = b"", 1
        numbers: list[int] = []
        used = 0
        while len(numbers) < wanted:
            if self._left - used < RECORD:
                raise Malformed("a sparse file's map is cut off")
            text += self._take(RECORD)
            used += RECORD
            *lines, text = text.split(b"\n")
            if len(text) >= RECORD:
                raise Malformed("a sparse file's map is malformed")
            for line in lines:
                if len(numbers) == wanted:
                    raise Malformed("a sparse file's map continues past its end")
                if not line.isdigit() or len(line) > 19:
                    raise Malformed("a sparse file's map is malformed")
                numbers.append(int(line))
                if len(numbers) == 1:
                    if numbers[0] > MOST_SEGMENTS:
                        raise Malformed("a sparse file's map is too large")
                    wanted = 1 + 2 * numbers[0]
        if text.strip(b"\0"):
            raise Malformed("a sparse file's map continues past its end")
        segments = list(zip(numbers[1::2], numbers[2::2], strict=True))
        at = 0
        for offset, length in segments:
            if offset < at or offset + length > entry.size:
                raise Malformed("a sparse file's map leads outside the file")
            at = offset + length
        if sum(length for _, length in segments) != self._left - used:
            raise Malformed("a sparse file's map does not fit its data")
        return segments

    # -- the end ------------------------------------------------------------------------------------------

    def _tail(self, name: bytes, size: int, entry: Entry) -> None:
        if name == DELETED and entry.kind == FILE:
            self._members[b"deleted"] = self._copy(size, self._deleted)
            member = self._next_member()
            if member is None:
                raise Malformed("it has no manifest")
            entry, name, size = member
        if name != MANIFEST or entry.kind != FILE:
            raise Malformed(f"its member {name!r} is outside the volume")
        self._copy(size, self._lines)
        if self._next_member() is not None:
            raise Malformed("something follows its manifest")
        self._compare()
        self.complete = True

    def _copy(self, size: int, out: IO[bytes]) -> str:
        """Copy a member's data; returns its digest."""
        total = xxh3_128()
        self._open_data(size)
        for chunk in self._rest():
            total.update(chunk)
            out.write(chunk)
        return total.hexdigest()

    def _compare(self) -> None:
        self._seen.seek(0)
        self._lines.seek(0)
        incremental = self.info.get("base") is not None
        members = set()
        for raw in read_manifest(self._lines):
            if manifest.is_member_line(raw):
                name, _, digest = raw.rstrip(b"\n").partition(b" ")
                if self._members.get(name, "").encode() != digest:
                    raise Malformed(f"its own member {_shown(name)} does not match the manifest")
                members.add(name)
                continue
            line = Line(raw)
            if line.state == manifest.BASE:
                if not incremental:
                    raise Malformed("its manifest names a base, and the archive has none")
                continue
            if line.state not in (manifest.HERE, manifest.AGAIN):
                raise Malformed("a line of its manifest is malformed")
            seen = self._seen.readline()
            if seen.rstrip(b"\n") != line.shown:
                raise Malformed(_difference(seen, line))
        if extra := self._seen.readline():
            raise Malformed(_difference(extra, None))
        if members != set(self._members) or incremental != (b"deleted" in members):
            raise Malformed("its own members are not those that its manifest names")

    def manifest_lines(self) -> Iterator[bytes]:
        """The manifest's lines, after the archive is read."""
        assert self.complete
        self._lines.seek(0)
        return read_manifest(self._lines)

    def copy_manifest(self, out: IO[bytes]) -> None:
        assert self.complete
        self._lines.seek(0)
        while chunk := self._lines.read(_CHUNK):
            out.write(chunk)

    def deleted(self) -> Iterator[bytes]:
        """The paths in the base that the volume no longer had."""
        assert self.complete
        self._deleted.seek(0)
        for line in lines_of(self._deleted):
            path = unescape(line.rstrip(b"\n"))
            yield checked_path(b"./" + path, False)


def _difference(seen: bytes, line: Line | None) -> str:
    if line is None:
        path = seen.rstrip(b"\n").split(b" ", 8)[-1]
        return f"its entry {_shown(path)} is not in its manifest"
    fields = seen.rstrip(b"\n").split(b" ", 8)
    wanted = line.fields
    if len(fields) != 9 or fields[8] != wanted[8]:
        return f"its entry {_shown(wanted[8])} of the manifest is missing, or not in its place"
    if fields[7] != wanted[7]:
        return f"the content of {_shown(wanted[8])} does not match the manifest"
    return f"the attributes of {_shown(wanted[8])} do not match the manifest"


def _shown(word: bytes) -> str:
    text = word.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else repr(text)
