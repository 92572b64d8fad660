"""Listings for any number of readers, read in pieces while names come and go.

Names are listed in the order of their hashes, as in ext4's hashed directories, and names with the same hash
in their own order. So a reader continues after its last name whatever has changed, if necessary in a new
listing: a name that exists all the time appears exactly once, and an open directory needs no state. So the
kernel can omit OPENDIR, and cache listings.

A cookie has at most 31 bits, because 32-bit programs take no more (telldir(3) returns a long, and readdir(3)
without large file support fails with EOVERFLOW), and a request does not say who reads. The cookie of a name
is its hash if it is the last name with that hash. Otherwise it is a ticket: a number that stands for this
name, remembered until the node is forgotten. Among 100,000 names two or three have tickets.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from itertools import pairwise
from typing import Final, NamedTuple

import xxhash

from unionfs.core.node import Node
from unionfs.fuse.inline import in_thread
from unionfs.union.tickets import FIRST_TICKET, Tickets

DOT: Final = 1
DOT_DOT: Final = 2
"""Cookies of ``.`` and ``..``."""

_KEPT_NAMES: Final = 200_000
_FIRST_HASH: Final = DOT_DOT + 1
_HASHES: Final = FIRST_TICKET - _FIRST_HASH


class Entries(NamedTuple):
    """A listing in order. Readers look each name up: some may not exist."""

    cookies: list[int]
    """For each name, the offset at which to continue after it."""
    names: list[bytes]
    parts: list[int]
    """The index of the topmost part of the directory that has the name, for `Union.lookup`; valid until the
    next request. Empty after that, and if it is 0 for all."""
    hashes: list[int]
    """For each name, its hash; the same list as the cookies if no two are equal."""

    @property
    def shows_upper(self) -> bool:
        """Whether the upper has any of the names, in a directory whose first part is the upper's."""
        return bool(self.names) and (not self.parts or 0 in self.parts)

    def later(self) -> Entries:
        """The listing without the data that other requests invalidate."""
        return Entries(self.cookies, self.names, [], self.hashes)


NO_ENTRIES: Final = Entries([], [], [], [])


class Directories:
    """A cache of listings being read, limited by the number of names. Missing listings are recreated."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, Entries] = OrderedDict()
        self._names = 0

    def __len__(self) -> int:
        return len(self._kept)

    async def entries(self, node: Node, offset: int) -> tuple[Entries, int]:
        """The listing of a directory, and the index of its first name after ``offset``.

        Offset 0 creates a new listing. Raises ``OSError``; EINVAL for an offset that was no cookie.
        """
        found = None if offset == 0 else self._kept.get(node.id)
        if found is None:
            listing = node.territory.listing(node)
            if listing.large:
                try:
                    ordered = (await in_thread(lambda: _ordered(listing.candidates()))).later()
                finally:
                    listing.close()  # an interrupted request's thread may never have begun
            else:
                ordered = _ordered(listing.candidates())
            found = _with_tickets(node, ordered)
            self.keep(node, found)
        return found, _first_after(node, found, offset)

    def at_once(self, node: Node) -> Entries | None:
        """The listing of a directory, without caching it; None if it needs a thread. Raises ``OSError``."""
        listing = node.territory.listing(node)
        if listing.large:
            listing.close()
            return None
        return _with_tickets(node, _ordered(listing.candidates()))

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

    def forget(self, id_: int) -> None:
        """Drop the listing of the directory with that node id, if there is one."""
        self._drop(id_)

    def _drop(self, id_: int) -> None:
        entries = self._kept.pop(id_, None)
        if entries is not None:
            self._names -= len(entries[0])


def _first_after(node: Node, entries: Entries, offset: int) -> int:
    """The index of the first name after ``offset``. Raises EINVAL."""
    if offset < FIRST_TICKET:
        return bisect_right(entries.hashes, offset)
    hash_, name = _tickets(node).position(offset)
    first, end = bisect_left(entries.hashes, hash_), bisect_right(entries.hashes, hash_)
    return bisect_right(entries.names, name, first, end)


def _ordered(names: dict[bytes, int]) -> Entries:
    """The listing without its tickets; with a list of cookies if it needs some."""
    hashed = xxhash.xxh3_64_intdigest
    pairs = sorted([(hashed(name) % _HASHES + _FIRST_HASH, name) for name in names])
    hashes = [hash_ for hash_, _ in pairs]
    ordered = [name for _, name in pairs]
    cookies = hashes if len(set(hashes)) == len(hashes) else hashes.copy()
    return Entries(cookies, ordered, [names[name] for name in ordered] if any(names.values()) else [], hashes)


def _with_tickets(node: Node, entries: Entries) -> Entries:
    """The listing with tickets for all names with the hash of the next name."""
    cookies, hashes = entries.cookies, entries.hashes
    if cookies is hashes:
        return entries
    tickets = _tickets(node)
    for index, (hash_, following) in enumerate(pairwise(hashes)):
        if hash_ == following:
            cookies[index] = tickets.of(entries.names[index], hash_)
    return entries


def _tickets(node: Node) -> Tickets:
    use = node.in_use()
    tickets = use.tickets
    if tickets is None:
        tickets = Tickets()
        use.has_tickets(tickets)
    return tickets
