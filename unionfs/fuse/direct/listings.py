"""Requests for directory listings: READDIR, and READDIRPLUS, whose entries each count a lookup."""

from __future__ import annotations

import stat
from collections.abc import Iterator

from unionfs.core.node import Node
from unionfs.fuse.direct.ahead import Ahead, Prepared, Unfit
from unionfs.fuse.direct.loop import Waiting
from unionfs.fuse.direct.nodeio import NodeIos
from unionfs.fuse.directories import DOT, DOT_DOT, NO_ENTRIES, Entries
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import FOREVER, NEVER, Dirents, Opcode, Reply, encode
from unionfs.fuse.protocol import requests as rq


class ListingRequests:
    """Handlers by opcode in `waiting`, which are coroutine functions."""

    def __init__(self, operations: Operations, ios: NodeIos) -> None:
        self._operations = operations
        self._union = operations.union
        self._ios = ios
        self.ahead = Ahead(operations, self._prepare)
        self.waiting: dict[Opcode, Waiting] = {
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdirplus,
        }

    async def _readdir(self, request: rq.Readdir) -> Reply:
        node = self._operations.node(request.nodeid)
        listing = Dirents(request.size)
        (cookies, names, *_), first = await self._start(node, request.offset, listing, plus=False)
        for index in range(first, len(names)):
            try:
                known = node.territory.number(node, names[index])
            except OSError:
                known = self._union.number_of_unreachable(node, names[index])
            else:
                known = known or node.territory.number_of_bare_whiteout(node, names[index])
            if known is not None and not listing.add(names[index], known[0], cookies[index], known[1]):
                break
        if first == len(names):
            self._operations.directories.end(node)
        return encode.data(request.unique, listing.packed())

    async def _readdirplus(self, request: rq.Readdirplus) -> Reply:
        node = self._operations.node(request.nodeid)
        prepared = self.ahead.take(node, request.size) if request.offset == 0 else None
        if prepared is not None:
            listing, nodes = prepared.listing, prepared.nodes
            self._operations.directories.keep(node, prepared.entries)
        else:
            listing = Dirents(request.size)
            entries, first = await self._start(node, request.offset, listing, plus=True)
            nodes = []
            try:
                nodes.extend(self._found(node, entries, first, listing))
            except BaseException:
                self.ahead.let_go(nodes)
                raise
            if first == len(entries.names):
                self._operations.directories.end(node)
        for child in nodes:
            child.looked_up()
        if request.offset == 0:
            self.ahead.listed(node, [child for child in nodes if child.is_dir], request.size)
        return encode.data(request.unique, listing.packed())

    def _prepare(self, prepared: Prepared) -> Iterator[None]:
        node = prepared.node
        yield
        entries = self._operations.directories.at_once(node)
        if entries is None:
            raise Unfit("it is large, so a thread reads it on request")
        if node.in_place and (node.is_pure_upper or entries.shows_upper):
            raise Unfit("it shows names of the upper, which can vanish without a trace")
        entries = entries.later()
        prepared.begin(entries)
        _add_dots(prepared.listing, node, 0, plus=True)
        for child in self._found(node, entries, 0, prepared.listing, ahead=True):
            prepared.nodes.append(child)
            if not child.territory.lasting:
                raise Unfit("bound storage may change at any time")
            if child.entry is not None:
                raise Unfit("it can be changed by another name, elsewhere")
            yield

    def _found(
        self, node: Node, entries: Entries, first: int, listing: Dirents, *, ahead: bool = False
    ) -> Iterator[Node]:
        """Add names from the index ``first`` while they fit; yields the node of each."""
        lookup, valid = node.territory.lookup, self._ios.valid
        cookies, names, parts, _ = entries
        for index in range(first, len(names)):
            name = names[index]
            if not listing.fits_plus(name):
                return
            try:
                found = lookup(node, name, parts[index] if parts else 0)
            except OSError:
                if ahead:
                    raise
                unknown = self._union.number_of_unreachable(node, name)
                self._add_unknown(listing, name, cookies[index], unknown)
                continue
            if found is None:
                unknown = node.territory.number_of_bare_whiteout(node, name)
                self._add_unknown(listing, name, cookies[index], unknown)
                continue
            child, attributes = found
            listing.add_found(
                name,
                cookies[index],
                child.id,
                child.generation,
                FOREVER if child.territory.lasting else NEVER,
                valid(child, attributes),
                encode.attribute_values(
                    attributes.st, attributes.ino, attributes.nlink, attributes.ctime_ns
                ),
            )
            yield child

    @staticmethod
    def _add_unknown(listing: Dirents, name: bytes, cookie: int, known: tuple[int, int] | None) -> None:
        """Add a name whose lookup fails. It counts no lookup; the next request for it reports the error."""
        if known is not None:
            listing.add_plus(name, known[0], cookie, known[1], encode.NO_ENTRY)

    async def _start(self, node: Node, offset: int, listing: Dirents, *, plus: bool) -> tuple[Entries, int]:
        """Add ``.`` and ``..`` if the offset is before them; returns the listing and the index of its first
        name."""
        if node.unlinked:
            return NO_ENTRIES, 0
        _add_dots(listing, node, offset, plus=plus)
        entries, first = await self._operations.directories.entries(node, offset)
        return (NO_ENTRIES, 0) if node.unlinked else (entries, first)


def _add_dots(listing: Dirents, node: Node, offset: int, *, plus: bool) -> None:
    for name, place, shown in ((b".", DOT, node), (b"..", DOT_DOT, node.parent or node)):
        if offset < place:
            if plus:
                listing.add_plus(name, shown.ino, place, stat.S_IFDIR, encode.NO_ENTRY)
            else:
                listing.add(name, shown.ino, place, stat.S_IFDIR)
