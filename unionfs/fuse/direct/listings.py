"""Requests for directory listings: READDIR, and READDIRPLUS, whose entries each count a lookup.

Those of quickly read directories are answered by the same compiled code without Python; see `core.listings`.
"""

from __future__ import annotations

from functools import partial

from unionfs.core.listings import Dirents, Lister
from unionfs.fuse.direct.loop import Waiting
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import Opcode, Reply, encode
from unionfs.fuse.protocol import requests as rq


class ListingRequests:
    """Handlers by opcode in `waiting`, which are coroutine functions."""

    def __init__(self, operations: Operations, lister: Lister) -> None:
        self._operations = operations
        self._lister = lister
        self.waiting: dict[Opcode, Waiting] = {
            Opcode.READDIR: partial(self._list, plus=False),
            Opcode.READDIRPLUS: partial(self._list, plus=True),
        }

    async def _list(self, request: rq.Readdir, *, plus: bool) -> Reply:
        node = self._operations.node(request.nodeid)
        answer = Dirents(request.size)
        if not node.unlinked:
            entries, first = await self._operations.directories.entries(node, request.offset)
            if not node.unlinked:
                answer.add_dots(node, request.offset, plus)
                self._lister.add(node, entries, first, answer, plus)
            if first == len(entries) or not answer.size:
                self._operations.directories.end(node)
        answer.sent(request.unique)
        return encode.data(request.unique, answer.packed())
