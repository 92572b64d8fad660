"""Compressed streams: members of gzip, damaged ones, reading ahead, and the result of an abandoned one."""

from __future__ import annotations

import gc
import gzip
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from unionfs.storage.archive.compress import KINDS, ReadAhead, Sink, compressor, decompressor
from unionfs.storage.archive.headers import Malformed


def _write_much(sink: Sink) -> None:
    """More than any compressor buffers."""
    for _ in range(100):
        sink.write(os.urandom(1 << 20))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_is_given_up_writes_nothing_any_more(tmp_path: Path, kind: str) -> None:
    """Not even to another file with the number of the closed one, such as our database."""
    # without a with statement: the order of the ends matters
    out = open(tmp_path / "archive", "wb", buffering=0)  # noqa: SIM115
    sink = compressor(out, kind)
    sink.write(os.urandom(100_000))
    number = out.fileno()
    out.close()
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    try:
        assert other == number
        with pytest.raises(ValueError, match="closed"):
            _write_much(sink)
        del sink
        gc.collect()
        assert os.fstat(other).st_size == 0
    finally:
        os.close(other)


CONTENT = os.urandom(300_000) + bytes(5_000_000) + b"x" * 70_000
GZIPPED = gzip.compress(CONTENT, 1)
MEMBERS = {
    "one": (GZIPPED, CONTENT),
    "two": (GZIPPED + gzip.compress(b"more"), CONTENT + b"more"),
    "padded": (GZIPPED + bytes(9000), CONTENT),
    "empty": (gzip.compress(b""), b""),
    "empty, then one": (gzip.compress(b"") + GZIPPED, CONTENT),
}


def _pieces(blob: bytes, size: int) -> Iterator[bytes]:
    source = decompressor(io.BytesIO(blob))
    while data := source.read(size):
        assert len(data) <= size
        yield data


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("size", [4096, 777_777, 8 << 20])
def test_members_of_gzip(name: str, size: int) -> None:
    blob, content = MEMBERS[name]
    assert gzip.decompress(blob) == content
    assert b"".join(_pieces(blob, size)) == content
    with ReadAhead(decompressor(io.BytesIO(blob))) as ahead:
        found = b""
        while data := ahead.read(size):
            assert len(data) <= size
            found += data
        assert found == content
        assert ahead.read(size) == b""


@pytest.mark.parametrize(
    "blob",
    [
        GZIPPED[:-1], GZIPPED[:-9], GZIPPED[:50], GZIPPED + b"junk", GZIPPED[:-6] + b"wrong!",
        GZIPPED[:5000] + b"\xff" * 10 + GZIPPED[5010:],
    ],
    ids=["length cut", "end cut", "beginning", "something behind", "sum", "data"],
)  # fmt: skip
def test_damaged_gzip_is_refused(blob: bytes) -> None:
    with pytest.raises(Malformed, match="damaged or cut off"):
        list(_pieces(blob, 1 << 20))


def test_errors_come_after_the_data_before_them() -> None:
    blob = GZIPPED[:-1]
    found = b""
    with ReadAhead(decompressor(io.BytesIO(blob))) as ahead:
        while len(found) < len(CONTENT):
            found += ahead.read(100_000)
        for _ in range(2):
            with pytest.raises(Malformed):
                ahead.read(1)
    assert found == CONTENT


def test_a_source_of_which_little_is_read_is_not_read_to_its_end() -> None:
    """The thread ends with the block, also while it waits to go on."""
    blob = io.BytesIO(bytes(100 << 20))
    with ReadAhead(blob) as ahead:
        assert ahead.read(5) == bytes(5)
    assert blob.tell() < 30 << 20
