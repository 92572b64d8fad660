"""The node table: maps node ids to objects of the merged tree.

Rules (the table is the only place that implements them):

- A node keeps its id through copy-up, rename and metadata changes.
- A directory, and an object of a lower, is identified by its parent node and name. An object of the upper
  with several links is one node with several names, found by (device, inode). So is a lower file with several
  hard links if there is an index, where it is also found by its copy, or if there is no upper. Otherwise each
  of its names is a separate node, until copy-up with the same ``st_ino``.
- A node's id is its ``st_ino`` (see `numbers`), unless another node has that id. Two nodes of separate
  objects never have the same ``st_ino``: if a layer would make it so, the second node has its id. Ids are
  used again, and then with another generation: a file handle of a forgotten node is stale.
- A node stays while the kernel holds lookups (``lookups``), it is open, or nodes below it stay. Only the
  table subtracts lookups; a session's state about a node (`Use`) ends with the node.
- A node without a name keeps an fd (``held``) until it is forgotten.
- A node can be superseded: a new node, with a new id and the same ``st_ino``, takes over its object. The old
  id leads to the new node; the old node itself stays for its open files and lookups.
"""

from __future__ import annotations

import errno
import itertools
import os
import secrets
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from unionfs.sys import calls
from unionfs.union.node import Node, Territory
from unionfs.union.numbers import hashed
from unionfs.union.origin import Origins, Stored
from unionfs.union.places import NO_KEY, Gate, Layer, Place

if TYPE_CHECKING:
    from unionfs.union.index import Index

ROOT_ID: Final = 1


