"""Nodes, the objects of a union's tree, and the territories they belong to."""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from typing import Final

from unionfs.sys.calls import os_error
from unionfs.union.attributes import Attributes, with_blocks
from unionfs.union.files import OpenFile, Use
from unionfs.union.listing import Listing
from unionfs.union.owners import Owners
from unionfs.union.places import Layer, LowerData, Place

NAME_MAX: Final = 255
UNSEEN: Final = -1


class Territory(ABC):
    """A part of the tree with its own rules: the merged layers, or storage bound at one place.

    Renames and links from one territory to another are EXDEV, as between filesystems.
    """

    __slots__ = ("has_markers", "lasting", "owners", "read_only")

    def __init__(
        self, *, lasting: bool, has_markers: bool, read_only: bool, owners: Owners | None = None
    ) -> None:
        #: Whether only this daemon changes it, so that cached answers stay valid until it does.
        self.lasting = lasting
        #: Whether a character device 0/0 is a whiteout, and making one is refused.
        self.has_markers = has_markers
        #: Whether it is read-only.
        self.read_only = read_only
        #: How owners are shown; None: as they are stored.
        self.owners = owners

    @property
    @abstractmethod
    def durable(self) -> bool:
        """Whether fsync must reach a disk."""

    @abstractmethod
    def lookup(self, parent: Node, name: bytes, first: int = 0) -> tuple[Node, Attributes] | None:
        """The node ``name`` in ``parent`` with its attributes, or None.

        ``first``: the index of the topmost part of the parent that may have the name, if known.
        """

    @abstractmethod
    def number(self, parent: Node, name: bytes) -> tuple[int, int] | None:
        """``st_ino`` and file type (S_IFMT bits) of a name, without creating a node."""

    def number_of_bare_whiteout(self, parent: Node, name: bytes) -> tuple[int, int] | None:
        """The same for a name without an object that overlayfs lists."""
        return None

    @abstractmethod
    def listing(self, directory: Node) -> Listing:
        """The names of a directory. Raises ``OSError``."""

    def is_empty(self, directory: Node) -> bool:
        """Whether a directory has no visible name."""
        return not self.listing(directory).names()

    @abstractmethod
    def add(self, parent: Node, name: bytes, st: os.stat_result, place: Place) -> Node:
        """The node of a new object in the real directory ``place``, without lower parts."""

    @abstractmethod
    def unnamed(self, parent: Node, held: int) -> Node:
        """A node for a new file without a name (O_TMPFILE); ``held`` is an O_PATH fd of it."""

    @abstractmethod
    def lost_name(self, node: Node) -> None:
        """The last known name of a node was removed; its object is held."""

    @abstractmethod
    def opened(self, node: Node, file: OpenFile) -> LowerData | None:
        """Record facts about the object of a node, just opened. Returns where its data lies if not in it (see
        `Node.lower_data`). Raises ``OSError`` for a file that cannot be served."""

    def stored_name(self, name: bytes) -> bytes:
        """The name on disk of the user's xattr ``name``."""
        return name

    def shown_names(self, stored: list[bytes]) -> list[bytes]:
        """Convert names of xattrs on disk to the names that users see."""
        return stored

    def require_writable(self) -> None:
        """Raises EROFS if the territory is read-only."""
        if self.read_only:
            raise os_error(errno.EROFS)


