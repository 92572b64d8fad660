"""The changes of the merged layers, on disk and in the node table.

Each change becomes visible by one step: a system call in the upper, or one rename of what was prepared in
work. Order in every function: what can fail first, then that step, then the node table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from unionfs.sys.fds import Owned
from unionfs.union.attributes import Attributes
from unionfs.union.copyup import CopyUp
from unionfs.union.node import Node
from unionfs.union.places import Place
from unionfs.union.tree import Union
from unionfs.union.work import At

T = TypeVar("T")
Name = tuple[Node, bytes]
"""A name: the node of its directory, and the name in that."""


class Steps(Protocol):
    """What makes the changes in one territory. `Changes` has checked what holds in all of them."""

    def writable(self, directory: Node) -> Place:
        """The real directory of one that is about to change. Raises EROFS, ENOENT."""

    def make_over(self, place: Place, name: bytes, make: Callable[[int, bytes], T], *, directory: bool) -> T:
        """Call ``make`` (with a directory fd and a name), and replace the marker at ``name`` by its result.
        Raises FileExistsError if there is no marker.
        """

    def unlink(self, node: Node, parent: Node, name: bytes) -> None:
        """Remove a name of a non-directory from the disk."""

    def rmdir(self, node: Node, parent: Node, name: bytes) -> None:
        """Remove a directory that shows nothing from the disk."""

    def rename(self, node: Node, target: Node | None, old: Name, new: Name, flags: int) -> list[Node]:
        """renameat2(2). Returns the nodes that have to be copied up first; then nothing has changed."""

    def link(self, node: Node, parent: Node, name: bytes) -> tuple[Node, Attributes]:
        """Another name for a node that is changed in place."""


class Changing:
    """Base of the changes of the merged layers. Not thread-safe, like the union itself."""

    def __init__(self, union: Union, copy_up: CopyUp | None = None) -> None:
        """``copy_up`` copies up the directories that change."""
        self._union = union
        self._copy_up = copy_up or CopyUp(union)
        self._work = union.work

    def writable(self, directory: Node) -> Place:
        """The upper's directory of a node, to be changed now."""
        place = self._copy_up.directory(directory)
        assert place.layer.is_upper
        place.fills()
        directory.changes()
        return place

    @contextmanager
    def _both_writable(self, one: Node, other: Node) -> Iterator[tuple[int, int]]:
        """Fds of the upper's directories of two nodes, to be changed now; see :meth:`_directories`."""
        first, second = self.writable(one), self.writable(other)
        one.changes()  # again: copying up the other one into it restored its ctime
        with self._directories(first, second) as fds:
            yield fds

    @contextmanager
    def _directories(self, one: Place, other: Place) -> Iterator[tuple[int, int]]:
        """Fds of two real directories that stay open even if the gate closes its own."""
        gate = self._union.gate
        with Owned(os.dup(gate.fd(one))) as first, Owned(os.dup(gate.fd(other))) as second:
            yield first, second

    def _refuse_metacopy(self, node: Node) -> None:
        path, follow = self._union.path(node)
        self._union.markers.refuse_metacopy(path, follow=follow)

    def _whiteout(self, at: At, directory: int) -> None:
        """Make a whiteout at a name that is, or will be, in the upper's directory with that fd."""
        union = self._union
        union.markers.make_whiteout(*at, (directory, union.require_upper().root_fd))
