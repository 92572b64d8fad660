"""The storage drivers of containers, by docker's names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Final

from unionfs.errors import UserError, quoted

STORAGE_DRIVERS: Final = ("union", "overlay2", "btrfs", "zfs", "devicemapper", "vfs")
DEFAULT: Final = "union"


def nearest(word: str, known: Sequence[str]) -> str:
    """The cure for an unknown word: the nearest known one, or all of them."""
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]}?" if close else f"the known ones are {', '.join(known)}."


def parse_storage_driver(text: str) -> str:
    """Return the name itself. Raises UserError for an unknown one."""
    if text not in STORAGE_DRIVERS:
        raise UserError(f"unknown storage driver {quoted(text)}; {nearest(text, STORAGE_DRIVERS)}")
    return text
