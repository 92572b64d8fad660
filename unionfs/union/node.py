"""Nodes: the objects of a union's tree, and the territories that they belong to."""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from typing import Final

from unionfs.sys.calls import os_error
from unionfs.union.attributes import Attributes
from unionfs.union.files import OpenFile, Use
from unionfs.union.listing import Listing
from unionfs.union.places import Place

NAME_MAX: Final = 255
UNSEEN: Final = -1


class Territory(ABC):
    """A part of the tree with rules of its own: the merged layers, or storage bound at one place.

    Nothing is renamed or linked from one to another: EXDEV, as between filesystems.
    """

    __slots__ = ("has_markers", "lasting", "read_only")

    def __init__(self, *, lasting: bool, has_markers: bool, read_only: bool) -> None:
        #: Whether only this daemon changes it, so that answers stay true until it does.
        self.lasting = lasting
        #: Whether a character device 0/0 is a whiteout, so that nobody may make one.
        self.has_markers = has_markers
        #: Whether nothing in it can be changed.
        self.read_only = read_only

    @property
    @abstractmethod
    def durable(self) -> bool:
        """Whether fsync has to reach a disk."""

    @abstractmethod
    def lookup(self, parent: Node, name: bytes, first: int = 0) -> tuple[Node, Attributes] | None:
        """The node called ``name`` in ``parent`` with its attributes; None: there is none.

        ``first``: the index of the topmost of the parent's parts that may have the name, if known.
        """

    @abstractmethod
    def number(self, parent: Node, name: bytes) -> tuple[int, int] | None:
        """``st_ino`` and file type (S_IFMT bits) of what has that name, without a node for it."""

    def number_of_bare_whiteout(self, parent: Node, name: bytes) -> tuple[int, int] | None:
        """The same of a name that has no object, but that overlayfs lists."""
        return None

    @abstractmethod
    def listing(self, directory: Node) -> Listing:
        """The names of a directory. Raises ``OSError``."""

    def is_empty(self, directory: Node) -> bool:
        """Whether a directory has no visible name."""
        return not self.listing(directory).names()

    @abstractmethod
    def add(self, parent: Node, name: bytes, st: os.stat_result, place: Place) -> Node:
        """The node for what was just made in the real directory ``place``: nothing is below it."""

    @abstractmethod
    def unnamed(self, parent: Node, held: int) -> Node:
        """A node for a new file without a name (O_TMPFILE), of which ``held`` is an O_PATH fd."""

    @abstractmethod
    def lost_name(self, node: Node) -> None:
        """The last known name of a node is gone; its object is held."""

    @abstractmethod
    def opened(self, file: OpenFile) -> None:
        """Note what is to be known of a backing file. Raises ``OSError`` for one that cannot be served."""

    def stored_name(self, name: bytes) -> bytes:
        """The name on disk of the xattr that the user calls ``name``."""
        return name

    def shown_names(self, stored: list[bytes]) -> list[bytes]:
        """What the user sees of the names of xattrs kept on disk."""
        return stored

    def require_writable(self) -> None:
        """Raises EROFS when nothing can be changed."""
        if self.read_only:
            raise os_error(errno.EROFS)


