"""Nodes of which the kernel remembers attributes that are no longer true."""

from __future__ import annotations

from unionfs.union.copyup import Effects
from unionfs.union.nodes import Node


class Invalidations:
    """What a session has to tell the kernel: ``now`` before the next answer, so that nobody sees the old
    attributes after it, and ``soon`` a little later. In the order in which it happened."""

    def __init__(self) -> None:
        self.now: dict[Node, None] = {}
        self.soon: dict[Node, None] = {}

    def of_copy_up(self, effects: Effects) -> None:
        """Something was copied up."""
        self.now[effects.node] = None
        if effects.resized is not None:
            self.soon[effects.resized] = None

    def of_node(self, node: Node) -> None:
        """The attributes that the kernel has of a node are not true."""
        self.now[node] = None

    def answered(self, node: Node) -> None:
        """The next answer brings the node's new attributes."""
        self.now.pop(node, None)

    def take_now(self) -> list[int]:
        """The ids of the nodes to be told of now, as far as the kernel knows them."""
        return _taken(self.now)

    def take_soon(self) -> list[int]:
        """The ids of those that had time."""
        return _taken(self.soon)


def _taken(nodes: dict[Node, None]) -> list[int]:
    ids = [node.id for node in nodes if node.lookups > 0]
    nodes.clear()
    return ids
