"""Listings that can be read in pieces, by any number of readers, while names come and go.

The place of a name in a listing is made of the name alone: a hash, as ext4 has it in its hashed directories.
So a reader goes on behind the last name it saw whatever has changed, in a listing made anew if need be: a
name that is there all the time comes exactly once, and nothing has to be kept for an open directory. That is
what lets the kernel leave OPENDIR out, and what lets it cache listings.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from typing import Final

import xxhash

from unionfs.fuse.inline import in_thread
from unionfs.union.listing import Listing
from unionfs.union.nodes import Node
from unionfs.union.tree import Union

DOT: Final = 1
DOT_DOT: Final = 2
"""Where reading goes on behind ``.`` and ``..``."""

_KEPT_NAMES: Final = 200_000
Entries = tuple[list[int], list[bytes]]
"""Cookies in ascending order, each of which says where to go on behind its name; and the names."""


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
            listing = Listing(self._union, node)
            if listing.large:
                found = await in_thread(lambda: _ordered(listing.names()))
            else:
                found = _ordered(listing.names())
            self._keep(node.id, found)
        return found, bisect_right(found[0], offset)

    def end(self, node: Node) -> None:
        """A reader has seen that there is no more (the kernel asks once behind the last name)."""
        self._drop(node.id)

    def _keep(self, id_: int, entries: Entries) -> None:
        self._drop(id_)
        self._kept[id_] = entries
        self._names += len(entries[0])
        while self._names > _KEPT_NAMES and len(self._kept) > 1:
            self._names -= len(self._kept.popitem(last=False)[1][0])

    def _drop(self, id_: int) -> None:
        entries = self._kept.pop(id_, None)
        if entries is not None:
            self._names -= len(entries[0])


def _ordered(names: list[bytes]) -> Entries:
    hashed = xxhash.xxh3_64_intdigest
    pairs = sorted([(hashed(name) >> 2, name) for name in names])
    cookies = []
    last = DOT_DOT
    for cookie, _ in pairs:
        # Two names with one hash: the second comes right behind.
        last = cookie if cookie > last else last + 1
        cookies.append(last)
    return cookies, [name for _, name in pairs]
