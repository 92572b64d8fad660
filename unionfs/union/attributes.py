"""The result of stat(2) for an object of the union."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import cast


def replaced(st: os.stat_result, values: Mapping[int, int], **named: int) -> os.stat_result:
    """The same attributes with others at some indices of the tuple (stat.ST_MODE ...), and ``named`` ones."""
    _, (sequence, others) = cast("tuple[object, tuple[tuple[int, ...], dict[str, object]]]", st.__reduce__())
    return os.stat_result(
        [values.get(index, value) for index, value in enumerate(sequence)], {**others, **named}
    )


def with_blocks(st: os.stat_result, blocks: int) -> os.stat_result:
    """The same attributes with another ``st_blocks``."""
    return replaced(st, {}, st_blocks=blocks)


class Attributes:
    """The attributes of the real object, with inode number, link count and ctime of the merged tree."""

    __slots__ = ("ctime_ns", "ino", "lasting", "nlink", "st")

    def __init__(
        self, ino: int, nlink: int, st: os.stat_result, ctime_ns: int, *, lasting: bool
    ) -> None:
        self.ino = ino
        self.nlink = nlink
        self.st = st
        self.ctime_ns = ctime_ns
        #: Whether they stay valid until the daemon changes them.
        self.lasting = lasting
