"""Reads tars that other programs wrote: ustar, pax, GNU's long names, and headers before POSIX.

Sources: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar's manual, "Basic Tar
Format"; Go's archive/tar/reader.go, which reads the layers of docker and podman. GNU's sparse format 1.0 is
read; the older ones, whose maps are in headers, are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from unionfs.errors import quoted
from unionfs.storage.archive import acl
from unionfs.storage.archive.compress import Source
from unionfs.storage.archive.entry import (
    BLOCK,
    CHARACTER,
    DIRECTORY,
    FIFO,
    FILE,
    HARDLINK,
    SPARSE,
    SYMLINK,
    Entry,
)
from unionfs.storage.archive.headers import (
    Malformed,
    check_pax_size,
    decimal,
    nanoseconds,
    number,
    parse_records,
    text,
)
from unionfs.storage.archive.stream import CHUNK, TarStream

_KINDS = {
    b"0": FILE, b"\0": FILE, b"7": FILE, b"1": HARDLINK, b"2": SYMLINK, b"3": CHARACTER, b"4": BLOCK,
    b"5": DIRECTORY, b"6": FIFO,
}  # fmt: skip
_LONG_NAME, _LONG_LINK, _PAX, _GLOBAL = b"L", b"K", b"x", b"g"
_NO_ID = (1 << 32) - 1  # stands for none (chown(2))
_XATTR = b"SCHILY.xattr."

Records = dict[bytes, bytes]


class ForeignReader(TarStream):
    """Reads a tar as entries: `entries`, and `content` of the current one; both may raise Malformed."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._global: Records = {}
        self._content: Iterable[tuple[int, bytes]] = ()

    def entries(self) -> Iterator[Entry]:
        """The entries in the tar's order, until its end, which is checked."""
        while (found := self._next()) is not None:
            entry, size = found
            self._open_data(size)
            if entry.kind == SPARSE:
                entry = entry._replace(segments=self._read_map(entry.size))
            self._content = self._data(entry) if entry.kind in (FILE, SPARSE) else ()
            yield entry
            for _ in self._content:
                pass

    def content(self) -> Iterable[tuple[int, bytes]]:
        """(offset, data) of the current file; empty for other entries. Can be iterated once."""
        return self._content

    def _data(self, entry: Entry) -> Iterator[tuple[int, bytes]]:
        for offset, length in entry.segments if entry.kind == SPARSE else ((0, entry.size),):
            end = offset + length
            while offset < end:
                chunk = self._take(min(end - offset, CHUNK))
                yield offset, chunk
                offset += len(chunk)
        self._left = 0
        self._skip_padding()

    def _next(self) -> tuple[Entry, int] | None:
        """The next member and the size of its data; None at the end."""
        records: Records = {}
        long: Records = {}
        while (raw := self._record()) is not None:
            kind, size = raw[156:157], _any_number(raw[124:136], "size")
            if kind not in (_LONG_NAME, _LONG_LINK, _PAX, _GLOBAL):
                return _decode(raw, size, {**self._global, **long, **records})
            check_pax_size(size)
            self._open_data(size)
            _check_sum(raw)
            data = b"".join(self._rest())
            if kind == _GLOBAL:
                self._global.update(parse_records(data))
            elif kind == _PAX:
                records.update(parse_records(data))
            else:
                long[b"path" if kind == _LONG_NAME else b"linkpath"] = text(data)
        if records or long:
            raise Malformed("it is cut off")
        return None


def _check_sum(raw: bytes) -> None:
    if number(raw[148:156].lstrip(b" "), "checksum") != sum(raw) - sum(raw[148:156]) + 256:
        raise Malformed("a header's checksum is wrong, so it is not a tar, or damaged")


def _any_number(raw: bytes, what: str) -> int:
    """An octal number, or GNU's binary one; not negative, except in binary."""
    if raw[0] & 0x80:
        value = int.from_bytes(raw, "big", signed=True) if raw[0] & 0x40 else int.from_bytes(raw[1:], "big")
        if value >= 1 << 63 or (value < 0 and what != "time"):
            raise Malformed(f"a header's {what} is out of range")
        return value
    return number(raw.lstrip(b" "), what)


def _decode(raw: bytes, size: int, records: Records) -> tuple[Entry, int]:
    _check_sum(raw)
    name, link = text(raw[:100]), text(raw[157:257])
    if raw[257:263] == b"ustar\0" and raw[345]:
        name = text(raw[345:500]) + b"/" + name
    name, link = records.get(b"path", name), records.get(b"linkpath", link)
    if b"GNU.sparse.name" in records:
        name = records[b"GNU.sparse.name"]
    kind = _KINDS.get(raw[156:157])
    if kind is None:
        raise Malformed(f"its entry {quoted(name)} has the type {raw[156:157]!r}, which layers do not have")
    if kind == FILE and name.endswith(b"/"):
        kind = DIRECTORY  # before POSIX
    if b"size" in records:
        size = decimal(records[b"size"])
    real = size
    if any(key.startswith(b"GNU.sparse.") for key in records):
        kind, real = SPARSE, _sparse_size(kind, name, records)
    elif kind != FILE:
        # Links may repeat the size of their file, without data (POSIX; Go: isHeaderOnlyType).
        size = real = 0
    owners = [_owner(raw[at : at + 8], key, records) for at, key in ((108, b"uid"), (116, b"gid"))]
    device = (0, 0)
    if kind in (CHARACTER, BLOCK):
        device = (_any_number(raw[329:337], "device"), _any_number(raw[337:345], "device"))
    mtime = _any_number(raw[136:148], "time") * 1_000_000_000
    if b"mtime" in records:
        mtime = nanoseconds(records[b"mtime"])
    return Entry(
        name, kind, _any_number(raw[100:108], "mode") & 0o7777, owners[0], owners[1], real, mtime,
        rdev=device, link=link if kind in (SYMLINK, HARDLINK) else b"", xattrs=_xattrs(name, records),
    ), size  # fmt: skip


def _owner(raw: bytes, key: bytes, records: Records) -> int:
    value = decimal(records[key]) if key in records else _any_number(raw, "owner")
    if value >= _NO_ID:
        raise Malformed("an owner is not a user id")
    return value


def _sparse_size(kind: str, name: bytes, records: Records) -> int:
    if kind != FILE or (records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor")) != (b"1", b"0"):
        raise Malformed(f"{quoted(name)} is in an old sparse format, not in GNU tar's of --posix")
    return decimal(records.get(b"GNU.sparse.realsize", b""))


def _xattrs(name: bytes, records: Records) -> dict[bytes, bytes]:
    found = {}
    for key, value in records.items():
        if key.startswith(_XATTR):
            found[key[len(_XATTR) :].replace(b"%3D", b"=").replace(b"%25", b"%")] = value
        elif key in acl.OF_RECORDS:
            try:
                found[acl.OF_RECORDS[key]] = acl.from_text(value)
            except ValueError as error:
                raise Malformed(f"the ACL of {quoted(name)} cannot be used: {error}") from None
    return found
