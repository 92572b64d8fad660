"""The manifest: one line for every entry of an archive, in archive order, and a digest of all lines.

    KIND MODE UID GID SIZE MTIME ATTRIBUTES DIGEST PATH<tab>STATE CTIME INO

`DIGEST` is the xxh3-128 of a file's content (of a file with holes as in `entry.SparseDigest`), `ATTRIBUTES`
the digest of link, device number and xattrs; `-` means none. The first line and the last but one contain the
digests of the archive's own members, `info.json` and `deleted`. `STATE` is the place of the content: `here`,
the `base` of an incremental archive, or `again`: it changed during the read and follows once more. The next
incremental backup uses `CTIME` and `INO` to detect changes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import IO

from xxhash import xxh3_128

from unionfs.storage.archive.entry import Entry
from unionfs.storage.archive.headers import Malformed

FIRST_LINE = b"unionfs-manifest 1 xxh3-128\n"
HERE, BASE, AGAIN = b"here", b"base", b"again"

_LONGEST_LINE = 16 << 20
_ESCAPES = ((b"\\", b"\\\\"), (b"\t", b"\\t"), (b"\n", b"\\n"), (b"\r", b"\\r"))
_CHARS = {written: char for char, written in _ESCAPES}
_ESCAPED = re.compile(rb"\\.?", re.DOTALL)


def escape(path: bytes) -> bytes:
    """Encode a path as a word without tabs and line breaks; `.` is the root."""
    if not path:
        return b"."
    for char, written in _ESCAPES:
        if char in path:
            path = path.replace(char, written)
    return path


def unescape(word: bytes) -> bytes:
    def char(found: re.Match[bytes]) -> bytes:
        if found[0] not in _CHARS:
            raise Malformed("a path in the manifest is malformed")
        return _CHARS[found[0]]

    return b"" if word == b"." else _ESCAPED.sub(char, word)


def line_of(entry: Entry, digest: str) -> bytes:
    """The part before the tab, which a reader of the archive can compute too."""
    return b"%s %o %d %d %d %d %s %s %s" % (
        entry.kind.encode(), entry.mode, entry.uid, entry.gid, entry.size, entry.mtime,
        entry.attributes().encode(), digest.encode(), escape(entry.path),
    )  # fmt: skip


def whole_line(entry: Entry, digest: str, state: bytes) -> bytes:
    return b"%s\t%s %d %d\n" % (line_of(entry, digest), state, entry.ctime, entry.ino)


def plain_line(path: bytes, status: os.stat_result, digest: str) -> bytes:
    """Like `whole_line`, for a file in this archive without links and xattrs."""
    return b"f %o %d %d %d %d - %b %b\there %d %d\n" % (
        status.st_mode & 0o7777, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns,
        digest.encode(), escape(path), status.st_ctime_ns, status.st_ino,
    )  # fmt: skip


def member_line(name: bytes, data_digest: str) -> bytes:
    """The line for one of the archive's own members."""
    return b"%s %s\n" % (name, data_digest.encode())


def is_member_line(line: bytes) -> bool:
    """Whether a line describes one of the archive's own members: an entry's line begins with one letter."""
    return line[1:2] != b" "


class Line:
    __slots__ = ("ctime", "digest", "fields", "ino", "kind", "mtime", "path", "shown", "size", "state")

    def __init__(self, raw: bytes) -> None:
        try:
            shown, _, rest = raw.rstrip(b"\n").partition(b"\t")
            self.fields = shown.split(b" ", 8)
            kind, _, _, _, size, mtime, _, digest, path = self.fields
            state, ctime, ino = rest.split(b" ")
            self.shown = shown
            self.kind = kind.decode("ascii")
            self.size, self.mtime, self.ctime, self.ino = int(size), int(mtime), int(ctime), int(ino)
            self.digest = digest.decode("ascii")
            self.state = state
        except ValueError:
            raise Malformed("a line of its manifest is malformed") from None
        self.path = unescape(path)


def order(path: bytes) -> list[bytes]:
    return path.split(b"/")


class ManifestWriter:
    """Writes a manifest to a file."""

    def __init__(self, out: IO[bytes]) -> None:
        self.out = out
        self.count = 0
        self._sum = xxh3_128(FIRST_LINE)
        self._write = out.write
        out.write(FIRST_LINE)

    def add(self, line: bytes) -> None:
        self._sum.update(line)
        self._write(line)
        self.count += 1

    def finish(self) -> None:
        self._write(b"end %d %s\n" % (self.count, self._sum.hexdigest().encode()))


def lines_of(source: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, using no more memory than the longest line. Raises Malformed."""
    while line := source.readline(_LONGEST_LINE + 1):
        if len(line) > _LONGEST_LINE:
            raise Malformed("one of its lists has a line that is too long")
        yield line


def read_manifest(source: IO[bytes]) -> Iterator[bytes]:
    """The lines of a manifest; checks the digest in the last line at the end. Raises Malformed."""
    lines = lines_of(source)
    if next(lines, b"") != FIRST_LINE:
        raise Malformed("its manifest has another format")
    total, count = xxh3_128(FIRST_LINE), 0
    for line in lines:
        if line.startswith(b"end "):
            if line != b"end %d %s\n" % (count, total.hexdigest().encode()):
                raise Malformed("its manifest does not match its own digest")
            if next(lines, None) is not None:
                raise Malformed("its manifest continues past its end")
            return
        if not line.endswith(b"\n"):
            raise Malformed("its manifest is cut off")
        total.update(line)
        count += 1  # noqa: SIM113
        yield line
    raise Malformed("its manifest is cut off")


def latest(lines: Iterable[bytes]) -> Iterator[Line]:
    """The valid lines: a later attempt replaces an earlier one."""
    for raw in lines:
        if is_member_line(raw):
            continue
        line = Line(raw)
        if line.state != AGAIN:
            yield line


class Beside:
    """The lines of a manifest, read along with something else in the same order; `passed` gets each line that
    has no counterpart.
    """

    def __init__(self, lines: Iterator[Line], passed: Callable[[Line], object] = lambda line: None) -> None:
        self._lines = lines
        self._passed = passed
        self._next = next(lines, None)

    def at(self, path: bytes) -> Line | None:
        """The line for a path, if any."""
        place = order(path)
        while (line := self._next) is not None and (known := order(line.path)) <= place:
            self._next = next(self._lines, None)
            if known == place:
                return line
            self._passed(line)
        return None

    def finish(self) -> None:
        while self._next is not None:
            self._passed(self._next)
            self._next = next(self._lines, None)
