"""The bytes of a tar: its 512-byte records, the data of its members, and the maps of sparse files."""

from __future__ import annotations

from collections.abc import Iterator

from unionfs.storage.archive.compress import Source
from unionfs.storage.archive.entry import MOST_SEGMENTS
from unionfs.storage.archive.headers import RECORD, Malformed

CHUNK = 1 << 20
_MOST_PADDING = 1 << 20
_END = bytes(RECORD)


class TarStream:
    """Reads a source to its end. Every method may raise Malformed, and OSError of the source."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._buffer = b""
        self._at = 0
        self._left = 0  # bytes of the current member's data that are not read
        self._padding = 0

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._buffer):
            parts = [self._buffer[self._at :]]
            have = len(parts[0])
            while have < size:
                more = self._source.read(max(CHUNK, size - have))
                if not more:
                    raise Malformed("it is cut off, or no tar")
                parts.append(more)
                have += len(more)
            self._buffer, self._at, end = b"".join(parts), 0, size
        data = self._buffer[self._at : end]
        self._at = end
        return data

    def _record(self) -> bytes | None:
        """The next header; None at the end of the archive, behind which only zeros may follow."""
        raw = self._take(RECORD)
        if raw != _END:
            return raw
        if self._take(RECORD) != _END:
            raise Malformed("data follows the end of the archive")
        self._expect_nothing()
        return None

    def _rest(self) -> Iterator[bytes]:
        while self._left:
            chunk = self._take(min(self._left, CHUNK))
            self._left -= len(chunk)
            yield chunk
        self._skip_padding()

    def _skip_padding(self) -> None:
        if self._padding:
            if self._take(self._padding).strip(b"\0"):
                raise Malformed("the padding of a member is not zero")
            self._padding = 0

    def _open_data(self, size: int) -> None:
        self._left, self._padding = size, -size % RECORD

    def _expect_nothing(self) -> None:
        """Check that only zeros follow, as padding to tar's block size."""
        rest = self._buffer[self._at :]
        total = 0
        while True:
            if rest.strip(b"\0"):
                raise Malformed("data follows the end of the archive")
            total += len(rest)
            if total > _MOST_PADDING:
                raise Malformed("it does not end")
            rest = self._source.read(CHUNK)
            if not rest:
                return

    def _read_map(self, size: int) -> list[tuple[int, int]]:
        """The map at the start of the data of a sparse file of `size` bytes; the rest is the content."""
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
            if offset < at or offset + length > size:
                raise Malformed("a sparse file's map leads outside the file")
            at = offset + length
        if sum(length for _, length in segments) != self._left - used:
            raise Malformed("a sparse file's map does not fit its data")
        return segments
