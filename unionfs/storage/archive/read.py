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
    Damaged,
    Header,
    Malformed,
    check_pax_size,
    checked_path,
    decode,
    parse_records,
)
from unionfs.storage.archive.manifest import Line, line_of, lines_of, read_manifest, unescape
from unionfs.storage.archive.stream import CHUNK, TarStream

_MOST_INFO = 1 << 20


class ArchiveReader(TarStream):
    """Reads one archive to its end: `info`, then `entries`, then `deleted` and `manifest_lines`.

    Every method may raise Malformed, and OSError of the source.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._digest = NO_DIGEST  # of the current file, once it has been read
        self._content: Iterable[tuple[int, bytes]] = ()
        self._seen: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=8 << 20)  # noqa: SIM115
        self._lines: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=8 << 20)  # noqa: SIM115
        self._deleted: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=1 << 20)  # noqa: SIM115
        self.count = 0
        self.read_bytes = 0
        self.complete = False
        self.info = self._read_info()

    # -- members ------------------------------------------------------------------------------------------

    def _next_member(self) -> tuple[Entry, bytes, int] | None:
        """The next member's headers; None at the end of the archive."""
        raw = self._record()
        if raw is None:
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

    def _read_info(self) -> dict[str, Any]:
        try:
            member = self._next_member()
        except Damaged:
            raise
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
                entry = entry._replace(segments=self._read_map(entry.size))
            self._digest = NO_DIGEST
            if entry.kind == FILE and size <= CHUNK:
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
                chunk = self._take(min(end - offset, CHUNK))
                digest.update(offset, chunk)
                self.read_bytes += len(chunk)
                yield offset, chunk
                offset += len(chunk)
        self._left = 0
        self._skip_padding()
        self._digest = digest.hexdigest(entry.size)

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
            raise Malformed("data follows its manifest")
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
        while chunk := self._lines.read(CHUNK):
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
