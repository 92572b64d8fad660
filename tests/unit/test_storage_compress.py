"""Compressed streams: the result of an abandoned one."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from unionfs.storage.archive.compress import KINDS, Sink, compressor


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
