"""Nodes with outdated attributes in the kernel's cache."""

from __future__ import annotations

from unionfs.core.node import Node
from unionfs.union.copyup import Effects


class Invalidations:
    """Nodes that a session must invalidate in the kernel: ``now`` before the next answer, ``soon`` a little
    later, ``listings`` are directories with outdated cached listings; all in the order of addition."""

    def __init__(self) -> None:
        self.now: dict[Node, None] = {}
        self.soon: dict[Node, None] = {}
        self.listings: dict[Node, None] = {}

    def of_copy_up(self, effects: Effects) -> None:
        """Add the nodes changed by a copy-up."""
        if effects.node is not None:
            self.now[effects.node] = None
        if effects.resized is not None:
            self.soon[effects.resized] = None
        if effects.listing is not None:
            self.listings[effects.listing] = None

    def of_node(self, node: Node) -> None:
        """Add one node."""
        self.now[node] = None

    def of_moved(self, node: Node) -> None:
        """Add a directory with another parent: its cached listing has the old one's number as ``..``."""
        self.listings[node] = None

    def answered(self, node: Node) -> None:
        """Drop a node: the next answer contains its new attributes."""
        self.now.pop(node, None)

    def take_now(self) -> list[int]:
        """The ids of the nodes in ``now`` that the kernel knows; empties it."""
        return _taken(self.now)

    def take_soon(self) -> list[int]:
        """The same for ``soon``."""
        return _taken(self.soon)

    def take_listings(self) -> list[int]:
        """The same for ``listings``."""
        return _taken(self.listings)


def _taken(nodes: dict[Node, None]) -> list[int]:
    ids = [node.id for node in nodes if node.lookups > 0]
    nodes.clear()
    return ids
