"""Which lowers have a name, for directories that are merged from many of them.

A lookup costs a system call per layer, and most names are in few layers or none: a shell searches every
directory of PATH, Python every one of sys.path. So after a few lookups in such a directory its lowers, which
do not change, are listed once.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from unionfs.core.places import Gate, Place
from unionfs.core.search import PREFIX
from unionfs.sys.fds import Owned
from unionfs.union.listing import LARGE, real_names
from unionfs.union.named import hidden_name

MANY: Final = 8
"""The minimum number of lowers to list."""
_ASKED: Final = 4
"""Lookups in a directory before its lowers are listed."""
_KEPT_NAMES: Final = 500_000
_KEPT_DIRECTORIES: Final = 4096


class _Names:
    """The lowers of one directory, and which of them have a name."""

    __slots__ = ("asked", "having", "lowers")

    def __init__(self, lowers: list[Place]) -> None:
        self.lowers = lowers
        self.asked = 0
        #: None: not listed yet, or cannot be listed.
        self.having: dict[bytes, list[Place]] | None = None


class LowerNames:
    """Remembers the names in the lowers of some merged directories."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        #: The minimum number of lowers to list.
        self.many = MANY
        #: By the lowest real directory, which is part of only one merged directory.
        self._kept: OrderedDict[Place, _Names] = OrderedDict()
        self._count = 0

    def parts(self, parts: list[Place], name: bytes) -> list[Place]:
        """The parts of a merged directory that may have ``name``."""
        if len(parts) < self.many:
            return parts
        upper = parts[:1] if parts[0].layer.is_upper else []
        lowers = parts[len(upper) :]
        if len(lowers) < self.many:
            return parts
        names = self._kept.get(lowers[-1])
        if names is None or names.lowers != lowers:
            if names is not None:
                self._forget(lowers[-1])
            names = self._kept[lowers[-1]] = _Names(lowers)
            self._limit()
        self._kept.move_to_end(lowers[-1])
        if names.asked < _ASKED:
            names.asked += 1
            if names.asked == _ASKED:
                self._list(names)
        return parts if names.having is None else upper + names.having.get(name, [])

    def forget(self, parts: Sequence[Place]) -> None:
        """Forget the names in a merged directory: its lowers have changed."""
        if parts and parts[-1] in self._kept:
            self._forget(parts[-1])

    def clear(self) -> None:
        """Forget everything: the lowers have changed."""
        self._kept.clear()
        self._count = 0

    def _forget(self, lowest: Place) -> None:
        self._count -= len(self._kept.pop(lowest).having or ())

    def _limit(self) -> None:
        """Forget the least recently used directories if there are too many names."""
        while len(self._kept) > 1 and (self._count > _KEPT_NAMES or len(self._kept) > _KEPT_DIRECTORIES):
            self._forget(next(iter(self._kept)))

    def _list(self, names: _Names) -> None:
        having: dict[bytes, list[Place]] = {}
        try:
            for place in names.lowers:
                with Owned(self._gate.open_for_listing(place)) as fd:
                    if os.fstat(fd).st_size > LARGE:
                        return  # listing it takes too long
                    some = False
                    for name in real_names(fd):
                        if name.startswith(PREFIX):
                            some = True
                            hidden = hidden_name(name)
                            if hidden is None:
                                continue
                            name = hidden
                        places = having.setdefault(name, [])
                        if not places or places[-1] is not place:
                            places.append(place)
                    place.knows_named(some=some)
        except OSError:
            return  # for example a directory with search but no read permission
        names.having = having
        self._count += len(having)
        self._limit()
