"""The merged layers: the territory whose names are searched down the layers."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from unionfs.core import layercalls
from unionfs.core.directories import Listing
from unionfs.core.files import OpenFile
from unionfs.core.lookup import Names
from unionfs.core.node import Node
from unionfs.core.nodes import NodeTable
from unionfs.core.places import Place
from unionfs.union.layers import LayerStack
from unionfs.union.lowerdata import LowerData
from unionfs.union.merge import Merge
from unionfs.union.objects import Objects


class Merged(Names):
    """The territory of the root. Only this daemon changes it."""

    def __init__(self, objects: Objects, nodes: NodeTable, merge: Merge, stack: LayerStack) -> None:
        lowest = len(stack.layers) - 1
        super().__init__(objects, nodes, merge, lowest, read_only=stack.upper is None, owners=stack.owners)
        self._objects = objects
        self._nodes = nodes
        self._merge = merge
        self._stack = stack
        self._metacopy = os.fsdecode(stack.markers.metacopy)
        self._protattr = os.fsdecode(stack.markers.protattr)

    @property
    def durable(self) -> bool:
        return self._stack.durable

    def find_data(self, node: Node) -> None:
        with suppress(OSError):  # an open reports it
            node.data_lies_in(self._data_of(node, self._objects.path(node)[0]))

    def number(self, parent: Node, name: bytes) -> tuple[int, int] | None:
        known = self._nodes.child(parent, name)
        if known is not None:
            return known.ino, known.kind
        found = self._merge.search(parent.parts, name)
        if found is None:
            return None
        st, places = found
        kind = stat.S_IFMT(st.st_mode)
        if kind == stat.S_IFDIR:
            self._merge.forget(places)  # no node uses them
        return self._nodes.number(name, st, places), kind

    def number_of_bare_whiteout(self, parent: Node, name: bytes) -> tuple[int, int] | None:
        if self._merge.lists_bare_whiteout(parent.parts, name):
            return self._nodes.unreachable(parent, name), stat.S_IFREG
        return None

    def listing(self, directory: Node) -> Listing:
        return self._merge.listing(() if directory.unlinked else directory.parts)

    def add(self, parent: Node, name: bytes, st: os.stat_result, place: Place) -> Node:
        if stat.S_ISDIR(st.st_mode):
            place = Place(place.layer, place, name, key=place.layer.key(st))
            place.knows_named(some=False)
        return self._nodes.add(parent, name, st, [place])

    def unnamed(self, parent: Node, held: int) -> Node:
        return self._nodes.unnamed(parent, held)

    def lost_name(self, node: Node) -> None:
        upper = self._stack.upper
        if upper is not None and node.in_place and not node.is_dir:
            try:
                st = layercalls.call(os.stat, node.held)
            except OSError:
                return  # the name is gone already; those not looked up yet become another node
            if st.st_nlink > upper.links_of_removed:
                self._nodes.linked(node, st)  # it has names that were not looked up yet

    def opened(self, node: Node, file: OpenFile) -> LowerData | None:
        names = file.look_at_xattrs()
        if names is not None and node.in_place and node.flags is None and self._protattr not in names:
            node.know_flags(0)
        return self._data_of(node, file.fd) if names is None or self._metacopy in names else None

    def _data_of(self, node: Node, where: bytes | int) -> LowerData | None:
        """Where the data of a file lies that may be metacopy. Its name may be the last one that it had."""
        assert node.place is not None
        assert node.parent is not None
        return self._merge.lower_data(node.parent.parts, node.place, node.name, where)

    def stored_name(self, name: bytes) -> bytes:
        return self._stack.markers.stored_name(name)

    def shown_names(self, stored: list[bytes]) -> list[bytes]:
        return self._stack.markers.shown_names(stored)
