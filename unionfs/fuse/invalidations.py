"""Nodes with outdated attributes or listings in the kernel's cache."""

from __future__ import annotations

from unionfs.union.copyup import Effects
from unionfs.union.node import Node


class Invalidations:
    """Nodes that a session must invalidate in the kernel: ``now`` before the next answer, ``soon`` a little
    later; both in the order of addition."""

    def __init__(self) -> None:
        #: Whether the listing is outdated too.
        self.now: dict[Node, bool] = {}
        self.soon: dict[Node, None] = {}

    def of_copy_up(self, effects: Effects) -> None:
        """Add the nodes changed by a copy-up."""
        self.now[effects.node] = False
        if effects.resized is not None:
            self.soon[effects.resized] = None

    def of_node(self, node: Node) -> None:
        """Add one node."""
        self.now[node] = False

    def of_moved(self, node: Node) -> None:
        """Add a directory with another parent: its cached listing has the old one's number as ``..``."""
        self.now[node] = True

    def answered(self, node: Node) -> None:
        """Drop a node: the next answer contains its new attributes."""
        self.now.pop(node, None)

    def take_now(self) -> list[tuple[int, bool]]:
        """The ids of the nodes in ``now`` that the kernel knows, and whether the listing is outdated too;
        empties it."""
        nodes = [(node.id, listing) for node, listing in self.now.items() if node.lookups > 0]
        self.now.clear()
        return nodes

    def take_soon(self) -> list[int]:
        """The ids of the nodes in ``soon`` that the kernel knows; empties it."""
        ids = [node.id for node in self.soon if node.lookups > 0]
        self.soon.clear()
        return ids
