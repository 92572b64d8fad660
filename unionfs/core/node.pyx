"""Nodes, the objects of a union's tree."""

from libc.errno cimport ESTALE
from libc.string cimport memcpy
from posix.unistd cimport close

from unionfs.core.places cimport require_some
from unionfs.core.state cimport UNLINKED
from unionfs.core.stats cimport (
    S_IFDIR, S_IFMT, ctime_of, failure, fill_attr, read_result, result_of,
)

NAME_MAX = 255
UNSEEN = -1

cdef enum:
    C_UNSEEN = -1

#: The parts of all nodes that are not directories.
cdef list NO_PARTS = []


cdef class Attributes:
    """The attributes of the real object, with inode number, link count and ctime of the merged tree."""

    # node: the object's node, if known.
    # lasting: whether they stay valid until the daemon changes them.

    @property
    def st(self):
        """Those of the real object."""
        if self.result is None:
            self.result = result_of(&self.stat)
        return self.result

    cdef void fill(self, fuse_attr *attr) noexcept:
        fill_attr(attr, &self.stat, self.ino, self.nlink, self.ctime_ns)

    def packed(self):
        """struct fuse_attr."""
        cdef fuse_attr attr
        self.fill(&attr)
        return (<char *>&attr)[:sizeof(fuse_attr)]


cdef Node new_node(
    uint64_t id_, Territory territory, Node parent, bytes name, uint32_t kind, list places, int64_t key,
    uint64_t ino, uint32_t generation
):
    cdef Node node = Node.__new__(Node)
    node.begin(id_, territory, parent, name, kind, places, key, ino, generation)
    return node


cdef class Rare:
    """What hardly any node has: a `Node` has one of these only when needed."""

    # lower_data: where the data of a metacopy object lies; None: in the object, as far as known before it is
    #     opened.
    # links: additional names of a file with several hard links, with the real directory of each.
    # entry, lower_links, more_links: for a lower file with several hard links: the name of its copy in the
    #     index, st_nlink of the original (0 if unknown), and how many names the union has more than st_nlink
    #     of the copy.
    # identity: for bound storage only: device and inode number, to detect another object under the name.
    # successor: the node that took over its state except the open files; see `NodeTable.supersede`.
    # superseded: the number of known nodes that it superseded.
    # ctime_given, ctime_shown: see `Node.ctime`; valid if has_ctime.


