"""Prepares the next listing while the daemon is idle.

A process that walks a tree (find, du, grep -r, git status) lists directories in a predictable order: the
first one below the one just listed, else the next one beside or above it. While it processes one listing, the
daemon prepares the next; when the request arrives, the answer only needs to be sent.

Rules:
- Only for a walker: the last guesses were right.
- Only for directories that show only lowers: those without a part in the upper. Every change to a name of a
  lower there, or to an object, leaves an entry in such a part; so before the answer, there must still be no
  such part, or an empty one (chmod -R and chown -R copy each directory up, then list it).
- In small steps: a request that arrives during the work waits for one step. So a fact from one step may be
  wrong in the next.
- The kernel does not know of prepared nodes. The directory stays in the node table until then (one of its
  lookups is the daemon's). Nodes made for the listing have no lookups until the answer is sent, and are
  dropped if it is unused. It is unused if known nodes are forgotten or superseded in between or, with access
  times, read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Final

from unionfs.core.entries import Entries
from unionfs.core.listings import Dirents
from unionfs.core.node import Node
from unionfs.fuse.directories import NO_ENTRIES
from unionfs.fuse.operations import Operations

log = logging.getLogger(__name__)

_SURE: Final = 2
"""The number of consecutive right guesses that identifies a walker."""
_IN_VAIN: Final = -16
"""The count of right guesses after a prepared listing could not be used."""
_LEFT_OUT: Final = 64
"""A process that skips more directories at once counts as another walker."""
_WALK: Final = 10_000
"""The maximum number of upcoming directories to remember."""


class Unfit(Exception):
    """The directory's listing cannot be prepared."""


class Prepared:
    """The first part of a listing, prepared before its request."""

    def __init__(self, node: Node, size: int) -> None:
        self.node = node
        #: Its number is in the listing, as `..`.
        self.parent = node.parent
        self.listing = Dirents(size)
        self.entries = NO_ENTRIES
        #: The names in it, one after the other.

    @property
    def nodes(self) -> list[Node]:
        return self.listing.nodes

    def begin(self, entries: Entries) -> None:
        """Set the names of the directory."""
        self.entries = entries


class Ahead:
    """Predicts the next directory to be listed, and prepares its listing, one at a time."""

    def __init__(
        self, operations: Operations, prepare: Callable[[Prepared], Iterator[None]]
    ) -> None:
        """``prepare`` starts preparing a listing; each step does a part. It may raise `Unfit`."""
        self._operations = operations
        self._enabled = operations.union.shortcuts.ahead
        self._prepare = prepare
        self._prepared: Prepared | None = None
        self._work: Iterator[None] | None = None
        #: Upcoming directories, the next one last.
        self._walk: list[Node] = []
        self._right = 0
        #: Listings started, and listings used.
        self.begun = 0
        self.used = 0

    def listed(self, node: Node, below: list[Node], size: int) -> None:
        """A listing was read from its start; ``below``: the directories in it, in listing order.

        ``size``: the size limit of the answer, in bytes.
        """
        walk = self._walk
        if walk and walk[-1] is node:
            walk.pop()
            self._right += 1
        else:
            self._right = min(self._right, 0)
            self._leave_out(node)
        if len(walk) + len(below) > _WALK:
            walk.clear()
        walk.extend(reversed(below))
        self.drop()
        if self._enabled and self._right >= _SURE and walk and _is_fit(walk[-1]):
            walk[-1].looked_up()
            self._prepared = Prepared(walk[-1], size)
            self._work = self._prepare(self._prepared)
            self.begun += 1

    def _leave_out(self, node: Node) -> None:
        """Drop the directories expected before ``node``, which the walker skipped."""
        walk = self._walk
        for back in range(1, min(len(walk), _LEFT_OUT) + 1):
            if walk[-back] is node:
                del walk[-back:]
                return
        walk.clear()

    def step(self) -> bool:
        """Do a small part of the work; returns False if there is none."""
        if self._work is None:
            return False
        try:
            next(self._work)
        except StopIteration:
            self._work = None
        except (OSError, Unfit):  # the request for the listing reports the error
            self.drop()
        except Exception:
            log.exception("a listing could not be prepared")
            self.drop()
        return True

    def take(self, node: Node, size: int) -> Prepared | None:
        """The prepared listing of a directory for an answer of ``size`` bytes, or None."""
        if self._prepared is None or self._prepared.node is not node:
            return None
        prepared = self._finished()
        if prepared is None:  # the preparation failed
            return None
        if prepared.listing.size > size or not self._holds(prepared):
            self._right = _IN_VAIN
            self.drop()
            return None
        self.used += 1
        self._prepared = None
        self._operations.forget(node.id, 1)
        return prepared

    def _finished(self) -> Prepared | None:
        while self.step():
            pass
        return self._prepared

    def _holds(self, prepared: Prepared) -> bool:
        """Whether the prepared listing is still current. Raises ``OSError``."""
        node = prepared.node
        if node.unlinked or node.parent is not prepared.parent:
            return False
        if not self._operations.union.merge.shows_only_lowers(node.parts):
            return False
        kept = all(part.layer.atime_stays for part in node.parts)
        return all(self._is_current(child) and (kept or not child.lookups) for child in prepared.nodes)

    def _is_current(self, node: Node) -> bool:
        return self._operations.union.nodes.named(node.id) is node and node.successor is None

    def drop(self) -> None:
        """Drop the prepared listing."""
        self._work = None
        if self._prepared is not None:
            prepared, self._prepared = self._prepared, None
            self.let_go(prepared.nodes)
            self._operations.forget(prepared.node.id, 1)

    def let_go(self, nodes: list[Node]) -> None:
        """Drop nodes that were looked up without the kernel's knowledge."""
        for node in nodes:
            if self._is_current(node):
                self._operations.forget(node.id, 0)


def _is_fit(node: Node) -> bool:
    """Whether a listing can be prepared: see the rules above."""
    return node.lookups > 0 and not node.in_place and not node.unlinked
