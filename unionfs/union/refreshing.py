"""Brings the node table up to date with lowers that were changed from outside.

A node whose object is still the same stays. One whose name now belongs to another object, or to none, loses
the name; its open files go on with the old object. What was remembered of the lowers is forgotten.

Rules:
- One directory or name a step, parents first: requests may be served between two steps. A step that needs a
  call on a slow lower raises `Wanted`, and is made anew when the call was made, like a request (`core.memo`).
- Of names that the watches reported, only these are looked at. Otherwise an object of a lower is unchanged if
  its ctime is older than the last refresh, as nothing sets a ctime. Where clocks may differ (NFS) or numbers
  change, it may always have changed.
- An object whose owner or mode changed has another `Layer.key`. It is still the node's if the watches
  reported no change of its name and it has the same number. The node gets the key once the kernel has
  forgotten the old attributes, by which it checks permissions.
- The upper is this daemon's alone, and not examined.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from unionfs.core import stacking
from unionfs.core.layercalls import call
from unionfs.core.node import Node
from unionfs.core.places import Layer, Place
from unionfs.core.search import PREFIX
from unionfs.union.named import OPAQUE, hidden_name
from unionfs.union.tree import Union
from unionfs.union.watching import ITSELF, Told

_SLACK_NS: Final = 2_000_000_000
"""Filesystems take times from a coarse clock (current_time(9)); FAT's have two seconds."""

Names = Mapping[bytes, Told]
"""Names in a directory, with what is known of each."""


@dataclass(slots=True)
class Outdated:
    """What the kernel must forget."""

    names: list[tuple[int, bytes]] = field(default_factory=list)
    """Names in directories, by the directory's node id."""
    nodes: dict[int, int] = field(default_factory=dict)
    """The attributes and data, or the listing, of nodes, with the node id of a directory that has each."""
    keys: list[tuple[Node, int]] = field(default_factory=list)
    """Nodes that get another `Layer.key` afterwards."""

    def __len__(self) -> int:
        return len(self.names) + len(self.nodes)

    def add(self, node: Node) -> None:
        """Add a node."""
        self.nodes[node.id] = 0 if node.parent is None else node.parent.id

    def forgotten(self) -> None:
        """The kernel has forgotten it all."""
        for node, key in self.keys:
            if not node.unlinked and not node.in_place:
                node.has_key(key)


@dataclass(slots=True, frozen=True)
class Step:
    """A piece of the work: ``look`` at a name in a directory, or, without a name, at the directory."""

    parent: Node
    name: bytes | None
    look: Callable[[], None]


