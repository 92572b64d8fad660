"""Compressed streams: what is left of one that was not ended."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from unionfs.storage.archive.compress import KINDS, Sink, compressor


def _write_much(sink: Sink) -> None:
    """More than any compressor keeps back."""
    for _ in range(100):
        sink.write(os.urandom(1 << 20))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_is_given_up_writes_nothing_any_more(tmp_path: Path, kind: str) -> None:
    """Nor to another file, which has the number of the one that was closed: a database of ours, say."""
    # not through a with statement: the order in which things end is the point
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
