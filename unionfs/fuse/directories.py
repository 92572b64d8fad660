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

from collections.abc import Callable
from typing import Final

from unionfs.core.directories import KeptListings
from unionfs.core.entries import Entries
from unionfs.core.node import Node
from unionfs.fuse.inline import in_thread
from unionfs.union.tickets import FIRST_TICKET, Tickets

DOT: Final = 1
DOT_DOT: Final = 2
"""Cookies of ``.`` and ``..``."""



class Directories(KeptListings):
    """The listings being read."""

    def __init__(self, hashed: Callable[[bytes], int] | None = None, *, names: int = 200_000) -> None:
        """``hashed``: another hash of names, for tests. ``names``: the maximum number of them."""
        super().__init__(names)
        self._hashed = hashed

    async def entries(self, node: Node, offset: int) -> tuple[Entries, int]:
        """The listing of a directory, and the index of its first name after ``offset``.

        Offset 0 creates a new listing. Raises ``OSError``; EINVAL for an offset that was not a cookie.
        """
        found = None if offset == 0 else self.kept(node.id)
        if found is None:
            found = await self._read(node)
            _add_tickets(node, found)
            self.keep(node.id, found)
        return found, _first_after(node, found, offset)

    async def _read(self, node: Node) -> Entries:
        listing = node.territory.listing(node)
        if not listing.large:
            return listing.entries(self._hashed)
        try:
            found = await in_thread(listing.entries, self._hashed)
        finally:
            listing.close()  # an interrupted request's thread may never have begun
        found.later()
        return found

    def end(self, node: Node) -> None:
        """A reader reached the end (the kernel requests once more after the last name)."""
        self.drop(node.id)


def _first_after(node: Node, entries: Entries, offset: int) -> int:
    """The index of the first name after ``offset``. Raises EINVAL."""
    if offset < FIRST_TICKET:
        return entries.first_after(offset)
    return entries.first_after(*_tickets(node).position(offset))


def _add_tickets(node: Node, entries: Entries) -> None:
    """Set tickets for all names with the hash of the next name."""
    same = entries.same()
    if same:
        tickets = _tickets(node)
        for index in same:
            entries.has_ticket(index, tickets.of(entries.name(index), entries.hash(index)))


def _tickets(node: Node) -> Tickets:
    use = node.in_use()
    tickets = use.tickets
    if tickets is None:
        tickets = Tickets()
        use.has_tickets(tickets)
    return tickets
