"""Storage that the union serves at one place itself, where kernel mounts are not permitted (without root).

A bound directory is served unchanged: no merge, no copy-up, no markers. A change goes to the real directory
at once; a character device 0/0 and `trusted.overlay.*` xattrs are plain data there.

Other processes change it too, so no known state stays valid: every lookup queries the real directory, and a
name that now refers to another object is a new node.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import nullcontext, suppress
from typing import NoReturn

from unionfs.core.directories import Listing
from unionfs.core.files import OpenFile
from unionfs.core.node import NAME_MAX, Attributes, Node
from unionfs.core.nodes import NodeTable
from unionfs.core.places import BoundLayer, Place
from unionfs.core.territory import Territory
from unionfs.sys import calls
from unionfs.sys.calls import os_error
from unionfs.sys.fds import Owned
from unionfs.union.objects import Objects, link_object


class Bound(Territory):
    """The territory of one bound layer, including the changes in it."""

    __slots__ = ("_layer", "_nodes", "_objects")

    def __init__(self, objects: Objects, nodes: NodeTable, layer: BoundLayer) -> None:
        super().__init__(lasting=False, has_markers=False, read_only=layer.read_only)
        self._objects = objects
        self._nodes = nodes
        self._layer = layer

    @property
    def durable(self) -> bool:
        return not self._layer.memory

    # -- finding --------------------------------------------------------------------------------------

    def root(self, parent: Node, name: bytes) -> Node:
        """The node of the storage's root, as ``name`` in ``parent``."""
        st = os.stat(self._layer.root_fd)
        held = -1 if stat.S_ISDIR(st.st_mode) else os.dup(self._layer.root_fd)
        return self._nodes.add_bound(self, parent, name, self._number(st), st, self._layer.root, held=held)

    def lookup(self, parent: Node, name: bytes, first: int = 0) -> tuple[Node, Attributes] | None:
        if len(name) > NAME_MAX:
            raise os_error(errno.ENAMETOOLONG)
        known = self._nodes.child(parent, name)
        if known is not None and known.is_mountpoint:
            return known, self._objects.attributes(known)
        st = self._stat(parent, name)
        if known is not None:
            if st is not None and _is_still(known, st):
                return known, known.attributes_of(st)
            self._forget(known, parent, name)  # another process removed or replaced it
        if st is None:
            return None
        node = self.add(parent, name, st, parent.parts[0])
        return node, node.attributes_of(st)

    def number(self, parent: Node, name: bytes) -> tuple[int, int] | None:
        known = self._nodes.child(parent, name)
        if known is not None and known.is_mountpoint:
            return known.ino, known.kind
        st = self._stat(parent, name)
        return None if st is None else (self._number(st), stat.S_IFMT(st.st_mode))

    def listing(self, directory: Node) -> Listing:
        return Listing(self._objects.gate, () if directory.unlinked else directory.parts)

    def add(self, parent: Node, name: bytes, st: os.stat_result, place: Place) -> Node:
        if stat.S_ISDIR(st.st_mode):
            place = Place(place.layer, place, name)
        return self._nodes.add_bound(self, parent, name, self._number(st), st, place)

    def unnamed(self, parent: Node, held: int) -> Node:
        st = os.stat(held)
        return self._nodes.add_bound(self, parent, b"", self._number(st), st, parent.parts[0], held=held)

    def lost_name(self, node: Node) -> None:
        """Nothing to hold: its other names are other nodes."""

    def opened(self, node: Node, file: OpenFile) -> None:
        """Accept any regular file, with its data."""

    def _stat(self, parent: Node, name: bytes) -> os.stat_result | None:
        try:
            return os.stat(name, dir_fd=self._objects.gate.fd(parent.parts[0]), follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _number(self, st: os.stat_result) -> int:
        return self._nodes.numbers.of_bound(self._layer, st)

    def _forget(self, node: Node, parent: Node, name: bytes) -> None:
        for part in node.parts:
            self._objects.gate.forget(part)
        self._nodes.remove_name(node, parent, name)

    # -- changing: see `changing.Steps` ---------------------------------------------------------------

    def writable(self, directory: Node) -> Place:
        self.require_writable()
        if directory.unlinked:
            raise os_error(errno.ENOENT)
        return directory.parts[0]

    def make_over(self, place: Place, name: bytes, make: object, *, directory: bool) -> NoReturn:
        raise os_error(errno.EEXIST)

    def unmake(self, parent: Node, name: bytes, *, directory: bool) -> None:
        with suppress(OSError):
            (os.rmdir if directory else os.unlink)(name, dir_fd=self._objects.gate.fd(parent.parts[0]))

    def unlink(self, node: Node, parent: Node, name: bytes) -> None:
        os.unlink(name, dir_fd=self._objects.gate.fd(self.writable(parent)))

    def rmdir(self, node: Node, parent: Node, name: bytes) -> None:
        os.rmdir(name, dir_fd=self._objects.gate.fd(self.writable(parent)))

    def rename(
        self, node: Node, target: Node | None, old: tuple[Node, bytes], new: tuple[Node, bytes], flags: int
    ) -> list[Node]:
        gate, exchanges = self._objects.gate, flags == calls.RENAME_EXCHANGE
        replaced = None if exchanges or target is node else target
        with (
            Owned(os.dup(gate.fd(self.writable(old[0])))) as old_fd,
            nullcontext() if replaced is None else self._objects.outliving(replaced),
        ):
            calls.renameat2(old_fd, old[1], gate.fd(self.writable(new[0])), new[1], flags)
            if replaced is not None:
                self._forget(replaced, *new)
        if target is not node:
            self._nodes.move(node, *old, *new)
            if exchanges and target is not None:
                self._nodes.move(target, *new, *old)
        return []

    def link(self, node: Node, parent: Node, name: bytes) -> tuple[Node, Attributes]:
        """Create a hard link; the new name is a separate node with the same ``st_ino``."""
        target, gate = self.writable(parent), self._objects.gate
        assert node.place is not None
        with Owned(os.dup(gate.fd(node.place))) as source:
            link_object(node, source, gate.fd(target), name)
        found = self.lookup(parent, name)
        if found is None:
            raise os_error(errno.ENOENT)
        return found


def _is_still(node: Node, st: os.stat_result) -> bool:
    return node.identity == (st.st_dev, st.st_ino) and node.kind == stat.S_IFMT(st.st_mode)
