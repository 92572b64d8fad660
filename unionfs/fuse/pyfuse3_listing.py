"""The answer to READDIRPLUS in the session of pyfuse3."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from typing import Final

import pyfuse3

from unionfs.core.entries import Entries
from unionfs.core.memo import Wanted
from unionfs.core.node import Node
from unionfs.fuse.directories import DOT, DOT_DOT
from unionfs.fuse.operations import Named, Operations
from unionfs.fuse.pyfuse3_replies import bare, named

#: At most so many names fit into the answer to one READDIRPLUS of 4096 bytes.
_AHEAD: Final = 26


def send_names(
    operations: Operations, node: Node, entries: Entries, first: int, start_id: int,
    token: pyfuse3.ReaddirToken,
) -> None:  # fmt: skip
    """Add names of a directory to an answer until it is full: entries from the index ``first``, which has the
    cookie after ``start_id``. Raises what `union.lookup` raises, but ``OSError``."""
    if operations.asides.needed:
        _look_up_at_once(operations, node, map(entries.name, range(first, len(entries))[:_AHEAD]))
    empty = True
    for name, shown, place in ((b".", node, DOT), (b"..", node.parent or node, DOT_DOT)):
        dot = bare(shown.id, stat.S_IFDIR)
        if start_id < place:
            empty = False
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), dot, place):
                return
    for index in range(first, len(entries)):
        if node.unlinked:
            return
        name, cookie = pyfuse3.FileNameT(entries.name(index)), entries.cookie(index)
        try:
            found, unknown = _look_up(operations, node, name)
        except Wanted:
            if empty:  # an answer without names would be the end
                names = map(entries.name, range(index, len(entries))[:_AHEAD])
                _look_up_at_once(operations, node, names)
            return  # the next request begins here
        if unknown is not None:
            empty = False
            if not pyfuse3.readdir_reply(token, name, bare(*unknown), cookie):
                return
        if found is None:
            continue
        child, empty = found[0], False
        if not pyfuse3.readdir_reply(token, name, named(found), cookie):
            operations.union.nodes.forget(child, 0)
            return
        child.looked_up()
    if first == len(entries):
        operations.directories.end(node)


def _look_up(operations: Operations, node: Node, name: bytes) -> tuple[Named | None, tuple[int, int] | None]:
    """What a name of a listing is, or else its number and type, if it is listed."""
    try:
        found = operations.union.lookup(node, name)
    except OSError:
        return None, operations.union.number_of_unreachable(node, name)
    return found, None if found else node.territory.number_of_bare_whiteout(node, name)


def _look_up_at_once(operations: Operations, node: Node, names: Iterable[bytes]) -> None:
    """Raise `Wanted` if a name needs calls on slow layers, which are then wanted for all of them."""
    wants = False
    for name in names:
        try:
            found, _ = _look_up(operations, node, name)
        except Wanted:
            wants = True
            continue
        if found is not None:
            operations.union.nodes.forget(found[0], 0)
    if wants:
        raise Wanted
