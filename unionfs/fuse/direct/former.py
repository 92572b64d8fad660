"""What a former daemon of the mount had done, and how a request is recognised that it carried out before
it died.

A request that is sent again may have been carried out. Most change nothing more when that is repeated.
Of the others
the kernel sends only those that can succeed: it knows the names of a directory and holds its lock, so
only this request can have made, removed or moved the name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field

from unionfs.core.files import Handle
from unionfs.fuse.operations import Named, Operations
from unionfs.fuse.protocol import requests as rq
from unionfs.fuse.protocol.flags import UNIQUE_RESEND
from unionfs.sys import calls


@dataclass(frozen=True, slots=True)
class Former:
    """What it had open."""

    opened: Mapping[int, tuple[int, Handle]] = field(default_factory=dict)
    """Open files, with their numbers, by the request that opened them."""
    backing_ids: Set[int] = frozenset()
    """Of these."""
    kept_ids: Set[int] = frozenset()
    """Of files that were kept for the next open."""
    find: Callable[[int], tuple[int, Handle] | None] | None = None
    """Finds one that is not among `opened` yet."""

    def opened_by(self, unique: int) -> tuple[int, Handle] | None:
        """The file that was opened by a request, which is sent again now."""
        number = unique & ~UNIQUE_RESEND
        found = self.opened.get(number)
        return self.find(number) if found is None and self.find is not None else found


NO_FORMER = Former()


def made(operations: Operations, parent: int, name: bytes, kind: int) -> Named | None:
    """The object of that type (S_IFMT) that a request made; None if it did not."""
    found = operations.lookup(parent, name)
    return found if found is not None and found[0].kind == kind else None


def is_removed(operations: Operations, parent: int, name: bytes) -> bool:
    """Whether a name was removed."""
    return operations.lookup(parent, name) is None


def is_renamed(operations: Operations, request: rq.Rename | rq.Rename2) -> bool:
    """Whether a name was renamed or exchanged."""
    if isinstance(request, rq.Rename2) and request.flags & calls.RENAME_EXCHANGE:
        state = operations.union.state
        return state is not None and state.has_exchanged(request.unique)
    if operations.lookup(request.nodeid, request.name) is not None:
        return False
    return operations.lookup(request.newdir, request.newname) is not None
