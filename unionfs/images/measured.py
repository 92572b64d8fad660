"""Streams that count, limit and hash what passes through them."""

from __future__ import annotations

import hashlib
import io
import os
from typing import IO, Any

from unionfs.images.rules import FREE_RATIO, Refused, Rules
from unionfs.settings.sizes import shown_size
from unionfs.storage.archive.compress import Sink, Source


class _Hash:
    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.total = 0
        """Bytes so far."""

    def _add(self, data: Any) -> None:
        self._hash.update(data)
        self.total += len(data)

    def digest(self) -> str:
        """`sha256:` and 64 hexadecimal digits."""
        return f"sha256:{self._hash.hexdigest()}"


class Window(_Hash, io.RawIOBase):
    """Reads `size` bytes of an open file from `offset` on, and hashes them. The fd stays the caller's."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        super().__init__()
        self._fd = fd
        self._at = offset
        self._end = offset + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)[: max(self._end - self._at, 0)]
        count = os.preadv(self._fd, [view], self._at) if view else 0
        self._add(view[:count])
        self._at += count
        return count

    def drain(self) -> None:
        """Read to the end."""
        while self.read(1 << 20):
            pass


class Unpacked(_Hash):
    """A source of uncompressed data that hashes it, and refuses a bomb."""

    def __init__(self, source: Source, compressed: Window, rules: Rules) -> None:
        super().__init__()
        self._source = source
        self._compressed = compressed
        self._rules = rules

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes. Raises Refused beyond a limit."""
        data = self._source.read(size)
        self._add(data)
        if self.total > self._rules.size:
            raise Refused(
                f"its content is larger than {shown_size(self._rules.size)}",
                "if you trust it, raise the limit by --max-size of `import`",
            )
        if self.total > max(FREE_RATIO, self._compressed.total * self._rules.ratio):
            raise Refused(
                f"its content is more than {self._rules.ratio} times as large as its compressed data, as in "
                "a decompression bomb",
                "if you trust it, raise the limit by --max-ratio of `import`",
            )
        return data


class HashedFile(_Hash):
    """Writes to an unbuffered file, and hashes what is written."""

    def __init__(self, out: IO[bytes]) -> None:
        super().__init__()
        self._out = out

    def fileno(self) -> int:
        return self._out.fileno()

    def write(self, data: Any, /) -> int | None:
        written: int | None = self._out.write(data)
        if written:
            self._add(memoryview(data)[:written])
        return written


class HashedSink(_Hash):
    """A sink that hashes what is written to another one."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self._sink = sink

    def write(self, data: bytes, /) -> int:
        self._add(data)
        return self._sink.write(data)

    def close(self) -> None:
        self._sink.close()
