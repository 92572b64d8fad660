"""What stat(2) says of an object of the union."""

from __future__ import annotations

import os


class Attributes:
    """The attributes of the real object, but number, link count and ctime of the merged tree."""

    __slots__ = ("ctime_ns", "ino", "lasting", "nlink", "st")

    def __init__(
        self, ino: int, nlink: int, st: os.stat_result, ctime_ns: int, *, lasting: bool = True
    ) -> None:
        self.ino = ino
        self.nlink = nlink
        self.st = st
        self.ctime_ns = ctime_ns
        #: Whether they stay true until the daemon is asked to change them.
        self.lasting = lasting
