"""Requests for directory listings: READDIR, and READDIRPLUS, whose entries each count a lookup."""

from __future__ import annotations

import stat

from unionfs.core.entries import Entries
from unionfs.core.listings import Dirents, Lister
from unionfs.core.node import Node
from unionfs.fuse.direct.loop import Waiting
from unionfs.fuse.directories import DOT, DOT_DOT, NO_ENTRIES
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import Opcode, Reply, encode
from unionfs.fuse.protocol import requests as rq


class ListingRequests:
    """Handlers by opcode in `waiting`, which are coroutine functions."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        union = operations.union
        self._lister = Lister(union.nodes, union.merge, union.number_of_unreachable)
        self.waiting: dict[Opcode, Waiting] = {
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdirplus,
        }

    async def _readdir(self, request: rq.Readdir) -> Reply:
        node = self._operations.node(request.nodeid)
        answer = Dirents(request.size)
        entries, first = await self._start(node, request.offset, answer, plus=False)
        self._lister.add_names(node, entries, first, answer)
        if first == len(entries):
            self._operations.directories.end(node)
        return encode.data(request.unique, answer.packed())

    async def _readdirplus(self, request: rq.Readdirplus) -> Reply:
        node = self._operations.node(request.nodeid)
        answer = Dirents(request.size)
        entries, first = await self._start(node, request.offset, answer, plus=True)
        try:
            self._lister.add_nodes(node, entries, first, answer)
        except BaseException:
            for child in answer.nodes:
                self._operations.union.nodes.forget(child, 0)
            raise
        if first == len(entries):
            self._operations.directories.end(node)
        answer.sent()
        return encode.data(request.unique, answer.packed())

    async def _start(self, node: Node, offset: int, answer: Dirents, *, plus: bool) -> tuple[Entries, int]:
        """Add ``.`` and ``..`` if the offset is before them; returns the listing and the index of its first
        name."""
        if node.unlinked:
            return NO_ENTRIES, 0
        _add_dots(answer, node, offset, plus=plus)
        entries, first = await self._operations.directories.entries(node, offset)
        return (NO_ENTRIES, 0) if node.unlinked else (entries, first)


def _add_dots(answer: Dirents, node: Node, offset: int, *, plus: bool) -> None:
    for name, place, shown in ((b".", DOT, node), (b"..", DOT_DOT, node.parent or node)):
        if offset < place:
            answer.add(name, shown.ino, place, stat.S_IFDIR, plus=plus)
