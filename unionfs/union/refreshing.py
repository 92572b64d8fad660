"""Brings the node table up to date with lowers that were changed from outside.

A node whose object is still the same stays. One whose name now belongs to another object, or to none, loses
the name; its open files go on with the old object. What was remembered of the lowers is forgotten.

Rules:
- One directory a step, parents first: requests may be served between two steps.
- An object of a lower is unchanged if its ctime is older than the last refresh, as nothing sets a ctime.
  Where clocks may differ (NFS) or numbers change, it may always have changed.
- The upper is this daemon's alone, and not examined.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from unionfs.union.node import Node
from unionfs.union.places import Layer, Place
from unionfs.union.tree import Union

_SLACK_NS: Final = 2_000_000_000
"""Filesystems take times from a coarse clock (current_time(9)); FAT's have two seconds."""


@dataclass(slots=True)
class Outdated:
    """What the kernel must forget."""

    names: list[tuple[int, bytes]] = field(default_factory=list)
    """Names in directories, by the directory's node id."""
    nodes: list[int] = field(default_factory=list)
    """The attributes and data, or the listing, of nodes."""


class Refresh:
    """One pass over all known nodes of the merged layers."""

    def __init__(
        self, union: Union, since_ns: int, is_busy: Callable[[Node], bool], *, new_nodes: bool
    ) -> None:
        """``since_ns``: the time of the last refresh, in nanoseconds since 1970. ``is_busy``: whether a node
        is being copied up. ``new_nodes``: changed files need new nodes, as the kernel accepts no other size.
        """
        self._union = union
        self._since = since_ns - _SLACK_NS
        self._is_busy = is_busy
        self._new_nodes = new_nodes
        self.outdated = Outdated()

    def steps(self) -> Iterator[None]:
        """Do the work, in pieces."""
        self._union.merge.forget_names()
        waiting = [self._union.nodes.root]
        while waiting:
            node = waiting.pop()
            if self._union.nodes.named(node.id) is node and not node.unlinked:
                waiting += self._directory(node)
                yield

    def _directory(self, node: Node) -> list[Node]:
        """Refresh the names in a directory; returns the directories below it that are still known."""
        if self._is_changed_directory(node):
            for part in node.parts:
                part.forget_named()
            self.outdated.nodes.append(node.id)
            self._new_names(node)
        below = []
        for name, child in list((node.children or {}).items()):
            if child.territory is node.territory and self._is_same(node, name, child) and child.is_dir:
                below.append(child)
        return below

    def _is_changed_directory(self, node: Node) -> bool:
        lowers = [part for part in node.parts if not part.layer.is_upper]
        try:
            return any(
                self._may_differ(part.layer, os.stat(self._union.gate.fd(part))) for part in lowers
            )
        except OSError:
            return True

    def _may_differ(self, layer: Layer, st: os.stat_result) -> bool:
        """Whether a lower's object may have changed since the last refresh."""
        return st.st_ctime_ns >= self._since or not layer.keeps_numbers or bool(layer.links_of_removed)

    def _new_names(self, node: Node) -> None:
        """The kernel may have cached that a name does not exist."""
        try:
            names = node.territory.listing(node).names()
        except OSError:
            return  # the next listing reports it
        known = node.children or {}
        self.outdated.names += ((node.id, name) for name in names if name not in known)

    def _is_same(self, parent: Node, name: bytes, node: Node) -> bool:
        """Refresh one name; whether it still belongs to the node."""
        if self._is_busy(node):
            return True
        try:
            found = self._union.merge.search(parent.parts, name)
        except OSError:
            return True  # the next request reports it
        if found is not None and stat.S_IFMT(found[0].st_mode) == node.kind:
            st, places = found
            if node.is_dir:
                still = self._is_directory_still(node, places)
            else:
                still = self._is_file_still(parent, name, node, st, places[0])
            if still:
                return True
        elif found is not None and stat.S_ISDIR(found[0].st_mode):
            self._union.merge.forget(found[1])
        self._union.nodes.lose(node, parent, name)
        self.outdated.names.append((parent.id, name))
        if node.is_dir:
            self.outdated.nodes.append(node.id)  # of a file, what the kernel has is still right
        return False

    def _is_directory_still(self, node: Node, places: list[Place]) -> bool:
        """Whether a directory's topmost part is the same; then it gets the parts that it has now."""
        kept = [self._known(node.parts, place) for place in places]
        if kept[0] not in node.parts:
            self._union.merge.forget(places)
            return False
        if kept != node.parts:
            self._union.merge.forget(set(node.parts) - set(kept))
            node.has_parts(kept)
            self.outdated.nodes.append(node.id)
            self._new_names(node)
        return True

    def _known(self, parts: list[Place], place: Place) -> Place:
        """The part that is the same real directory as ``place``, or ``place`` itself."""
        gate = self._union.gate
        for part in parts:
            if part.layer is place.layer:
                try:
                    same = os.path.samestat(os.stat(gate.fd(part)), os.stat(gate.fd(place)))
                except OSError:
                    continue
                if same:
                    self._union.merge.forget([place])
                    if place.parent is not None:
                        part.move(place.parent, place.name)
                    return part
        return place

    def _is_file_still(
        self, parent: Node, name: bytes, node: Node, st: os.stat_result, place: Place
    ) -> bool:
        if place is not node.place:
            return False
        if place.layer.is_upper:
            return True
        if place.layer.key(st) != node.key:
            return False
        if not self._may_differ(place.layer, st):
            return True
        node.note_capability(none=False)
        self.outdated.nodes.append(node.id)
        if self._new_nodes and node.kind == stat.S_IFREG:
            self._union.nodes.supersede(node)
            self.outdated.names.append((parent.id, name))
        return True
