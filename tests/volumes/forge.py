"""Archives with arbitrary members and a matching manifest, as forged by an attacker."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from unionfs.storage.archive import entry as entries
from unionfs.storage.archive import headers, manifest
from unionfs.storage.archive.entry import NO_DIGEST, Entry, digest_of
from unionfs.storage.archive.headers import INFO, MANIFEST

Member = tuple[Entry, bytes, bytes]
"""An entry (its path is for the manifest), the name in the header, and the data."""


def file(name: bytes, data: bytes = b"forged\n", *, mode: int = 0o644) -> Member:
    """A regular file."""
    made = Entry(name.removeprefix(b"./"), entries.FILE, mode, 0, 0, len(data), 1_600_000_000_000_000_000)
    return made, name, data


def other(kind: str, name: bytes, link: bytes = b"", rdev: tuple[int, int] = (0, 0)) -> Member:
    """A directory, link, device ... `link` is written unchanged."""
    path = (
        name.removeprefix(b"./").removesuffix(b"/") if kind == entries.DIRECTORY else name.removeprefix(b"./")
    )
    made = Entry(path, kind, 0o755, 0, 0, 0, 1_600_000_000_000_000_000, link=link, rdev=rdev)
    return made, name, b""


def directory(name: bytes) -> Member:
    """A directory; the name ends in a slash."""
    return other(entries.DIRECTORY, name)


def header(member: Member) -> bytes:
    """The headers of a member; values that do not fit have a record."""
    made, name, data = member
    kind = headers._TYPES[made.kind]
    records = b""
    for key, value in (b"path", name), (b"linkpath", made.link):
        records += headers._record(key, value) if len(value) > 100 else b""
    uid = made.uid if made.uid <= headers._MAX_SMALL else 0
    records += headers._record(b"uid", b"%d" % made.uid) if uid != made.uid else b""
    field = headers._field(
        name[:100], made.mode, uid, made.gid, len(data), made.mtime // 10**9, kind, made.link[:100], made.rdev
    )
    return headers._pax(records) + field if records else field


def archive(members: Sequence[Member], *, info: dict[str, object] | None = None, root: bool = True) -> bytes:
    """A whole archive."""
    text = json.dumps(
        {"format": 1, "id": "forged", "volume": "data", "started": 1, "base": None, **(info or {})}
    )
    whole = [directory(b"./"), *members] if root else list(members)
    out = io.BytesIO()
    lines = io.BytesIO()
    written = manifest.ManifestWriter(lines)
    out.write(headers.special_file(INFO, len(text), 0) + _padded(text.encode()))
    written.add(manifest.member_line(b"info.json", digest_of(text.encode())))
    for made, name, data in whole:
        out.write(header((made, name, data)) + _padded(data))
        if made.kind == entries.HARDLINK:
            made = made._replace(link=made.link.removeprefix(b"./"))
        digest = digest_of(data) if made.kind == entries.FILE else NO_DIGEST
        written.add(manifest.whole_line(made, digest, manifest.HERE))
    written.finish()
    listed = lines.getvalue()
    out.write(headers.special_file(MANIFEST, len(listed), 0) + _padded(listed) + bytes(1024))
    return out.getvalue()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def write(path: Path, members: Sequence[Member], **named: object) -> Path:
    """A whole archive as a file."""
    path.write_bytes(archive(members, **named))  # type: ignore[arg-type]
    return path
