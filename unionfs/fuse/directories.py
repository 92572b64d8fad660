"""Listings for any number of readers, read in pieces while names come and go.

The cookie of a name depends only on the name: it is a hash, as in ext4's hashed directories. So a reader
continues after its last name whatever has changed, if necessary in a new listing: a name that exists all the
time appears exactly once, and an open directory needs no state. So the kernel can omit OPENDIR, and cache
listings.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from typing import Final, NamedTuple

import xxhash

from unionfs.fuse.inline import in_thread
from unionfs.union.node import Node

DOT: Final = 1
DOT_DOT: Final = 2
"""Cookies of ``.`` and ``..``."""

_KEPT_NAMES: Final = 200_000


class Entries(NamedTuple):
    """A listing in cookie order. Readers look each name up: some may not exist."""

    cookies: list[int]
    """For each name, the offset at which to continue after it."""
    names: list[bytes]
    parts: list[int]
    """The index of the topmost part of the directory that has the name, for `Union.lookup`; valid until the
    next request. Empty after that, and if it is 0 for all."""

    @property
    def shows_upper(self) -> bool:
        """Whether the upper has any of the names, in a directory whose first part is the upper's."""
        return bool(self.names) and (not self.parts or 0 in self.parts)

    def later(self) -> Entries:
        """The listing without the data that other requests invalidate."""
        return Entries(self.cookies, self.names, [])


NO_ENTRIES: Final = Entries([], [], [])


class Directories:
    """A cache of listings being read, limited by the number of names. Missing listings are recreated."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, Entries] = OrderedDict()
        self._names = 0

    def __len__(self) -> int:
        return len(self._kept)

    async def entries(self, node: Node, offset: int) -> tuple[Entries, int]:
        """The listing of a directory, and the index of its first name after ``offset``.

        Offset 0 creates a new listing. Raises ``OSError``.
        """
        found = None if offset == 0 else self._kept.get(node.id)
        if found is None:
            listing = node.territory.listing(node)
            if listing.large:
                try:
                    found = (await in_thread(lambda: _ordered(listing.candidates()))).later()
                finally:
                    listing.close()  # an interrupted request's thread may never have begun
            else:
                found = _ordered(listing.candidates())
            self.keep(node, found)
        return found, bisect_right(found[0], offset)

    def at_once(self, node: Node) -> Entries | None:
        """The listing of a directory, without caching it; None if it needs a thread. Raises ``OSError``."""
        listing = node.territory.listing(node)
        if listing.large:
            listing.close()
            return None
        return _ordered(listing.candidates())

    def end(self, node: Node) -> None:
        """A reader reached the end (the kernel requests once more after the last name)."""
        self._drop(node.id)

    def keep(self, node: Node, entries: Entries) -> None:
        """Cache a listing: a reader starts with it."""
        self._drop(node.id)
        self._kept[node.id] = entries.later()
        self._names += len(entries[0])
        while self._names > _KEPT_NAMES and len(self._kept) > 1:
            self._names -= len(self._kept.popitem(last=False)[1][0])

    def _drop(self, id_: int) -> None:
        entries = self._kept.pop(id_, None)
        if entries is not None:
            self._names -= len(entries[0])


def _ordered(names: dict[bytes, int]) -> Entries:
    hashed = xxhash.xxh3_64_intdigest
    pairs = sorted([(hashed(name) >> 2, name) for name in names])
    cookies = []
    last = DOT_DOT
    for cookie, _ in pairs:
        # Two names with the same hash: the second follows directly.
        last = cookie if cookie > last else last + 1
        cookies.append(last)
    ordered = [name for _, name in pairs]
    return Entries(cookies, ordered, [names[name] for name in ordered] if any(names.values()) else [])
