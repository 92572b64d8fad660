"""Variants of the result of stat(2), and parts of a mode."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import Final, cast

SET_IDS: Final = stat.S_ISUID | stat.S_ISGID


def replaced(st: os.stat_result, values: Mapping[int, int], **named: int) -> os.stat_result:
    """The same attributes with others at some indices of the tuple (stat.ST_MODE ...), and ``named`` ones."""
    _, (sequence, others) = cast("tuple[object, tuple[tuple[int, ...], dict[str, object]]]", st.__reduce__())
    return os.stat_result(
        [values.get(index, value) for index, value in enumerate(sequence)], {**others, **named}
    )
