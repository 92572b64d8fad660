"""Where the data of a metacopy file lies."""

from __future__ import annotations

from typing import NamedTuple

from unionfs.core.places import Place


class LowerData(NamedTuple):
    """Where the data of a metacopy file lies."""

    place: Place
    """The real directory that contains it as ``name``."""
    name: bytes
    key: int
    """Its `Layer.key`."""
    blocks: int
    """Its ``st_blocks``, which the file shows."""