class Node:
    """One object of the merged tree."""

    __slots__ = (
        "children", "ctime", "held", "id", "identity", "ino", "key", "kind", "links", "lookups", "name",
        "no_capability", "parent", "parts", "place", "successor", "superseded", "territory", "unlinked",
        "use",
    )  # fmt: skip

    def __init__(
        self,
        id_: int,
        territory: Territory,
        parent: Node | None,
        name: bytes,
        kind: int,
        places: list[Place],
        key: int = 0,
        *,
        ino: int = 0,
        held: int = -1,
        identity: tuple[int, int] | None = None,
    ) -> None:
        """``places``: a directory's parts, or the place of the object. ``ino``: its number if not the id."""
        self.id = id_
        self.ino = ino or id_
        self.territory = territory
        self.parent = parent
        self.name = name
        #: S_IFMT bits of the mode.
        self.kind = kind
        #: Of a directory: the real directories merged into it, topmost first.
        self.parts: list[Place] = []
        #: Of anything else: the real directory that holds it under ``name``, and its `Layer.key`.
        self.place: Place | None = None
        self.key = key
        #: Known nodes below, by name (directories only).
        self.children: dict[bytes, Node] | None = None
        if kind == stat.S_IFDIR:
            self.parts = places
            self.children = {}
        else:
            self.place = places[0]
        #: Further names of an upper file with several hard links.
        self.links: list[tuple[Node, bytes]] | None = None
        self.lookups = 0
        #: An O_PATH fd of an object that has no name.
        self.held = held
        self.unlinked = not name and parent is not None
        #: Of bound storage alone: device and inode number, to see when the name stands for another object.
        self.identity = identity
        #: It is known to have no security.capability; see `shortcuts.Capabilities`.
        self.no_capability = False
        #: A ctime that a copy-up gave the real directory (`UNSEEN`: the one that it has when somebody asks
        #: next), and the one that is shown for it; nanoseconds.
        self.ctime: tuple[int, int] | None = None
        #: From the first open on.
        self.use: Use | None = None
        #: The node that took over everything but the open files; see `NodeTable.supersede`.
        self.successor: Node | None = None
        #: How many nodes it took over from, which are still known.
        self.superseded = 0

    @property
    def is_dir(self) -> bool:
        return self.kind == stat.S_IFDIR

    @property
    def in_place(self) -> bool:
        """Whether it is changed where it is, as in the upper; else it is copied up first. A directory:
        whether its topmost part is.
        """
        if self.kind == stat.S_IFDIR:
            return bool(self.parts) and self.parts[0].layer.in_place
        return self.place is not None and self.place.layer.in_place

    @property
    def is_pure_upper(self) -> bool:
        """Whether nothing of a lower is seen through it."""
        return self.in_place and len(self.parts) <= 1

    @property
    def is_mountpoint(self) -> bool:
        """Whether storage is shown here, so that the name is in use."""
        return self.parent is not None and self.parent.territory is not self.territory

    def attributes_of(self, st: os.stat_result) -> Attributes:
        """What stat(2) says of it, when its object has the attributes ``st``."""
        nlink = st.st_nlink
        if self.unlinked and (self.is_dir or not self.in_place):
            nlink = 0
        elif len(self.parts) > 1:
            nlink = 1  # as overlayfs: counting the subdirectories of a merged directory is not worth it
        # Copying up one name of a lower file with several breaks the link: its count is 1 from then on.
        lasting = self.territory.lasting and (st.st_nlink == 1 or self.is_dir or self.in_place)
        ctime = st.st_ctime_ns if self.ctime is None else self.shown_ctime(st.st_ctime_ns)
        return Attributes(self.ino, nlink, st, ctime, lasting=lasting)

    def in_use(self) -> Use:
        """Its use, which begins now if it has none."""
        if self.use is None:
            self.use = Use()
        return self.use

    def end_use(self) -> None:
        """Nothing of its use is left."""
        self.use = None

    def shown_ctime(self, ctime: int) -> int:
        """The ctime that is shown while the real one is ``ctime``."""
        if self.ctime is None:
            return ctime
        given, shown = self.ctime
        if given == UNSEEN:
            self.ctime = ctime, shown
        return shown if given in (UNSEEN, ctime) else ctime

    def show_ctime(self, shown: int, real: int = UNSEEN) -> None:
        """Show that ctime as long as the real one is the one that a copy-up caused."""
        self.ctime = real, shown

    def lies_in(self, place: Place) -> None:
        """Its object was moved to another real directory."""
        self.place = place

    def changes(self) -> None:
        """Its object is about to change, so that its own ctime counts."""
        self.ctime = None

    def note_capability(self, *, none: bool) -> None:
        """Whether it is known to have no security.capability."""
        self.no_capability = none

    def hold(self, fd: int) -> None:
        """Keep an O_PATH fd of the object, in the place of an older one; -1: keep none."""
        if self.held >= 0:
            os.close(self.held)
        self.held = fd

    def has_key(self, key: int) -> None:
        """What tells its object from another one; see `Layer.key`."""
        self.key = key

    def check(self, st: os.stat_result) -> None:
        """Raise ESTALE for an object that is not the node's, so that the kernel looks the name up again."""
        if self.key:
            assert self.place is not None
            if self.place.layer.key(st) != self.key:
                raise OSError(errno.ESTALE, "a layer holds another object there")

    def looked_up(self) -> None:
        """An answer to the kernel has the node: one lookup more."""
        self.lookups += 1

    # -- changed by the table alone -------------------------------------------------------------------

    def forgotten(self, lookups: int) -> None:
        """The kernel forgot that many lookups."""
        self.lookups -= lookups

    def get_name(self, parent: Node, name: bytes, place: Place) -> None:
        """It is also ``name`` in ``parent``, whose real directory is ``place``."""
        assert parent.children is not None
        parent.children[name] = self
        if self.parent is None or self.unlinked:
            self.parent, self.name, self.place, self.unlinked = parent, name, place, False
            self.hold(-1)
        else:
            if self.links is None:
                self.links = []
            self.links.append((parent, name))

    def lose_name(self, parent: Node, name: bytes) -> None:
        """It is no longer ``name`` in ``parent``."""
        parent.forget_child(name, self)
        if self.links and (parent, name) in self.links:
            self.links.remove((parent, name))
        elif self.parent is parent and self.name == name:
            if self.links:
                self.parent, self.name = self.links.pop()
                assert self.parent is not None
                self.place = self.parent.parts[0]
            else:
                self.unlinked = True

    def change_name(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes) -> None:
        """It was renamed."""
        assert new_parent.children is not None
        parent.forget_child(name, self)
        new_parent.children[new_name] = self
        if self.links and (parent, name) in self.links:
            self.links.remove((parent, name))
            self.links.append((new_parent, new_name))
        else:
            self.parent, self.name = new_parent, new_name
            if self.is_dir:
                self.parts[0].move(new_parent.parts[0], new_name)
            else:
                self.place = new_parent.parts[0]

    def forget_child(self, name: bytes, node: Node) -> None:
        """A name below it no longer stands for that node."""
        if self.children is not None and self.children.get(name) is node:
            del self.children[name]

    def forget_names(self) -> list[Node]:
        """It is no longer known by any name; returns the directories of those but the first."""
        if self.parent is not None:
            self.parent.forget_child(self.name, self)
        if not self.links:
            return []
        for directory, name in self.links:
            directory.forget_child(name, self)
        return [directory for directory, _ in self.links]

    def supersede(self, number: int) -> Node:
        """A new node with that id for its object, its names and what is held; see `NodeTable.supersede`."""
        places = self.parts if self.place is None else [self.place]
        new = Node(number, self.territory, self.parent, self.name, self.kind, places, self.key, ino=self.ino)
        new.links, new.unlinked, new.held = self.links, self.unlinked, self.held
        self.links, self.held = None, -1
        for directory, name in [(self.parent, self.name), *(new.links or ())]:
            known = None if directory is None else directory.children
            if known is not None and known.get(name) is self:
                known[name] = new
        self.successor = new
        new.superseded = 1
        return new

    def outlive(self) -> None:
        """One of the nodes that it took over from is forgotten."""
        self.superseded -= 1