class NodeTable:
    """All nodes that the kernel knows or is about to receive, and their ids."""

    #: The node of id 1.
    root: Node

    def __init__(
        self,
        origins: Origins,
        index: Index | None,
        gate: Gate,
        gone: Callable[[Node], None] = lambda node: None,
        *,
        copies_up: bool = True,
        known: Callable[[Node], None] | None = None,
    ) -> None:
        """``gone`` is called for each forgotten directory, and for each forgotten node that was in use.
        ``copies_up``: whether there is an upper, which may get a copy of one name alone. ``known`` is called
        for each new directory of the merged layers, and each file of a lower with several hard links; then
        ``gone`` for all nodes.
        """
        self._by_id: dict[int, Node] = {}
        self._by_inode: dict[tuple[int, int], Node] = {}
        self._inodes_of: dict[int, list[tuple[int, int]]] = {}
        self._gone = gone
        self._copies_up = copies_up
        self._known = known
        #: The generation of the next node. The kernel sees 32 bits: those of two mounts hardly ever meet.
        self._generations = itertools.count(secrets.randbits(32))
        self._origins = origins
        self._index = index
        self._gate = gate
        self.numbers = origins.numbers
        #: The numbers of copies whose origin could not be stored, by (device, inode).
        self._unstored: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def add_root(self, territory: Territory, parts: list[Place]) -> None:
        """Add the root of the merged tree."""
        self.root = self._by_id[ROOT_ID] = Node(ROOT_ID, territory, None, b"", stat.S_IFDIR, parts)
        self.root.looked_up()
        if self._known is not None:
            self._known(self.root)

    def get(self, id_: int) -> Node | None:
        """The node with that id, or its successor, if known."""
        node = self._by_id.get(id_)
        while node is not None and node.successor is not None:
            node = node.successor
        return node

    def named(self, id_: int) -> Node | None:
        """The node that has that id itself."""
        return self._by_id.get(id_)

    # -- numbers --------------------------------------------------------------------------------------

    def number(self, name: bytes, st: os.stat_result, places: list[Place]) -> int:
        """The inode number that :meth:`add` would assign to an object; ``places`` as there."""
        if self._by_inode and self._is_linkable(st, places[0]):
            known = self._by_inode.get((st.st_dev, st.st_ino))
            if known is not None:
                return known.ino
        number = self._number(name, st, places)[0]
        return number if self._may_share(st, places[0]) else self._free(number)

    def _is_linkable(self, st: os.stat_result, place: Place) -> bool:
        """Whether the names of an object are names of one node, found by (device, inode)."""
        return not stat.S_ISDIR(st.st_mode) and (place.layer.is_upper or not self._copies_up)

    def _number(
        self, name: bytes, st: os.stat_result, places: list[Place]
    ) -> tuple[int, bool, bytes | None]:
        """The number of an object, whether it is that of its origin, and its entry in the index."""
        if stat.S_ISDIR(st.st_mode):
            return self._origins.number_of_directory(st, places), False, None
        place = places[0]
        if self._unstored and place.layer.is_upper:
            known = self._unstored.get((st.st_dev, st.st_ino))
            if known is not None:
                return known, False, None
        origin = None
        if place.impure and (st.st_nlink == 1 or place.layer.is_upper):
            origin = self._origins.read(place, name)
        if origin is not None:
            entry, known = None, self._origins.number_of(origin)
            if st.st_nlink > 1 and self._index is not None:
                entry = self._index.entry_of_copy(origin, st)
            broken = st.st_nlink > 1 and entry is None and self._origins.was_indexed(place, name)
            if known is not None and not broken:
                return known, True, entry
        return self.numbers.of(st.st_dev, st.st_ino), False, None

    def _may_share(self, st: os.stat_result, place: Place) -> bool:
        """Whether several nodes may have the number of an object: those of a lower's hard links; with
        ``xino=off``, objects of several filesystems."""
        if stat.S_ISDIR(st.st_mode):
            return False
        return not self.numbers.unique or (st.st_nlink > 1 and not place.layer.is_upper)

    def unreachable(self, parent: Node, name: bytes) -> int:
        """A number for an object that cannot be looked up; no node has it."""
        return self._free(self.numbers.hashed(b"unreachable%d/%b" % (parent.ino, name)))

    def _free(self, number: int) -> int:
        """The number itself, or another one if a node has it."""
        while number in self._by_id:
            number = self.numbers.hashed(b"taken%d" % number)
        return number

    def copied_up(self, node: Node, st: os.stat_result, origin: Stored) -> None:
        """Record that ``node`` is now the upper object with attributes ``st``, whose origin is ``origin``."""
        if origin is Stored.INDEXED:
            self.linked(node, st)
            node.has_origin()
        elif origin is Stored.BROKEN:
            node.has_number(self.numbers.of(st.st_dev, st.st_ino))
        elif origin is Stored.READABLE:
            node.has_origin()
        elif not node.is_dir:
            self._unstored[st.st_dev, st.st_ino] = node.ino
        if node.place is not None:
            node.has_key(node.place.layer.key(st))

    # -- coming and going -----------------------------------------------------------------------------

    def child(self, parent: Node, name: bytes) -> Node | None:
        """The node known under that name."""
        assert parent.children is not None
        return parent.children.get(name)

    def add(self, parent: Node, name: bytes, st: os.stat_result, places: list[Place]) -> Node:
        """The node of an object of the layers: a new node, or the one that already has another name of it.

        ``places``: a directory's parts, or the place of the object.
        """
        assert parent.children is not None
        kind = stat.S_IFMT(st.st_mode)
        place = places[0]
        upper = place.layer.is_upper
        linkable = self._is_linkable(st, place)
        if self._index is not None and st.st_nlink > 1 and not upper and kind != stat.S_IFDIR:
            found = self._add_linked(self._index, parent, name, st, place)
            if found is not None:
                return found
        if linkable and self._by_inode:
            known = self._by_inode.get((st.st_dev, st.st_ino))
            if known is not None:
                self.add_name(known, parent, name, place)
                return known
        number, from_origin, entry = self._number(name, st, places)
        id_ = self._free(number)
        key = 0 if kind == stat.S_IFDIR else place.layer.key(st)
        ino = number if id_ == number or self._may_share(st, place) else id_
        node = Node(
            id_, parent.territory, parent, name, kind, places, key, ino=ino,
            generation=next(self._generations),
        )  # fmt: skip
        if from_origin:
            node.has_origin()
        self._by_id[id_] = node
        parent.children[name] = node
        if self._known is not None and (kind == stat.S_IFDIR or (st.st_nlink > 1 and not upper)):
            self._known(node)
        if linkable and st.st_nlink > 1:
            self.linked(node, st)
            if entry is not None and self._index is not None:
                node.may_be_indexed(entry, 0)
                node.is_indexed_copy(self._index.place, self._index.more_links(entry, st, 0))
        return node

    def _add_linked(
        self, index: Index, parent: Node, name: bytes, st: os.stat_result, place: Place
    ) -> Node | None:
        """The node of a lower's file with several hard links, of which ``name`` is one: the file itself, or
        its copy in the index. None if it cannot be indexed.
        """
        original = st.st_dev, st.st_ino
        node = self._by_inode.get(original)
        if node is not None:
            self.add_name(node, parent, name, place)
            return node
        entry = index.entry_of_lower(self._gate.fd(place), name, st)
        if entry is None:
            return None
        copy = index.stat(entry)
        if copy is not None and stat.S_IFMT(copy.st_mode) == stat.S_IFMT(st.st_mode):
            node = self._by_inode.get((copy.st_dev, copy.st_ino))
        else:
            copy = None
        if node is None:
            number = self.numbers.of(*original)
            here, found = (place, st) if copy is None else (index.place, copy)
            kind, key = stat.S_IFMT(st.st_mode), here.layer.key(found)
            node = Node(self._free(number), parent.territory, parent, name, kind, [here], key, ino=number)
            self._by_id[node.id] = node
            assert parent.children is not None
            parent.children[name] = node
            node.may_be_indexed(entry, st.st_nlink)
            if copy is not None:
                node.has_origin()
                node.is_indexed_copy(index.place, index.more_links(entry, copy, st.st_nlink))
                self.linked(node, copy)
            elif self._known is not None:
                self._known(node)
        else:
            node.may_be_indexed(entry, st.st_nlink)
            self.add_name(node, parent, name, place)
        self.linked(node, st)
        return node

    def add_bound(
        self,
        territory: Territory,
        parent: Node,
        name: bytes,
        number: int,
        st: os.stat_result,
        place: Place,
        *,
        held: int = -1,
    ) -> Node:
        """A node for one name of an object of bound storage: hard links are separate nodes with one
        ``number``. ``held``: an O_PATH fd of an object without a name.
        """
        node = Node(
            self._free(number), territory, parent, name, stat.S_IFMT(st.st_mode), [place],
            ino=number, generation=next(self._generations), held=held, identity=(st.st_dev, st.st_ino),
        )  # fmt: skip
        self._by_id[node.id] = node
        if name:
            assert parent.children is not None
            parent.children[name] = node
        return node

    def linked(self, node: Node, st: os.stat_result) -> None:
        """Record that the object of ``node``, with the attributes ``st``, has several hard links."""
        key = st.st_dev, st.st_ino
        if self._by_inode.get(key) is not node:
            self._by_inode[key] = node
            self._inodes_of.setdefault(node.id, []).append(key)

    def add_name(self, node: Node, parent: Node, name: bytes, place: Place) -> None:
        """Add the name ``name`` in ``parent`` to ``node``; ``place`` is that real directory."""
        node.get_name(parent, name, place)

    def remove_name(self, node: Node, parent: Node, name: bytes) -> None:
        """Remove the name ``name`` in ``parent`` from ``node``; see ``Union.outliving``."""
        node.lose_name(parent, name)
        self._release(parent)

    def move(self, node: Node, parent: Node, name: bytes, new_parent: Node, new_name: bytes) -> None:
        """Record a rename of ``node``."""
        node.change_name(parent, name, new_parent, new_name)
        self._release(parent)

    def unnamed(self, parent: Node, held: int) -> Node:
        """A node for an upper file without a name yet (O_TMPFILE); ``held`` is an O_PATH fd of it."""
        st = os.stat(held)
        number = self._free(self.numbers.of(st.st_dev, st.st_ino))
        kind = stat.S_IFMT(st.st_mode)
        node = Node(
            number, parent.territory, parent, b"", kind, [parent.parts[0]],
            generation=next(self._generations), held=held,
        )  # fmt: skip
        self._by_id[number] = node
        self.linked(node, st)
        return node

    def supersede(self, node: Node) -> Node:
        """Make a new node for the object of ``node``; the old node keeps its open files and lookups."""
        number = self._free(hashed(b"after%d" % node.id))
        new = self._by_id[number] = node.supersede(number, next(self._generations))
        for key in self._inodes_of.get(node.id, ()):
            self._by_inode[key] = new
        if node.id in self._inodes_of:
            self._inodes_of[number] = self._inodes_of.pop(node.id)
        return new

    def lose(self, node: Node, parent: Node, name: bytes) -> None:
        """Drop a node whose name another process gave to another object."""
        node.lose_name(parent, name)
        if node.unlinked:
            node.has_key(NO_KEY)
            for key in self._inodes_of.pop(node.id, ()):  # names found later are another node
                if self._by_inode.get(key) is node:
                    del self._by_inode[key]
            for part in node.parts:
                part.lost()
        self._release(parent)

    def forget(self, node: Node, lookups: int) -> None:
        """Subtract lookups that the kernel forgot."""
        node.forgotten(lookups)
        self._release(node)

    def _release(self, node: Node) -> None:
        """Drop the node if nothing needs it, and parents that only it needed."""
        current: Node | None = node
        while current is not None and current.id != ROOT_ID:
            if current.lookups > 0 or current.children or current.superseded:
                return
            if current.use is not None and current.use.handles:
                return
            if self._by_id.get(current.id) is not current:
                return
            del self._by_id[current.id]
            if current.use is not None or current.parts or self._known is not None:
                self._gone(current)
            if current.successor is not None:
                current = current.successor
                current.outlive()
                continue
            for directory in current.forget_names():
                self._release(directory)
            if self._inodes_of or current.held >= 0:
                self._drop_inode(current)
            current = current.parent

    def _drop_inode(self, node: Node) -> None:
        for key in self._inodes_of.pop(node.id, ()):
            if self._by_inode.get(key) is node:
                del self._by_inode[key]
        if node.held >= 0:
            place = node.parts[0] if node.is_dir else node.place
            if self._unstored and place is not None and place.layer.is_upper:
                self._release_number(node.held, place.layer)
            node.hold(-1)

    def _release_number(self, held: int, layer: Layer) -> None:
        """Forget the number of the upper's object ``held``, unless it has names: the inode may be reused."""
        try:
            st = os.stat(held)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            # the server no longer has it, such as a removed directory on NFS
            self._unstored.pop((layer.dev, calls.known_inode(held)), None)
            return
        if st.st_nlink <= layer.links_of_removed:
            self._unstored.pop((st.st_dev, st.st_ino), None)
