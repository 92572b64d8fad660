"""What all changes of the merged tree share.

Each change becomes visible by one step: a system call in the upper, or one rename of what was prepared in
work. Order in every function: what can fail first, then that step, then the node table.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from unionfs.union.copyup import ensure_upper
from unionfs.union.nodes import Node
from unionfs.union.places import Place
from unionfs.union.tree import Union
from unionfs.union.work import At


def fail(code: int) -> OSError:
    """The ``OSError`` of an errno."""
    return OSError(code, os.strerror(code))


class Changing:
    """A kind of changes of one union. Not thread-safe, like the union itself."""

    def __init__(self, union: Union) -> None:
        self._union = union
        self._work = union.work

    def _writable(self, directory: Node) -> Place:
        """The upper's directory of a node that is about to change."""
        place = ensure_upper(self._union, directory)
        place.empty = False
        directory.ctime = None
        return place

    @contextmanager
    def _both_writable(self, one: Node, other: Node) -> Iterator[tuple[int, int]]:
        """Fds of the upper's directories of two nodes that are about to change, whatever the gate closes."""
        first, second = self._writable(one), self._writable(other)
        one.ctime = None  # it was set again if the other one is in it, and was copied up
        with self._directories(first, second) as fds:
            yield fds

    @contextmanager
    def _directories(self, one: Place, other: Place) -> Iterator[tuple[int, int]]:
        """Fds of two real directories, whatever the gate closes within the block."""
        gate = self._union.gate
        first = os.dup(gate.fd(one))
        try:
            second = os.dup(gate.fd(other))
            try:
                yield first, second
            finally:
                os.close(second)
        finally:
            os.close(first)

    def _existing(self, parent: Node, name: bytes) -> Node:
        """The node that is to lose that name. Raises ENOENT, and EBUSY for a place where storage is shown."""
        node = self._union.nodes.child(parent, name)
        if node is None or parent.identity is not None:
            found = self._union.lookup(parent, name)
            if found is None:
                raise fail(errno.ENOENT)
            node = found[0]
        if node.is_mountpoint:
            raise fail(errno.EBUSY)
        return node

    def _whiteout(self, at: At, directory: int) -> None:
        """Make a whiteout, that is or will be in the upper's directory with that fd."""
        union = self._union
        union.markers.make_whiteout(*at, (directory, union.require_upper().root_fd))
