"""What an incremental backup omits: entries unchanged since the archive it is based on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import IO

from xxhash import xxh3_128

from unionfs.storage.archive.entry import Entry
from unionfs.storage.archive.manifest import BASE, Beside, Line, escape, whole_line

# A file that changed in the same tick of the kernel's clock as the start of the base may look unchanged (most
# filesystems' clocks tick 100 to 1000 times a second), so such a file is backed up again.
_RACY = 50_000_000


class Base:
    """The manifest of the base, read along with a walk: both use the same order.

    `lines` are the manifest's lines, `started` is the start time of the base (nanoseconds).
    """

    def __init__(self, lines: Iterator[Line], started: int) -> None:
        self._lines = Beside(lines, self._delete)
        self._started = started
        self._deleted: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=1 << 20)  # noqa: SIM115
        self._digest = xxh3_128()

    def line_if_unchanged(self, entry: Entry) -> bytes | None:
        """The manifest's line for an entry that is unchanged since the base, else None."""
        known = self._lines.at(entry.path)
        if known is None or entry.ctime >= self._started - _RACY:
            return None
        if (entry.kind, entry.ctime, entry.ino, entry.mtime, entry.size) != (
            known.kind, known.ctime, known.ino, known.mtime, known.size,
        ):  # fmt: skip
            return None
        line = whole_line(entry, known.digest, BASE)
        # Attributes are compared too: a clock set back may hide a change.
        return line if line.partition(b"\t")[0] == known.shown else None

    def deleted(self) -> tuple[IO[bytes], str]:
        """The list of base entries that the walk did not find, and its digest. Call it after the walk."""
        self._lines.finish()
        return self._deleted, self._digest.hexdigest()

    def _delete(self, line: Line) -> None:
        text = escape(line.path) + b"\n"
        self._deleted.write(text)
        self._digest.update(text)