class Refresh:
    """One pass over all known nodes of the merged layers, or over some names."""

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
        self._outdated = Outdated()
        #: New nodes of changed files.
        self._renewed: set[Node] = set()
        #: Directories that have other parts now, until their names were looked at.
        self._merged_anew: set[Node] = set()

    def take(self) -> Outdated:
        """What became outdated since the last call."""
        outdated, self._outdated = self._outdated, Outdated()
        return outdated

    @property
    def outdated(self) -> int:
        """The size of what :meth:`take` returns."""
        return len(self._outdated)

    def steps(self) -> Iterator[Step]:
        """What looks at everything, in pieces."""
        self._union.merge.forget_names()
        yield from self._below(self._union.nodes.root)

    def steps_for(self, changed: Mapping[Node, Names]) -> Iterator[Step]:
        """What looks at names in directories, in pieces."""
        for node, names in changed.items():
            if self._is_known(node):
                self._union.merge.forget_names(node.parts)
                for name, told in names.items():
                    yield from self._name(node, name, told)

    def lose(self, step: Step) -> None:
        """Do without a step's calls, as a layer does not answer: its name may belong to something else."""
        if step.name is None:
            self._outdated.add(step.parent)
        elif (child := self._child(step.parent, step.name)) is not None:
            self._lose(step.parent, step.name, child)

    def _is_known(self, node: Node) -> bool:
        return self._union.nodes.named(node.id) is node and not node.unlinked

    def _child(self, node: Node, name: bytes) -> Node | None:
        """A known node of the merged layers; its directory may have lost its name meanwhile."""
        child = self._union.nodes.child(node, name) if self._is_known(node) else None
        return child if child is not None and child.territory is node.territory else None

    def _below(self, top: Node) -> Iterator[Step]:
        """What looks at everything from a directory down."""
        waiting = [top]
        while waiting:
            node = waiting.pop()
            if self._is_known(node):
                yield Step(node, None, partial(self._directory, node))
                for name in list(node.children or ()):
                    yield Step(node, name, partial(self._look, node, name, waiting))

    # -- names that the watches reported --------------------------------------------------------------

    def _name(self, node: Node, name: bytes, told: Told) -> Iterator[Step]:
        """What looks at one name in a directory, and at everything below if it is merged from other parts."""
        if name == ITSELF:
            self._outdated.add(node)
            return
        if name.startswith(PREFIX):
            for part in node.parts:
                part.forget_named()
            if name == OPAQUE and node.parent is not None:
                yield from self._name(node.parent, node.name, Told.NAME)
            hidden = hidden_name(name)
            if hidden is None:
                return
            name, told = hidden, Told.NAME
        if told is Told.NAME:
            self._outdated.add(node)  # its listing, size and times
        child = (node.children or {}).get(name)
        if child is None:
            self._outdated.names.append((node.id, name))
            yield Step(node, name, partial(self._other_names, node, name))
        elif child.territory is node.territory:
            parts = child.parts
            yield Step(node, name, partial(self._told, node, name, told))
            if child.parts is not parts:
                yield from self._below(child)

    def _told(self, node: Node, name: bytes, told: Told) -> None:
        child = self._child(node, name)
        if child is not None and not self._is_same(node, name, child, told):
            self._outdated.add(node)

    def _other_names(self, parent: Node, name: bytes) -> None:
        """A name may be a new one of an object that is known by others, and has another ``st_nlink`` now."""
        watches, nodes = self._union.watches, self._union.nodes
        for part in parent.parts:
            try:
                st = call(os.stat, name, dir_fd=self._union.gate.fd(part), follow_symlinks=False)
            except OSError:
                continue
            known = nodes.named(nodes.numbers.of(st.st_dev, st.st_ino)) if st.st_nlink > 1 else None
            if known is not None and not known.is_dir and not known.in_place and watches is not None:
                watches.known(known)
                self._outdated.add(known)

    # -- everything -----------------------------------------------------------------------------------

    def _directory(self, node: Node) -> None:
        """Refresh what the kernel knows of a directory."""
        if node in self._merged_anew or self._is_changed_directory(node):
            for part in node.parts:
                part.forget_named()
            self._outdated.add(node)
            self._new_names(node)
            self._merged_anew.discard(node)

    def _look(self, node: Node, name: bytes, below: list[Node]) -> None:
        """Refresh a name; a directory that still has it is added to ``below``."""
        child = self._child(node, name)  # it may be superseded meanwhile
        if child is not None and self._is_same(node, name, child) and child.is_dir:
            below.append(child)

    def _is_changed_directory(self, node: Node) -> bool:
        lowers = [part for part in node.parts if not part.layer.is_upper]
        try:
            return any(
                self._may_differ(part.layer, call(os.stat, self._union.gate.fd(part))) for part in lowers
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
            if node.parent is not None:  # without its name the kernel has no names below it, either
                self._outdated.names.append((node.parent.id, node.name))
            return  # the next listing reports it
        known = node.children or {}
        self._outdated.names += ((node.id, name) for name in names if name not in known)

    # -- one name -------------------------------------------------------------------------------------

    def _is_same(self, parent: Node, name: bytes, node: Node, told: Told = Told.NOTHING) -> bool:
        """Refresh one name; whether it still belongs to the node."""
        if self._is_busy(node):
            return True
        try:
            if self._is_found(parent, name, node, told):
                return True
        except OSError:
            if self._is_in_present_layers(node):
                return True  # the next request reports it
        self._lose(parent, name, node)
        return False

    def _lose(self, parent: Node, name: bytes, node: Node) -> None:
        """Take a name from a node."""
        if self._is_busy(node):
            return
        if node.layer in self._union.stack.layers:
            self._union.nodes.lose(node, parent, name)
        else:  # another process has not touched it, so who has it open finds it there
            stacking.unlink(self._union.nodes, node)
            self._union.nodes.remove_name(node, parent, name)
        self._outdated.names.append((parent.id, name))
        if node.is_dir:
            self._outdated.add(node)  # of a file, what the kernel has is still right
        elif node.unlinked:
            self._union.files.keep_object(node)

    def _is_found(self, parent: Node, name: bytes, node: Node, told: Told) -> bool:
        """Look a name up; whether it still belongs to the node. Raises ``OSError``."""
        found = self._union.merge.search(parent.parts, name)
        if found is None:
            return False
        st, places = found
        if stat.S_IFMT(st.st_mode) == node.kind:
            if node.is_dir:
                return self._is_directory_still(node, places, told)
            return self._is_file_still(parent, name, node, st, places[0], told)
        if stat.S_ISDIR(st.st_mode):
            self._union.merge.forget(places)
        return False

    def _is_in_present_layers(self, node: Node) -> bool:
        places = node.parts if node.is_dir else [node.place]
        return all(place is not None and place.layer in self._union.stack.layers for place in places)

    def _is_directory_still(self, node: Node, places: list[Place], told: Told) -> bool:
        """Whether a directory's topmost part is the same; then it gets the parts that it has now."""
        kept = [self._known(node, place) for place in places]
        if kept[0] not in node.parts:
            self._union.merge.forget(places)
            return False
        if kept != node.parts:
            self._union.merge.forget(set(node.parts) - set(kept))
            node.has_parts(kept)
            self._union.nodes.merges_others(node)
            if self._union.watches is not None:
                self._union.watches.known(node)
            self._outdated.add(node)
            self._merged_anew.add(node)
        elif told is not Told.NOTHING:
            self._outdated.add(node)
        return True

    def _known(self, node: Node, place: Place) -> Place:
        """The part of a node that is the same real directory as ``place``, or ``place`` itself."""
        for part in node.parts:
            if part.layer is place.layer and self._is_one(node, part, place):
                part.found_as(place)
                self._union.merge.forget([place])
                return part
        return place

    def _is_one(self, node: Node, part: Place, place: Place) -> bool:
        watches, gate = self._union.watches, self._union.gate
        if watches is not None and watches.is_same(node, part, place):
            return True
        try:
            return os.path.samestat(call(os.stat, gate.fd(part)), call(os.stat, gate.fd(place)))
        except OSError:
            return False

    def _is_file_still(
        self, parent: Node, name: bytes, node: Node, st: os.stat_result, place: Place, told: Told
    ) -> bool:
        if place.layer.is_upper:
            return node.in_place
        if not self._is_at(parent, name, node, place, st):
            return False
        if node.is_indexed:
            return True  # the copy stands for all its names
        key = place.layer.key(st)
        if key != node.key:
            if told is not Told.OBJECT or not self._has_number(node, st):
                return False
            self._outdated.keys.append((node, key))
        if told is Told.NOTHING and not self._may_differ(place.layer, st):
            return True
        node.note_capability(none=False)
        node.know_flags(None)
        self._outdated.add(node)
        if self._new_nodes and node.kind == stat.S_IFREG:
            if node not in self._renewed:
                self._renewed.add(self._union.nodes.supersede(node))
            self._outdated.names.append((parent.id, name))
        return True

    def _is_at(self, parent: Node, name: bytes, node: Node, place: Place, st: os.stat_result) -> bool:
        """Whether a name of a lower belongs to the node, as far as its place shows."""
        index = self._union.index
        if node.entry is not None and index is not None:
            return index.entry_of_lower(self._union.gate.fd(place), name, st) == node.entry
        for directory, link, there in node.links or ():
            if directory is parent and link == name:
                return place is there
        return place is node.place

    def _has_number(self, node: Node, st: os.stat_result) -> bool:
        """Whether the node's number is that of an object."""
        return not node.from_origin and self._union.nodes.numbers.of(st.st_dev, st.st_ino) == node.ino
