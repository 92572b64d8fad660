"""Listings that can be read in pieces, by any number of readers, while names come and go.

The place of a name in a listing is made of the name alone: a hash, as ext4 has it in its hashed directories.
So a reader goes on behind the last name it saw whatever has changed, in a listing made anew if need be: a
name that is there all the time comes exactly once, and nothing has to be kept for an open directory. That is
what lets the kernel leave OPENDIR out, and what lets it cache listings.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from typing import Final, NamedTuple

import xxhash

from unionfs.fuse.inline import in_thread
from unionfs.union.node import Node
from unionfs.union.tree import Union

DOT: Final = 1
DOT_DOT: Final = 2
"""Where reading goes on behind ``.`` and ``..``."""

_KEPT_NAMES: Final = 200_000


class Entries(NamedTuple):
    """A listing, in the order of its cookies. Who reads asks the union for each name: not all need exist."""

    cookies: list[int]
    """Each says where to go on behind its name."""
    names: list[bytes]
    parts: list[int]
    """Which is the topmost part of the directory that has the name; for `Union.lookup`, until there is time
    for another request. Then, and when it is the first for all, there are none."""

    @property
    def shows_upper(self) -> bool:
        """Of a directory whose first part is the upper's: whether that has any of the names."""
        return bool(self.names) and (not self.parts or 0 in self.parts)

    def later(self) -> Entries:
        """What is true of it after other requests, too."""
        return Entries(self.cookies, self.names, [])


NO_ENTRIES: Final = Entries([], [], [])


class Directories:
    """Listings being read. They are kept up to a number of names, and made again when they are missing."""

    def __init__(self, union: Union) -> None:
        self._union = union
        self._kept: OrderedDict[int, Entries] = OrderedDict()
        self._names = 0

    def __len__(self) -> int:
        return len(self._kept)

    async def entries(self, node: Node, offset: int) -> tuple[Entries, int]:
        """The listing of a directory, and the index of the first name behind ``offset`` in it.

        Offset 0 is the start, where the listing is made anew. Raises ``OSError``.
        """
        found = None if offset == 0 else self._kept.get(node.id)
        if found is None:
            listing = node.territory.listing(node)
            if listing.large:
                found = (await in_thread(lambda: _ordered(listing.candidates()))).later()
            else:
                found = _ordered(listing.candidates())
            self.keep(node, found)
        return found, bisect_right(found[0], offset)

    def at_once(self, node: Node) -> Entries | None:
        """The listing of a directory, which is not kept; None: it takes a thread. Raises ``OSError``."""
        listing = node.territory.listing(node)
        if listing.large:
            listing.close()
            return None
        return _ordered(listing.candidates())

    def end(self, node: Node) -> None:
        """A reader has seen that there is no more (the kernel asks once behind the last name)."""
        self._drop(node.id)

    def keep(self, node: Node, entries: Entries) -> None:
        """A reader begins with this listing."""
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
        # Two names with one hash: the second comes right behind.
        last = cookie if cookie > last else last + 1
        cookies.append(last)
    ordered = [name for _, name in pairs]
    return Entries(cookies, ordered, [names[name] for name in ordered] if any(names.values()) else [])
