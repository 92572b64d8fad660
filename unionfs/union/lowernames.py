"""Which lowers have a name, for directories that are merged from many of them.

Asking each layer for a name takes a system call a layer, and most names are in few of them, or in none: a
shell looks for a program in each directory of PATH, Python for a module in each of sys.path. So when names in
such a directory were looked up some times, its lowers are listed once. They do not change.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Final

from unionfs.union.listing import LARGE, real_names
from unionfs.union.places import Gate, Place

MANY: Final = 8
"""Lowers from which on listing them may be worth it."""
_ASKED: Final = 4
"""Lookups in a directory before its lowers are listed."""
_KEPT_NAMES: Final = 500_000
_KEPT_DIRECTORIES: Final = 4096


class _Names:
    """One directory's lowers: what each name is in, once they were listed."""

    __slots__ = ("asked", "having", "lowers")

    def __init__(self, lowers: list[Place]) -> None:
        self.lowers = lowers
        self.asked = 0
        #: None: not listed, or it can't or should not be done.
        self.having: dict[bytes, list[Place]] | None = None


class LowerNames:
    """Remembers the names in the lowers of some merged directories."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        #: By the lowest real directory, which belongs to one merged directory.
        self._kept: OrderedDict[Place, _Names] = OrderedDict()
        self._count = 0

    def parts(self, parts: list[Place], name: bytes) -> list[Place]:
        """Of a merged directory's parts those that may have ``name``: all in which it is are among them."""
        if len(parts) < MANY:
            return parts
        upper = parts[:1] if parts[0].layer.is_upper else []
        lowers = parts[len(upper) :]
        if len(lowers) < MANY:
            return parts
        names = self._kept.get(lowers[-1])
        if names is None or names.lowers != lowers:
            if names is not None:
                self._forget(lowers[-1])
            names = self._kept[lowers[-1]] = _Names(lowers)
            self._bound()
        self._kept.move_to_end(lowers[-1])
        if names.asked < _ASKED:
            names.asked += 1
            if names.asked == _ASKED:
                self._list(names)
        return parts if names.having is None else upper + names.having.get(name, [])

    def _forget(self, lowest: Place) -> None:
        self._count -= len(self._kept.pop(lowest).having or ())

    def _bound(self) -> None:
        """Forget what was not asked for the longest, when it is too much."""
        while len(self._kept) > 1 and (self._count > _KEPT_NAMES or len(self._kept) > _KEPT_DIRECTORIES):
            self._forget(next(iter(self._kept)))

    def _list(self, names: _Names) -> None:
        having: dict[bytes, list[Place]] = {}
        try:
            for place in names.lowers:
                fd = self._gate.open_for_listing(place)
                try:
                    if os.fstat(fd).st_size > LARGE:
                        return  # that would take long
                    for name in real_names(fd):
                        having.setdefault(name, []).append(place)
                finally:
                    os.close(fd)
        except OSError:
            return  # one that may be searched but not read, say
        names.having = having
        self._count += len(having)
        self._bound()
