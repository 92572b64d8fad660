"""Compressed streams."""

from __future__ import annotations

import gzip
import io
import os
import queue
import select
import stat
import threading
import zlib
from contextlib import suppress
from typing import IO, Any, Protocol, Self, cast

from unionfs.errors import UserError, quoted
from unionfs.storage.archive.headers import Damaged
from unionfs.sys.calls import start_writeback

KINDS = ("zstd", "gzip", "none")
ENDINGS = {"zstd": ".tar.zst", "gzip": ".tar.gz", "none": ".tar"}
_OTHERS = {
    **dict.fromkeys((".xz", ".txz"), "xz"), **dict.fromkeys((".bz2", ".tbz", ".tbz2"), "bzip2"),
    ".lz4": "lz4", ".lzma": "lzma", ".br": "brotli", ".zip": "zip", ".7z": "7-Zip", ".lz": "lzip",
}  # fmt: skip
_ZSTD, _GZIP = b"\x28\xb5\x2f\xfd", b"\x1f\x8b"
_BUFFER = 1 << 20
_WRITEBACK = 32 << 20


class Sink(Protocol):
    def write(self, data: bytes, /) -> int: ...

    def close(self) -> None: ...


class Source(Protocol):
    """The input of an archive; a short read means the end."""

    def read(self, size: int, /) -> bytes: ...


def kind_for(path: str) -> str:
    """The compression for a file name; zstd by default. Raises UserError for a name of another one."""
    lowered = path.lower()
    for ending in _OTHERS:
        if lowered.endswith(ending):
            raise UserError(
                f"{quoted(path)} is a name for {_OTHERS[ending]}, which is not supported; name it .tar.zst, "
                ".tar.gz or .tar, or give --compress."
            )
    if lowered.endswith((".tar", ".tar.none")):
        return "none"
    if lowered.endswith((".gz", ".tgz")):
        return "gzip"
    return "zstd"


class _Plain(io.RawIOBase):
    """Writes everything; closing it leaves `out` open.

    It writes through the file object, not the fd number: the garbage collector ends an abandoned stream when
    that number may already be another file's.
    """

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._is_file = stat.S_ISREG(os.fstat(out.fileno()).st_mode)
        self._at = self._begun = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data)
        while view:
            written = cast("int | None", self._out.write(view))
            if written is None:  # standard output may be a non-blocking pipe
                select.select([], [self._out], [])
            else:
                view = view[written:]
        self._at += len(data)
        if self._is_file and self._at - self._begun >= _WRITEBACK:
            # Keep the disk busy before the fsync at the end.
            with suppress(OSError):
                start_writeback(self._out.fileno(), self._begun, self._at - self._begun)
            self._begun = self._at
        return len(data)


def compressor(out: IO[bytes], kind: str) -> Sink:
    """A stream that compresses into `out` (unbuffered); `close` ends the stream but leaves `out` open."""
    if kind == "none":
        return _Plain(out)
    buffered = io.BufferedWriter(_Plain(out), _BUFFER)
    if kind == "gzip":
        # gzip's fastest level whose output is nearly as small as the default's.
        return cast(
            Sink, _Both(gzip.GzipFile(fileobj=buffered, mode="wb", compresslevel=4, mtime=0), buffered)
        )
    # start-up time: only archives need it
    import zstandard

    made = zstandard.ZstdCompressor(level=3, threads=os.cpu_count() or 1, write_checksum=True)
    return cast(Sink, _Both(made.stream_writer(buffered, closefd=False), buffered))


class WriteBehind:
    """Writes to a sink in a thread, so that reading continues; queues only a few pieces."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._queue: queue.Queue[bytes | None] = queue.Queue(maxsize=8)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="archive writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._sink.write(data)
                except BaseException as error:
                    self._error = error

    def write(self, data: bytes, /) -> int:
        """Raises the error of an earlier write."""
        if self._error is not None:
            raise self._error
        self._queue.put(data)
        return len(data)

    def close(self) -> None:
        """Wait until everything is written, and end the sink."""
        self.stop()
        if self._error is not None:
            raise self._error
        self._sink.close()

    def stop(self) -> None:
        """End the thread, dropping queued data."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()


class ReadAhead:
    """Reads a source in a thread, so that it is decompressed while its data is used; a few pieces ahead.

    An error of the source is raised where its data would be. Until the end of the `with` block the source is
    the thread's.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        # None: the thread has ended; before it come no data, at the end of the source, or its error.
        self._queue: queue.Queue[bytes | BaseException | None] = queue.Queue(maxsize=8)
        self._left = b""
        self._error: BaseException | None = None
        self._stopped = self._at_end = False
        self._thread = threading.Thread(target=self._run, name="archive reader", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped = True
        while self._queue.get() is not None:
            pass
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopped and (piece := self._source.read(_BUFFER)):
                self._queue.put(piece)
            self._queue.put(b"")
        except BaseException as error:
            self._queue.put(error)
        self._queue.put(None)

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end. Raises the source's errors."""
        if not self._left and not self._at_end:
            piece = self._queue.get()
            if isinstance(piece, BaseException):
                self._error = piece
            self._at_end = not isinstance(piece, bytes) or not piece
            if isinstance(piece, bytes):
                self._left = piece
        if self._error is not None:
            raise self._error
        data = self._left[:size]
        self._left = self._left[size:]
        return data

    def drain(self) -> None:
        """Read to the end."""
        while self.read(_BUFFER):
            pass


class _Both:
    def __init__(self, stream: Any, below: Any) -> None:
        self._stream = stream
        self._below = below

    def write(self, data: bytes, /) -> int:
        written: int = self._stream.write(data)
        return written

    def close(self) -> None:
        self._stream.close()
        self._below.close()


class _Gunzip:
    """The content of gzip's members, in large pieces: Python's GzipFile takes 8 KiB at a time."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._member: Any = None
        self._input = b""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end. Raises EOFError and zlib.error."""
        while True:
            if not self._input:
                self._input = self._source.read(_BUFFER)
            is_end = not self._input
            if self._member is None:
                # Behind the last member there may be zeros, as padding to a tape's block (gzip(1)).
                self._input = self._input.lstrip(b"\0")
                if self._input:
                    self._member = zlib.decompressobj(16 + zlib.MAX_WBITS)
                elif is_end:
                    return b""
                continue
            data: bytes = self._member.decompress(self._input, size)
            if self._member.eof:
                self._input, self._member = self._member.unused_data, None
            elif not data and is_end:
                raise EOFError("its end is missing")
            else:
                self._input = self._member.unconsumed_tail
            if data:
                return data


class _Checked:
    """Turns a decompressor's errors into Malformed."""

    def __init__(self, stream: Source, errors: tuple[type[Exception], ...]) -> None:
        self._stream = stream
        self._errors = errors

    def read(self, size: int, /) -> bytes:
        try:
            return self._stream.read(size)
        except self._errors as error:
            raise Damaged(f"its compressed data is damaged or cut off ({error})") from None


def decompressor(source: IO[bytes]) -> Source:
    buffered = io.BufferedReader(cast(io.RawIOBase, source), _BUFFER)
    start = buffered.peek(4)[:4]
    if start == _ZSTD:
        # start-up time: only archives need it
        import zstandard

        # A read returns no more than requested, so a bomb of zeros takes no memory.
        made = zstandard.ZstdDecompressor().stream_reader(buffered, read_across_frames=True, closefd=False)
        return _Checked(cast(Source, made), (zstandard.ZstdError,))
    if start[:2] == _GZIP:
        return _Checked(_Gunzip(buffered), (EOFError, zlib.error))
    return buffered
