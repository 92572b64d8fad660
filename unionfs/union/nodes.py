"""The node table: which node id stands for which object of the merged tree.

Rules (the table is the only place that knows them):

- A node keeps its id through copy-up, rename and metadata changes.
- A directory, and an object of a lower, is known by its parent node and name; so each name of a lower file
  with several hard links is a node of its own. An object of the upper with several links is one node with
  several names, found by (device, inode).
- A node's id is its ``st_ino`` (see `numbers`), unless another node has that id.
- A node stays while the kernel looks it up (``lookups``), somebody has it open, or nodes below it stay. Only
  the table counts lookups, and what a session knows of a node (`Use`) goes with it.
- An fd (``held``) is kept for a node whose name is gone, until it is forgotten.
- A node can be superseded: a new node, with a new id and the same ``st_ino``, takes over what it stands for.
  The old id leads to the new node; the old node itself is kept for its open files and lookups.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from typing import Final

from unionfs.union.node import Node, Territory
from unionfs.union.numbers import Numbers, hashed
from unionfs.union.places import Place

ROOT_ID: Final = 1
#: The key of no object.
_NONE: Final = -1


class NodeTable:
    """All nodes that the kernel knows or is about to be told of, and the numbers they have."""

    #: The node of id 1, and the numbers of the merged layers.
    root: Node
    _numbers: Numbers

    def __init__(self, gone: Callable[[Node], None] = lambda node: None) -> None:
        """``gone`` is called with each directory that is forgotten, and with what was in use."""
        self._by_id: dict[int, Node] = {}
        self._by_inode: dict[tuple[int, int], Node] = {}
        self._inode_of: dict[int, tuple[int, int]] = {}
        self._gone = gone

    def __len__(self) -> int:
        return len(self._by_id)

    def add_root(self, territory: Territory, parts: list[Place]) -> None:
        """Begin with the root of the merged tree."""
        self.root = self._by_id[ROOT_ID] = Node(ROOT_ID, territory, None, b"", stat.S_IFDIR)
        self.root.parts = parts
        self.root.lookups = 1
        self._numbers = Numbers(parts[0].layer.dev)

    def get(self, id_: int) -> Node | None:
        """The node with that id, or the one that superseded it, if it is known."""
        node = self._by_id.get(id_)
        while node is not None and node.successor is not None:
            node = node.successor
        return node

    def named(self, id_: int) -> Node | None:
        """The node that has that id itself."""
        return self._by_id.get(id_)

    # -- numbers --------------------------------------------------------------------------------------

    def number(self, parent: Node, name: bytes, st: os.stat_result, place: Place) -> int:
        """The inode number that :meth:`add` would give an object of the real directory ``place``."""
        upper = place.layer.is_upper
        if upper and self._by_inode and not stat.S_ISDIR(st.st_mode):
            known = self._by_inode.get((st.st_dev, st.st_ino))
            if known is not None:
                return known.ino
        return self._free(self._numbers.of(st, parent.ino, name, upper=upper))

    def unreachable(self, parent: Node, name: bytes) -> int:
        """A number for what cannot be looked up; no node has it."""
        return self._free(hashed(b"unreachable%d/%b" % (parent.ino, name)))

    def _free(self, number: int) -> int:
        """The number itself, or another one when a node has it."""
        while number in self._by_id:
            number = hashed(b"taken%d" % number)
        return number

    def copied_up(self, node: Node, st: os.stat_result) -> None:
        """Remember that the upper object with attributes ``st`` carries the number of ``node``."""
        self._numbers.keep(st, node.ino)
        if node.place is not None:
            node.key = node.place.layer.key(st)

    # -- coming and going -----------------------------------------------------------------------------

    def child(self, parent: Node, name: bytes) -> Node | None:
        """The node known under that name."""
        assert parent.children is not None
        return parent.children.get(name)

    def add(self, parent: Node, name: bytes, st: os.stat_result, places: list[Place]) -> Node:
        """The node for an object of the layers: a new one, or the one that has another name already.

        ``places``: a directory's parts, or the one place that holds the object.
        """
        assert parent.children is not None
        kind = stat.S_IFMT(st.st_mode)
        place = places[0]
        upper = place.layer.is_upper
        linkable = upper and kind != stat.S_IFDIR
        if linkable and self._by_inode:
            known = self._by_inode.get((st.st_dev, st.st_ino))
            if known is not None:
                self.add_name(known, parent, name, place)
                return known
        number = self._free(self._numbers.of(st, parent.ino, name, upper=upper))
        node = Node(number, parent.territory, parent, name, kind)
        if kind == stat.S_IFDIR:
            node.parts = places
        else:
            node.place = place
            node.key = place.layer.key(st)
        self._by_id[number] = node
        parent.children[name] = node
        if linkable and st.st_nlink > 1:
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
        """A node for one name of an object of bound storage: hard links are nodes of their own with one
        ``number``. ``held``: an O_PATH fd of an object that has no name to open it by.
        """
        node = Node(self._free(number), territory, parent, name, stat.S_IFMT(st.st_mode))
        node.ino = number
        node.identity = st.st_dev, st.st_ino
        node.held = held
        if node.is_dir:
            node.parts = [place]
        else:
            node.place = place
        self._by_id[node.id] = node
        if name:
            assert parent.children is not None
            parent.children[name] = node
        else:
            node.unlinked = True
        return node

    def linked(self, node: Node, st: os.stat_result) -> None:
        """The upper object of ``node`` got a further hard link."""
        self._by_inode[st.st_dev, st.st_ino] = node
        self._inode_of[node.id] = (st.st_dev, st.st_ino)

    def add_name(self, node: Node, parent: Node, name: bytes, place: Place) -> None:
        """``node`` is also known as ``name`` in ``parent``; ``place`` is that real directory."""
        assert parent.children is not None
        parent.children[name] = node
        if node.parent is None or node.unlinked:
            node.parent, node.name, node.place, node.unlinked = parent, name, place, False
            if node.held >= 0:
                os.close(node.held)
                node.held = -1
        else:
            if node.links is None:
                node.links = []
            node.links.append((parent, name))

    def remove_name(self, node: Node, parent: Node, name: bytes) -> None:
        """``name`` in ``parent`` no longer stands for ``node``; see ``Union.outliving``."""
        assert parent.children is not None
        if parent.children.get(name) is node:
            del parent.children[name]
        if node.links and (parent, name) in node.links:
            node.links.remove((parent, name))
        elif node.parent is parent and node.name == name:
            if node.links:
                node.parent, node.name = node.links.pop()
                assert node.parent is not None
                node.place = node.parent.parts[0]
            else:
                node.unlinked = True
        self._release(parent)

    def move(self, node: Node, parent: Node, name: bytes, new_parent: Node, new_name: bytes) -> None:
        """``node`` was renamed."""
        assert parent.children is not None
        assert new_parent.children is not None
        if parent.children.get(name) is node:
            del parent.children[name]
        new_parent.children[new_name] = node
        if node.links and (parent, name) in node.links:
            node.links.remove((parent, name))
            node.links.append((new_parent, new_name))
        else:
            node.parent, node.name = new_parent, new_name
            if node.is_dir:
                node.parts[0].parent, node.parts[0].name = new_parent.parts[0], new_name
            else:
                node.place = new_parent.parts[0]
        self._release(parent)

    def unnamed(self, parent: Node, held: int) -> Node:
        """A node for an upper file that has no name yet (O_TMPFILE), of which ``held`` is an O_PATH fd."""
        st = os.stat(held)
        number = self._free(self._numbers.of(st, parent.ino, b"", upper=True))
        node = Node(number, parent.territory, parent, b"", stat.S_IFMT(st.st_mode))
        node.place = parent.parts[0]
        node.held = held
        node.unlinked = True
        self._by_id[number] = node
        self.linked(node, st)
        return node

    def supersede(self, node: Node) -> Node:
        """Let a new node stand for the object of ``node``, which keeps its open files and lookups."""
        number = self._free(hashed(b"after%d" % node.id))
        new = Node(number, node.territory, node.parent, node.name, node.kind)
        new.ino = node.ino
        new.place, new.links, new.unlinked = node.place, node.links, node.unlinked
        new.key = node.key
        node.links = None
        new.held, node.held = node.held, -1
        self._by_id[number] = new
        for directory, name in [(node.parent, node.name), *(new.links or ())]:
            known = None if directory is None else directory.children
            if known is not None and known.get(name) is node:
                known[name] = new
        key = self._inode_of.pop(node.id, None)
        if key is not None:
            self._inode_of[number] = key
            self._by_inode[key] = new
        node.successor = new
        new.superseded = 1
        return new

    def lose(self, node: Node, parent: Node, name: bytes) -> None:
        """Another object was given the node's name behind the union: nothing is left of the node."""
        node.key = _NONE
        for part in node.parts:
            part.key = _NONE
        self.remove_name(node, parent, name)

    def looked_up(self, node: Node) -> None:
        """The kernel is told of the node, which counts one lookup."""
        node.lookups += 1

    def all_looked_up(self, nodes: Iterable[Node]) -> None:
        """The same for several."""
        for node in nodes:
            node.lookups += 1

    def forget(self, node: Node, lookups: int) -> None:
        """The kernel gave back that many lookups."""
        node.lookups -= lookups
        self._release(node)

    def _release(self, node: Node) -> None:
        """Drop the node, and the parents that only it kept, when nobody needs it."""
        current: Node | None = node
        while current is not None and current.id != ROOT_ID:
            if current.lookups > 0 or current.children or current.superseded:
                return
            if current.use is not None and current.use.handles:
                return
            if self._by_id.get(current.id) is not current:
                return
            del self._by_id[current.id]
            if current.use is not None or current.parts:
                self._gone(current)
            if current.successor is not None:
                current = current.successor
                current.superseded -= 1
                continue
            parent = current.parent
            _remove_child(parent, current.name, current)
            for other, name in current.links or ():
                _remove_child(other, name, current)
                self._release(other)
            self._drop_inode(current)
            current = parent

    def _drop_inode(self, node: Node) -> None:
        key = self._inode_of.pop(node.id, None)
        if key is not None and self._by_inode.get(key) is node:
            del self._by_inode[key]
        if node.held >= 0:
            place = node.parts[0] if node.is_dir else node.place
            if place is not None and place.layer.is_upper:
                self._numbers.release(node.held, place.layer)
            os.close(node.held)
            node.held = -1


def _remove_child(parent: Node | None, name: bytes, node: Node) -> None:
    if parent is not None and parent.children is not None and parent.children.get(name) is node:
        del parent.children[name]