class Node:
    """One object of the merged tree."""

    __slots__ = (
        "children", "ctime", "entry", "flags", "from_origin", "generation", "held", "id", "identity", "ino",
        "key", "kind", "links", "lookups", "lower_data", "lower_links", "more_links", "name", "no_capability",
        "parent", "parts", "place",
        "successor", "superseded", "territory", "unlinked", "use",
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
        generation: int = 0,
        held: int = -1,
        identity: tuple[int, int] | None = None,
    ) -> None:
        """``places``: a directory's parts, or the object's place. ``ino``: its number, the id by default."""
        self.id = id_
        #: Distinguishes it from all other nodes with its id: 32 bits, as in file handles (fs/fuse/inode.c).
        self.generation = generation
        self.ino = ino or id_
        self.territory = territory
        self.parent = parent
        self.name = name
        #: S_IFMT bits of the mode.
        self.kind = kind
        #: For a directory: the real directories merged into it, topmost first.
        self.parts: list[Place] = places if kind == stat.S_IFDIR else []
        #: For other types: the real directory that contains it as ``name``, and its `Layer.key`.
        self.place: Place | None = None if kind == stat.S_IFDIR else places[0]
        self.key = key
        #: Known nodes below, by name (directories only).
        self.children: dict[bytes, Node] | None = {} if kind == stat.S_IFDIR else None
        #: Where the data of a metacopy object lies; None: in the object, as far as known before it is opened.
        self.lower_data: LowerData | None = None
        self.flags: int | None = None  # see `flags`; None: unknown
        #: Additional names of a file with several hard links, with the real directory of each.
        self.links: list[tuple[Node, bytes, Place]] | None = None
        #: For a lower file with several hard links: the name of its copy in the index, st_nlink of the
        #: original (0 if unknown), and how many names the union has more than st_nlink of the copy.
        self.entry: bytes | None = None
        self.lower_links = 0
        self.more_links = 0
        self.lookups = 0
        #: An O_PATH fd of an object that has no name.
        self.held = held
        self.unlinked = not name and parent is not None
        #: For bound storage only: device and inode number, to detect another object under the name.
        self.identity = identity
        #: It is known to have no security.capability; see `shortcuts.Capabilities`.
        self.no_capability = False
        #: Its number is that of its origin; see `origin`.
        self.from_origin = False
        #: The ctime set by a copy-up (`UNSEEN`: the one at the next query), and the one shown instead; ns.
        self.ctime: tuple[int, int] | None = None
        #: Set at the first open.
        self.use: Use | None = None
        #: The node that took over its state except the open files; see `NodeTable.supersede`.
        self.successor: Node | None = None
        #: The number of known nodes that it superseded.
        self.superseded = 0

    @property
    def is_dir(self) -> bool:
        return self.kind == stat.S_IFDIR

    @property
    def layer(self) -> Layer:
        """The layer of its object; for a directory, of its topmost part."""
        place = self.parts[0] if self.place is None else self.place
        return place.layer

    @property
    def in_place(self) -> bool:
        """Whether it is changed in place, as in the upper, without a copy-up. For a directory: whether its
        topmost part is.
        """
        if self.kind == stat.S_IFDIR:
            return bool(self.parts) and self.parts[0].layer.in_place
        return self.place is not None and self.place.layer.in_place

    @property
    def data_in_place(self) -> bool:
        """Whether its data is changed in place too. Valid for a file that was opened."""
        return self.lower_data is None and self.in_place

    @property
    def is_indexed(self) -> bool:
        """Whether it is a copy in the index, by which its object is accessed."""
        return self.entry is not None and self.place is not None and self.place.layer.is_upper

    @property
    def is_linked_lower(self) -> bool:
        """Whether it is a lower file with several hard links, and copied up into the index before it loses a
        name."""
        return self.entry is not None and not self.in_place

    @property
    def lacks_names(self) -> bool:
        """Whether it is a copy in the index, and some names of its are only in a lower. Each of the others
        counts in ``st_nlink`` of the copy, as does the entry itself."""
        return self.entry is not None and self.more_links >= 0 and self.is_indexed

    def names(self) -> list[tuple[Node, bytes]]:
        """Its known names, each with its directory."""
        if self.unlinked or self.parent is None:
            return []
        return [(self.parent, self.name), *((parent, name) for parent, name, _ in self.links or ())]

    @property
    def real_name(self) -> bytes:
        """The name of a non-directory in its `place`."""
        return self.entry if self.entry is not None and self.is_indexed else self.name

    @property
    def is_pure_upper(self) -> bool:
        """Whether it has no lower parts."""
        return self.in_place and len(self.parts) <= 1

    @property
    def is_mountpoint(self) -> bool:
        """Whether it is the root of bound storage, so that the name is in use."""
        return self.parent is not None and self.parent.territory is not self.territory

    def attributes_of(self, st: os.stat_result) -> Attributes:
        """The result of stat(2), for an object with the attributes ``st``."""
        nlink = st.st_nlink
        if self.more_links:  # by an xattr, which may be wrong
            nlink = max(nlink + self.more_links, 0 if self.unlinked else 1)
        if self.unlinked and (self.is_dir or not self.in_place):
            nlink = 0
        elif len(self.parts) > 1:
            nlink = 1  # as overlayfs, which does not count the subdirectories of a merged directory
        # Without an index, copying up one name of a lower file with several breaks the link.
        lasting = self.territory.lasting and (
            st.st_nlink == 1 or self.is_dir or self.in_place or self.entry is not None
        )
        ctime = st.st_ctime_ns if self.ctime is None else self.shown_ctime(st.st_ctime_ns)
        owners = self.territory.owners
        if owners is not None:
            st = owners.show(st, self.layer)
            nlink = 1 if self.is_dir and nlink and owners.static_nlink else nlink
        if self.lower_data is not None:
            st = with_blocks(st, self.lower_data.blocks)
        return Attributes(self.ino, nlink, st, ctime, lasting=lasting)

    def in_use(self) -> Use:
        """Its use, created if it has none."""
        if self.use is None:
            self.use = Use()
        return self.use

    def end_use(self) -> None:
        """End its use."""
        self.use = None

    def shown_ctime(self, ctime: int) -> int:
        """The ctime to show while the real one is ``ctime``."""
        if self.ctime is None:
            return ctime
        given, shown = self.ctime
        if given == UNSEEN:
            self.ctime = ctime, shown
        return shown if given in (UNSEEN, ctime) else ctime

    def show_ctime(self, shown: int, real: int = UNSEEN) -> None:
        """Show that ctime while the real one is the one set by a copy-up."""
        self.ctime = real, shown

    def has_parts(self, parts: list[Place]) -> None:
        """Set the real directories merged into it."""
        self.parts = parts

    def lies_in(self, place: Place) -> None:
        """Record that its object moved to another real directory."""
        self.place = place

    def know_flags(self, flags: int | None) -> None:
        """Record the flags that apply to it; None: unknown."""
        self.flags = flags

    def data_lies_in(self, data: LowerData | None) -> None:
        """Record where its data lies; None: in its object."""
        self.lower_data = data

    def changes(self) -> None:
        """Its object is about to change: show its real ctime from now on."""
        self.ctime = None

    def note_capability(self, *, none: bool) -> None:
        """Record whether it is known to have no security.capability."""
        self.no_capability = none

    def hold(self, fd: int) -> None:
        """Keep an O_PATH fd of the object, replacing an older one; -1: keep none."""
        if self.held >= 0:
            os.close(self.held)
        self.held = fd

    def has_number(self, number: int) -> None:
        """Set its number: a copied-up name of a lower file with several is a file of its own."""
        self.ino = number

    def has_origin(self) -> None:
        """Record that its number is that of its origin."""
        self.from_origin = True

    def may_be_indexed(self, entry: bytes, lower_links: int) -> None:
        """Record the name of its copy in the index, and ``st_nlink`` of the original (0: unknown)."""
        self.entry = entry
        if lower_links:
            self.lower_links = lower_links

    def is_indexed_copy(self, index: Place, more_links: int) -> None:
        """Record that its object is the copy in the index."""
        self.place, self.more_links = index, more_links

    def has_more_links(self, more_links: int) -> None:
        """Set how many names the union has more than the copy."""
        self.more_links = more_links

    def leaves_index(self) -> None:
        """Record that its entry in the index was removed; an fd of the object is held."""
        self.entry, self.more_links = None, 0

    def has_key(self, key: int) -> None:
        """Set the key that identifies its object; see `Layer.key`."""
        self.key = key

    def check(self, st: os.stat_result) -> None:
        """Raise ESTALE if the object is not the node's, so that the kernel looks the name up again."""
        if self.key:
            assert self.place is not None
            if self.place.layer.key(st) != self.key:
                raise OSError(errno.ESTALE, "a layer holds another object there")

    def looked_up(self) -> None:
        """Count a lookup: an answer to the kernel contains the node."""
        self.lookups += 1

    # -- changed by the table alone -------------------------------------------------------------------

    def forgotten(self, lookups: int) -> None:
        """Subtract lookups that the kernel forgot."""
        self.lookups -= lookups

    def get_name(self, parent: Node, name: bytes, place: Place) -> None:
        """Add the name ``name`` in ``parent``, whose real directory is ``place``."""
        assert parent.children is not None
        parent.children[name] = self
        if self.parent is None or self.unlinked:
            if not self.is_indexed:
                self.place = place
            self.parent, self.name, self.unlinked = parent, name, False
            self.hold(-1)
        else:
            if self.links is None:
                self.links = []
            self.links.append((parent, name, place))

    def _take_link(self, parent: Node, name: bytes) -> bool:
        """Remove an additional name; returns whether there was one."""
        for position, (directory, known, _) in enumerate(self.links or ()):
            if directory is parent and known == name:
                assert self.links is not None
                del self.links[position]
                return True
        return False

    def lose_name(self, parent: Node, name: bytes) -> None:
        """Remove the name ``name`` in ``parent``."""
        parent.forget_child(name, self)
        if not self._take_link(parent, name) and self.parent is parent and self.name == name:
            if self.links:
                self.parent, self.name, place = self.links.pop()
                if not self.is_indexed:
                    self.place = place
            else:
                self.unlinked = True

    def change_name(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes) -> None:
        """Record a rename."""
        assert new_parent.children is not None
        parent.forget_child(name, self)
        new_parent.children[new_name] = self
        if self._take_link(parent, name):
            assert self.links is not None
            self.links.append((new_parent, new_name, new_parent.parts[0]))
        else:
            self.parent, self.name = new_parent, new_name
            if self.is_dir:
                self.parts[0].move(new_parent.parts[0], new_name)
            elif not self.is_indexed:
                self.place = new_parent.parts[0]

    def forget_child(self, name: bytes, node: Node) -> None:
        """Forget that a name below it refers to the node."""
        if self.children is not None and self.children.get(name) is node:
            del self.children[name]

    def forget_names(self) -> list[Node]:
        """Forget all its names; returns the directories of all but the first."""
        if self.parent is not None:
            self.parent.forget_child(self.name, self)
        if not self.links:
            return []
        for directory, name, _ in self.links:
            directory.forget_child(name, self)
        return [directory for directory, _, _ in self.links]

    def supersede(self, number: int, generation: int) -> Node:
        """A new node that takes over object, names and held fd; see `NodeTable.supersede`."""
        places = self.parts if self.place is None else [self.place]
        new = Node(
            number, self.territory, self.parent, self.name, self.kind, places, self.key, ino=self.ino,
            generation=generation,
        )  # fmt: skip
        new.links, new.unlinked, new.held = self.links, self.unlinked, self.held
        new.lower_data, new.flags = self.lower_data, self.flags
        new.from_origin = self.from_origin
        new.entry, new.lower_links, new.more_links = self.entry, self.lower_links, self.more_links
        self.links, self.held = None, -1
        for directory, name, _ in [(self.parent, self.name, None), *(new.links or ())]:
            known = None if directory is None else directory.children
            if known is not None and known.get(name) is self:
                known[name] = new
        self.successor = new
        new.superseded = 1
        return new

    def outlive(self) -> None:
        """Record that one of the nodes it superseded is forgotten."""
        self.superseded -= 1