cdef class Node:
    """One object of the merged tree."""

    # generation: distinguishes it from all other nodes with its id: 32 bits, as in file handles
    #     (fs/fuse/inode.c).
    # kind: S_IFMT bits of the mode.
    # parts: of a directory: the real directories merged into it, topmost first.
    # place, key: of other types: the real directory that contains it as ``name``, and its `Layer.key`.
    # children: known nodes below, by name (directories only).
    # flags: see `union.flags`; None: unknown.
    # held: an O_PATH fd of an object that has no name.
    # no_capability: it is known to have no security.capability; see `shortcuts.Capabilities`.
    # from_origin: its number is that of its origin; see `origin`.
    # use: set at the first open.
    # rare: None, or the rest.
    # record: what another daemon would need; see `state`.

    def __init__(
        self,
        id_,
        Territory territory not None,
        Node parent,
        bytes name not None,
        kind,
        list places not None,
        key=0,
        *,
        ino=0,
        generation=0,
        held=-1,
        identity=None,
    ):
        """``places``: a directory's parts, or the object's place. ``ino``: its number, the id by default."""
        require_some(places)
        self.begin(id_, territory, parent, name, kind, places, key, ino, generation)
        self.held = held
        if identity is not None:
            self.uncommon().identity = identity

    cdef void begin(
        self, uint64_t id_, Territory territory, Node parent, bytes name, uint32_t kind, list places, int64_t key,
        uint64_t ino, uint32_t generation
    ):
        self.id, self.generation, self.ino = id_, generation, ino if ino else id_
        self.territory, self.parent, self.name, self.kind = territory, parent, name, kind
        if kind == S_IFDIR:
            self.parts, self.place, self.children = places, None, {}
        else:
            self.parts, self.place, self.children = NO_PARTS, places[0], None
        self.key, self.held = key, -1
        self.unlinked = not name and parent is not None

    cdef Rare uncommon(self):
        """Its rare attributes, to change them."""
        if self.rare is None:
            self.rare = Rare.__new__(Rare)
        return self.rare

    @property
    def entry(self):
        return None if self.rare is None else self.rare.entry

    @property
    def links(self):
        return None if self.rare is None else self.rare.links

    @property
    def lower_links(self):
        return 0 if self.rare is None else self.rare.lower_links

    @property
    def more_links(self):
        return 0 if self.rare is None else self.rare.more_links

    @property
    def lower_data(self):
        return None if self.rare is None else self.rare.lower_data

    @property
    def identity(self):
        return None if self.rare is None else self.rare.identity

    @property
    def successor(self):
        return successor_of(self)

    @property
    def superseded(self):
        return 0 if self.rare is None else self.rare.superseded

    @property
    def ctime(self):
        """The ctime set by a copy-up (`UNSEEN`: the one at the next query), and the one shown instead; ns."""
        if self.rare is None or not self.rare.has_ctime:
            return None
        return (self.rare.ctime_given, self.rare.ctime_shown)

    @property
    def is_dir(self):
        return self.kind == S_IFDIR

    cdef Layer top_layer(self):
        cdef Place place = self.place
        if place is None:
            place = self.parts[0]
        return place.layer

    @property
    def layer(self):
        """The layer of its object; for a directory, of its topmost part."""
        return self.top_layer()

    cdef bint is_changed_in_place(self) noexcept:
        if self.kind == S_IFDIR:
            return len(self.parts) > 0 and (<Place>self.parts[0]).layer.in_place
        return self.place is not None and self.place.layer.in_place

    @property
    def in_place(self):
        """Whether it is changed in place, as in the upper, without a copy-up. For a directory: whether its
        topmost part is.
        """
        return self.is_changed_in_place()

    @property
    def data_in_place(self):
        """Whether its data is changed in place too. Valid for a file that was opened."""
        return not has_lower_data(self) and self.is_changed_in_place()

    cdef bint is_copy_in_index(self) noexcept:
        return has_entry(self) and self.place is not None and self.place.layer.is_upper

    @property
    def is_indexed(self):
        """Whether it is a copy in the index, by which its object is accessed."""
        return self.is_copy_in_index()

    @property
    def is_linked_lower(self):
        """Whether it is a lower file with several hard links, and copied up into the index before it loses a
        name."""
        return has_entry(self) and not self.is_changed_in_place()

    @property
    def lacks_names(self):
        """Whether it is a copy in the index, and some names of its are only in a lower. Each of the others
        counts in ``st_nlink`` of the copy, as does the entry itself."""
        return self.is_copy_in_index() and self.rare.more_links >= 0

    def names(self):
        """Its known names, each with its directory."""
        if self.unlinked or self.parent is None:
            return []
        return [(self.parent, self.name), *[(parent, name) for parent, name, _ in self.links or ()]]

    cdef bytes stored_name(self):
        return self.rare.entry if self.is_copy_in_index() else self.name

    @property
    def real_name(self):
        """The name of a non-directory in its `place`."""
        return self.stored_name()

    @property
    def is_pure_upper(self):
        """Whether it has no lower parts."""
        return self.is_changed_in_place() and len(self.parts) <= 1

    @property
    def is_mountpoint(self):
        """Whether it is the root of bound storage, so that the name is in use."""
        return self.parent is not None and self.parent.territory is not self.territory

    def attributes_of(self, st):
        """The result of stat(2), for an object with the attributes ``st``."""
        cdef stat_t given
        read_result(st, &given)
        return self.shown(&given)

    cdef Attributes shown(self, const stat_t *st):
        cdef Attributes result = Attributes.__new__(Attributes)
        cdef int64_t nlink = st.st_nlink
        cdef bint is_dir = self.kind == S_IFDIR, in_place = self.is_changed_in_place()
        memcpy(&result.stat, st, sizeof(stat_t))
        cdef Rare rare = self.rare
        if rare is not None and rare.more_links:  # by an xattr, which may be wrong
            nlink = max(nlink + rare.more_links, 0 if self.unlinked else 1)
        if self.unlinked and (is_dir or not in_place):
            nlink = 0
        elif len(self.parts) > 1:
            nlink = 1  # as overlayfs, which does not count the subdirectories of a merged directory
        # Without an index, copying up one name of a lower file with several breaks the link.
        result.lasting = self.territory.lasting and (
            st.st_nlink == 1 or is_dir or in_place or has_entry(self)
        )
        result.ctime_ns = self.ctime_to_show(ctime_of(st))
        owners = self.territory.owners
        if owners is not None:
            result.result = owners.show(result_of(st), self.top_layer())
            read_result(result.result, &result.stat)
            if is_dir and nlink and owners.static_nlink:
                nlink = 1
        if rare is not None and rare.lower_data is not None:
            result.stat.st_blocks = rare.lower_data.blocks
            result.result = None
        result.node = self
        result.ino = self.ino
        result.nlink = <uint32_t>nlink
        return result

    cpdef Use in_use(self):
        """Its use, created if it has none."""
        if self.use is None:
            self.use = Use()
        return self.use

    def end_use(self):
        """End its use."""
        self.use = None

    cdef int64_t ctime_to_show(self, int64_t ctime) noexcept:
        cdef Rare rare = self.rare
        if rare is None or not rare.has_ctime:
            return ctime
        if rare.ctime_given == C_UNSEEN:
            rare.ctime_given = ctime
            return rare.ctime_shown
        return rare.ctime_shown if rare.ctime_given == ctime else ctime

    def show_ctime(self, int64_t shown, int64_t real=C_UNSEEN):
        """Show that ctime while the real one is the one set by a copy-up."""
        cdef Rare rare = self.uncommon()
        rare.has_ctime, rare.ctime_given, rare.ctime_shown = True, real, shown

    def has_parts(self, list parts not None):
        """Set the real directories merged into it."""
        require_some(parts)
        self.parts = parts

    def lies_in(self, Place place not None):
        """Record that its object moved to another real directory."""
        self.place = place

    def know_flags(self, flags):
        """Record the flags that apply to it; None: unknown."""
        self.flags = flags

    def data_lies_in(self, data):
        """Record where its data lies; None: in its object."""
        if data is not None or self.rare is not None:
            self.uncommon().lower_data = data

    def changes(self):
        """Its object is about to change: show its real ctime from now on."""
        if self.rare is not None:
            self.rare.has_ctime = False

    def note_capability(self, *, bint none):
        """Record whether it is known to have no security.capability."""
        self.no_capability = none

    def hold(self, int fd):
        """Keep an O_PATH fd of the object, replacing an older one; -1: keep none."""
        if self.record != NULL:
            self.record.held = fd
        if self.held >= 0:
            close(self.held)
        self.held = fd

    def has_origin(self):
        """Record that its number is that of its origin."""
        self.from_origin = True

    def may_be_indexed(self, bytes entry, lower_links):
        """Record the name of its copy in the index, and ``st_nlink`` of the original (0: unknown)."""
        cdef Rare rare = self.uncommon()
        rare.entry = entry
        if lower_links:
            rare.lower_links = lower_links

    def is_indexed_copy(self, Place index not None, more_links):
        """Record that its object is the copy in the index."""
        self.place = index
        self.uncommon().more_links = more_links

    def has_more_links(self, more_links):
        """Set how many names the union has more than the copy."""
        self.uncommon().more_links = more_links

    def leaves_index(self):
        """Record that its entry in the index was removed; an fd of the object is held."""
        cdef Rare rare = self.uncommon()
        rare.entry, rare.more_links = None, 0

    def has_key(self, int64_t key):
        """Set the key that identifies its object; see `Layer.key`."""
        self.key = key

    def check(self, st):
        """Raise ESTALE if the object is not the node's, so that the kernel looks the name up again."""
        cdef stat_t given
        if self.key:
            read_result(st, &given)
            self.check_stat(&given)

    cdef int check_stat(self, const stat_t *st) except -1:
        # A directory has a key only after it was lost.
        if self.key and (self.place is None or self.place.layer.key_of(st) != self.key):
            raise OSError(ESTALE, "a layer holds another object there")
        return 0

    def looked_up(self, uint64_t unique=0):
        """Count a lookup: an answer to the kernel contains the node. ``unique``: the number of the request."""
        count_lookup(self, unique)

    # -- changed by the table alone -------------------------------------------------------------------

    def forgotten(self, int64_t lookups):
        """Subtract lookups that the kernel forgot."""
        self.lookups -= lookups

    def get_name(self, Node parent not None, bytes name not None, Place place):
        """Add the name ``name`` in ``parent``, whose real directory is ``place``."""
        cdef Rare rare
        parent.children[name] = self
        if self.parent is None or self.unlinked:
            if not self.is_copy_in_index():
                self.place = place
            self.parent, self.name, self.unlinked = parent, name, False
            self.hold(-1)
        else:
            rare = self.uncommon()
            if rare.links is None:
                rare.links = []
            rare.links.append((parent, name, place))

    def take_link(self, Node parent, bytes name):
        """Remove an additional name; returns whether there was one."""
        for position, (directory, known, _) in enumerate(self.links or ()):
            if directory is parent and known == name:
                del self.rare.links[position]
                return True
        return False

    def lose_name(self, Node parent not None, bytes name not None):
        """Remove the name ``name`` in ``parent``."""
        parent.drop_child(name, self)
        if not self.take_link(parent, name) and self.parent is parent and self.name == name:
            if self.links:
                self.parent, self.name, place = self.rare.links.pop()
                if not self.is_copy_in_index():
                    self.place = place
            else:
                self.unlinked = True
                if self.record != NULL:
                    self.record.flags |= UNLINKED

    def change_name(self, Node parent not None, bytes name not None, Node new_parent not None, bytes new_name not None):
        """Record a rename."""
        parent.drop_child(name, self)
        new_parent.children[new_name] = self
        if self.take_link(parent, name):
            self.rare.links.append((new_parent, new_name, new_parent.parts[0]))
        else:
            self.parent, self.name = new_parent, new_name
            if self.kind == S_IFDIR:
                self.parts[0].move(new_parent.parts[0], new_name)
            elif not self.is_copy_in_index():
                self.place = new_parent.parts[0]

    cdef void drop_child(self, bytes name, Node node):
        if self.children is not None and self.children.get(name) is node:
            del self.children[name]

    def forget_names(self):
        """Forget all its names; returns the directories of all but the first."""
        cdef Node directory
        if self.parent is not None:
            self.parent.drop_child(self.name, self)
        if not self.links:
            return []
        for directory, name, _ in self.links:
            directory.drop_child(name, self)
        return [directory for directory, _, _ in self.links]

    def supersede(self, number, generation):
        """A new node that takes over object, names and held fd; see `NodeTable.supersede`."""
        cdef Node new, directory
        cdef Rare rare = self.uncommon(), taken
        places = self.parts if self.place is None else [self.place]
        new = Node(
            number, self.territory, self.parent, self.name, self.kind, places, self.key, ino=self.ino,
            generation=generation,
        )
        new.unlinked, new.held, new.flags, new.from_origin = self.unlinked, self.held, self.flags, self.from_origin
        taken = new.uncommon()
        taken.links, taken.lower_data, taken.entry = rare.links, rare.lower_data, rare.entry
        taken.lower_links, taken.more_links, taken.superseded = rare.lower_links, rare.more_links, 1
        rare.links, rare.successor, self.held = None, new, -1
        for directory, name, _ in [(self.parent, self.name, None), *(taken.links or ())]:
            known = None if directory is None else directory.children
            if known is not None and known.get(name) is self:
                known[name] = new
        return new
