"""Sizes as people write them, and how they are shown."""

from __future__ import annotations

import re

from unionfs.daemon.errors import UserError, quoted

_UNITS = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([bkmgtp]?)(?:i?b)?", re.IGNORECASE)


def parse_size(text: str, what: str = "size") -> int:
    """`100m`, `1.5G`, `4096` as bytes; the units are powers of 1024, as Docker's go-units RAMInBytes takes
    them.

    Raises UserError.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UserError(f"{what}={quoted(text)} is no size; write a number and b, k, m, g or t, as 100m.")
    value = int(float(found[1]) * 1024 ** _UNITS[found[2].lower()])
    if not 0 < value < 1 << 60:
        raise UserError(f"{what}={quoted(text)} is no size that a volume can have; write one such as 100m.")
    return value


def shown_size(size: float) -> str:
    """Bytes as Docker shows them (go-units HumanSize): four digits, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.4g}{unit}"
        size /= 1000
    return f"{size:.4g}PB"
