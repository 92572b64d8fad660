"""The node table: maps node ids to objects of the merged tree.

Rules (the table is the only place that implements them):

- A node keeps its id through copy-up, rename and metadata changes.
- A directory, and an object of a lower, is identified by its parent node and name; so each name of a lower
  file with several hard links is a separate node. An object of the upper with several links is one node with
  several names, found by (device, inode).
- A node's id is its ``st_ino`` (see `numbers`), unless another node has that id. Ids are used again, and then
  with another generation: a file handle of a forgotten node is stale.
- A node stays while the kernel holds lookups (``lookups``), it is open, or nodes below it stay. Only the
  table subtracts lookups; a session's state about a node (`Use`) ends with the node.
- A node without a name keeps an fd (``held``) until it is forgotten.
- A node can be superseded: a new node, with a new id and the same ``st_ino``, takes over its object. The old
  id leads to the new node; the old node itself stays for its open files and lookups.
"""

from __future__ import annotations

import itertools
import os
import secrets
import stat
from collections.abc import Callable
from typing import Final

from unionfs.union.node import Node, Territory
from unionfs.union.numbers import Numbers, hashed
from unionfs.union.places import NO_KEY, Place

ROOT_ID: Final = 1


class NodeTable:
    """All nodes that the kernel knows or is about to receive, and their ids."""

    #: The node of id 1, and the numbers of the merged layers.
    root: Node
    _numbers: Numbers

    def __init__(self, gone: Callable[[Node], None] = lambda node: None) -> None:
        """``gone`` is called for each forgotten directory, and for each forgotten node that was in use."""
        self._by_id: dict[int, Node] = {}
        self._by_inode: dict[tuple[int, int], Node] = {}
        self._inode_of: dict[int, tuple[int, int]] = {}
        self._gone = gone
        #: The generation of the next node. The kernel sees 32 bits: those of two mounts hardly ever meet.
        self._generations = itertools.count(secrets.randbits(32))

    def __len__(self) -> int:
        return len(self._by_id)

    def add_root(self, territory: Territory, parts: list[Place]) -> None:
        """Add the root of the merged tree."""
        self.root = self._by_id[ROOT_ID] = Node(ROOT_ID, territory, None, b"", stat.S_IFDIR, parts)
        self.root.looked_up()
        self._numbers = Numbers(parts[0].layer.dev)

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

    def number(self, parent: Node, name: bytes, st: os.stat_result, place: Place) -> int:
        """The inode number that :meth:`add` would assign to an object of the real directory ``place``."""
        upper = place.layer.is_upper
        if upper and self._by_inode and not stat.S_ISDIR(st.st_mode):
            known = self._by_inode.get((st.st_dev, st.st_ino))
            if known is not None:
                return known.ino
        return self._free(self._numbers.of(st, parent.ino, name, upper=upper))

    def unreachable(self, parent: Node, name: bytes) -> int:
        """A number for an object that cannot be looked up; no node has it."""
        return self._free(hashed(b"unreachable%d/%b" % (parent.ino, name)))

    def _free(self, number: int) -> int:
        """The number itself, or another one if a node has it."""
        while number in self._by_id:
            number = hashed(b"taken%d" % number)
        return number

    def copied_up(self, node: Node, st: os.stat_result) -> None:
        """Remember that the upper object with attributes ``st`` carries the number of ``node``."""
        self._numbers.keep(st, node.ino)
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
        linkable = upper and kind != stat.S_IFDIR
        if linkable and self._by_inode:
            known = self._by_inode.get((st.st_dev, st.st_ino))
            if known is not None:
                self.add_name(known, parent, name, place)
                return known
        number = self._free(self._numbers.of(st, parent.ino, name, upper=upper))
        key = 0 if kind == stat.S_IFDIR else place.layer.key(st)
        node = Node(
            number, parent.territory, parent, name, kind, places, key, generation=next(self._generations)
        )
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
        """Record that the upper object of ``node`` got another hard link."""
        self._by_inode[st.st_dev, st.st_ino] = node
        self._inode_of[node.id] = (st.st_dev, st.st_ino)

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
        number = self._free(self._numbers.of(st, parent.ino, b"", upper=True))
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
        key = self._inode_of.pop(node.id, None)
        if key is not None:
            self._inode_of[number] = key
            self._by_inode[key] = new
        return new

    def lose(self, node: Node, parent: Node, name: bytes) -> None:
        """Drop a node whose name another process gave to another object."""
        node.has_key(NO_KEY)
        for part in node.parts:
            part.lost()
        self.remove_name(node, parent, name)

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
            if current.use is not None or current.parts:
                self._gone(current)
            if current.successor is not None:
                current = current.successor
                current.outlive()
                continue
            for directory in current.forget_names():
                self._release(directory)
            if self._inode_of or current.held >= 0:
                self._drop_inode(current)
            current = current.parent

    def _drop_inode(self, node: Node) -> None:
        key = self._inode_of.pop(node.id, None)
        if key is not None and self._by_inode.get(key) is node:
            del self._by_inode[key]
        if node.held >= 0:
            place = node.parts[0] if node.is_dir else node.place
            if place is not None and place.layer.is_upper:
                self._numbers.release(node.held, place.layer)
            node.hold(-1)
