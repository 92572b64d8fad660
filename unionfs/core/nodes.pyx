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
- Forgetting a node never fails, as the kernel gets no answer: what fails on the way is logged.
- A node can be superseded: a new node, with a new id and the same ``st_ino``, takes over its object. The old
  id leads to the new node; the old node itself stays for its open files and lookups.
"""

import logging
import os
import secrets
from enum import Enum

from libc.errno cimport ESTALE
from libc.errno cimport errno as c_errno
from posix.unistd cimport close

from unionfs.core.idtable cimport IdTable
from unionfs.core.node cimport new_node, successor_of
from unionfs.core.places cimport require_some
from unionfs.core.recorder cimport Recorder
from unionfs.core.state cimport SUPERSEDED, UNLINKED
from unionfs.core.stats cimport S_IFDIR, S_IFMT, failure, fstat, read_result, result_of

from unionfs.core.places import NO_KEY as _NO_KEY

ROOT_ID = 1

log = logging.getLogger(__name__)


class Stored(Enum):
    """What became of the origin of a copy; see `union.origin`."""

    READABLE = "it is stored, and has the number shown"
    UNKNOWN = "it is not stored, or cannot be read"
    INDEXED = "the copy goes into the index, for all names of a lower file with several"
    BROKEN = "a name of a lower file with several: the copy is a file of its own, with its own number"


cdef enum:
    ROOT = 1


cdef class NodeTable(Recorder):
    """All nodes that the kernel knows or is about to receive, and their ids.

    ``origins`` and ``index`` find the numbers and copies of what was copied up; see `union.origin` and
    `union.index`.
    """

    def __init__(self, origins, index, Gate gate not None, gone=None, *, bint copies_up=True, known=None,
        state=None,
    ):
        """``gone`` is called for each forgotten node whose file stays open; see `Use.stays_open`.
        ``copies_up``: whether there is an upper, which may get a copy of one name alone. ``known`` is called
        for each new directory of the merged layers, and each file of a lower with several hard links; then
        ``gone`` for all nodes. ``state``: where to record what another daemon needs.
        """
        self.state = state
        self.by_id, self.by_inode, self.inodes_of = IdTable(), {}, {}
        self.gone, self.on_known = gone, known
        self.copies_up = copies_up
        #: The generation of the last node. The kernel sees 32 bits: those of two mounts hardly ever meet.
        self.generation = secrets.randbits(32)
        self.origins, self.index, self.gate = origins, index, gate
        self.numbers = origins.numbers
        self.unique = self.numbers.unique
        self.plain_device, self.plain_limit = self.numbers.plain
        #: The numbers of copies whose origin could not be stored, by (device, inode).
        self.unstored = {}

    def __len__(self):
        return self.by_id.count + (0 if self.former is None else len(self.former))

    def __iter__(self):
        """All nodes at this moment."""
        return iter(self.by_id.nodes())

    def add_root(self, Territory territory not None, list parts not None):
        """Add the root of the merged tree."""
        require_some(parts)
        self.root = new_node(ROOT, territory, None, b"", S_IFDIR, parts, 0, ROOT, 0)
        self.by_id.add(self.root)
        self.root.lookups += 1
        if self.on_known is not None:
            self.on_known(self.root)

    # -- numbers --------------------------------------------------------------------------------------

    def number(self, bytes name not None, st, list places not None):
        """The inode number that :meth:`add` would assign to an object; ``places`` as there."""
        cdef stat_t given
        cdef bint from_origin = False
        cdef uint64_t number
        require_some(places)
        cdef Place place = places[0]
        read_result(st, &given)
        if self.by_inode and self.is_linkable(&given, place):
            known = self.by_inode.get((given.st_dev, given.st_ino))
            if known is not None:
                return known.ino
        number = self.number_of(name, &given, places, &from_origin, None)
        if self.former is not None and self.former.at(number) != NULL:
            return number
        return number if self.may_share(&given, place) else self.free(number)

    cdef bint is_linkable(self, const stat_t *st, Place place) noexcept:
        """Whether the names of an object are names of one node, found by (device, inode)."""
        return st.st_mode & S_IFMT != S_IFDIR and (place.layer.is_upper or not self.copies_up)

    cdef uint64_t number_of(
        self, bytes name, const stat_t *st, list places, bint *from_origin, list entry
    ) except 0:
        """The number of an object, whether it is that of its origin, and its entry in the index."""
        cdef Place place = places[0]
        if st.st_mode & S_IFMT == S_IFDIR:
            if len(places) == 1 and st.st_dev == self.plain_device and ROOT < st.st_ino < self.plain_limit:
                return st.st_ino
            return self.origins.number_of_directory(result_of(st), places)
        if self.unstored and place.layer.is_upper:
            known = self.unstored.get((st.st_dev, st.st_ino))
            if known is not None:
                return known
        if place.impure and (st.st_nlink == 1 or place.layer.is_upper):
            origin = self.origins.read(place, name)
            if origin is not None:
                known, found = self.origins.number_of(origin), None
                if st.st_nlink > 1 and self.index is not None:
                    found = self.index.entry_of_copy(origin, result_of(st))
                broken = st.st_nlink > 1 and found is None and self.origins.was_indexed(place, name)
                if known is not None and not broken:
                    from_origin[0] = True
                    if entry is not None:
                        entry.append(found)
                    return known
        if st.st_dev == self.plain_device and ROOT < st.st_ino < self.plain_limit:
            return st.st_ino
        return self.numbers.of(st.st_dev, st.st_ino)

    cdef bint may_share(self, const stat_t *st, Place place) noexcept:
        """Whether several nodes may have the number of an object: those of a lower's hard links; with
        ``xino=off``, objects of several filesystems."""
        if st.st_mode & S_IFMT == S_IFDIR:
            return False
        return not self.unique or (st.st_nlink > 1 and not place.layer.is_upper)

    def unreachable(self, Node parent not None, bytes name not None):
        """A number for an object that cannot be looked up; no node has it."""
        return self.free(self.numbers.hashed(b"unreachable%d/%b" % (parent.ino, name)))

    cdef uint64_t free(self, uint64_t number) except 0:
        """The number itself, or another one if a node has it."""
        while self.by_id.has(number) or (self.former is not None and self.former.at(number) != NULL):
            number = self.numbers.hashed(b"taken%d" % number)
        return number

    cdef uint64_t id_for(self, uint64_t number, Node parent, bytes name, uint32_t kind, bint linked=False) except 0:
        """The id of a new node: the number itself, or another one if a node has it. A former node keeps its own."""
        cdef uint64_t id_ = 0
        if self.former is not None:
            id_ = self.former.id_for(number, parent.id, name, kind, linked)
        return id_ if id_ else self.free(number)

    cdef uint32_t next_generation(self) noexcept:
        self.generation += 1
        return self.generation

    def copied_up(self, Node node not None, st, origin):
        """Record that ``node`` is now the upper object with attributes ``st``, whose origin is ``origin``."""
        cdef stat_t given
        if origin is Stored.INDEXED:
            self.linked(node, st)
        elif origin is Stored.BROKEN:
            self.record_layer(node)
            node.ino = self.numbers.of(st.st_dev, st.st_ino)
            if node.place is not None:
                node.key = node.place.layer.key(st)
            self.record_number(node)
            return
        read_result(st, &given)
        self.is_copy(node, &given, origin is not Stored.UNKNOWN)

    cdef int is_copy(self, Node node, const stat_t *st, bint readable) except -1:
        """The same for a copy whose origin is ``readable``, or not stored."""
        self.record_layer(node)
        if readable:
            node.from_origin = True
        elif node.kind != S_IFDIR:
            self.unstored[st.st_dev, st.st_ino] = node.ino
            self.record_number(node)
        if node.place is not None:
            node.key = node.place.layer.key_of(st)
        return 0

    # -- coming and going -----------------------------------------------------------------------------

    def child(self, Node parent not None, bytes name not None):
        """The node known under that name."""
        return parent.children.get(name)

    def add(self, Node parent not None, bytes name not None, st, list places not None):
        """The node of an object of the layers: a new node, or the one that already has another name of it.

        ``places``: a directory's parts, or the place of the object.
        """
        cdef stat_t given
        require_some(places)
        read_result(st, &given)
        return self.place_object(parent, name, &given, places)

    cdef Node place_object(self, Node parent, bytes name, const stat_t *st, list places):
        cdef Place place = places[0]
        cdef bint upper = place.layer.is_upper, is_dir = st.st_mode & S_IFMT == S_IFDIR
        cdef bint from_origin = False
        cdef uint64_t number
        if self.index is not None and st.st_nlink > 1 and not upper and not is_dir:
            found = self.add_linked(parent, name, result_of(st), place)
            if found is not None:
                return found
        if self.by_inode and self.is_linkable(st, place):
            known = self.by_inode.get((st.st_dev, st.st_ino))
            if known is not None:
                self.add_name(known, parent, name, place)
                return known
        cdef list entry = [] if place.impure else None
        number = self.number_of(name, st, places, &from_origin, entry)
        return self.enter(parent, name, st, places, number, from_origin, entry[0] if entry else None)

    cdef Node enter(
        self, Node parent, bytes name, const stat_t *st, list places, uint64_t number, bint from_origin, entry
    ):
        """A new node with that number; before that, calls into slow layers."""
        cdef Place place = places[0]
        cdef uint32_t kind = st.st_mode & S_IFMT
        cdef bint linked = st.st_nlink > 1 and self.is_linkable(st, place)
        more = self.index.more_links(entry, result_of(st), 0) if linked and entry and self.index else None
        cdef uint64_t id_ = self.id_for(number, parent, name, kind, linked)
        cdef int64_t key = 0 if kind == S_IFDIR else place.layer.key_of(st)
        cdef uint64_t ino = number if id_ == number or self.may_share(st, place) else id_
        cdef Node node = new_node(
            id_, parent.territory, parent, name, kind, places, key, ino, self.next_generation()
        )
        node.from_origin = from_origin
        self.by_id.add(node)
        parent.children[name] = node
        if self.state is not None:
            self.record(node)
        if self.on_known is not None and (kind == S_IFDIR or (st.st_nlink > 1 and not place.layer.is_upper)):
            self.on_known(node)
        if linked:
            self.linked(node, result_of(st))
            if more is not None:
                node.may_be_indexed(entry, 0)
                node.is_indexed_copy(self.index.place, more)
        return node

    def add_linked(self, Node parent not None, bytes name not None, st, Place place not None):
        """The node of a lower's file with several hard links, of which ``name`` is one: the file itself, or
        its copy in the index. None if it cannot be indexed.
        """
        index = self.index
        original = st.st_dev, st.st_ino
        node = self.by_inode.get(original)
        if node is not None:
            self.add_name(node, parent, name, place)
            return node
        entry = index.entry_of_lower(self.gate.fd(place), name, st)
        if entry is None:
            return None
        copy = index.stat(entry)
        if copy is not None and copy.st_mode & S_IFMT == st.st_mode & S_IFMT:
            node = self.by_inode.get((copy.st_dev, copy.st_ino))
        else:
            copy = None
        if node is None:
            number = self.numbers.of(*original)
            here, found = (place, st) if copy is None else (index.place, copy)
            node = Node(
                self.id_for(number, parent, name, st.st_mode & S_IFMT), parent.territory, parent, name,
                st.st_mode & S_IFMT, [here], here.layer.key(found), ino=number,
            )
            self.by_id.add(node)
            parent.children[name] = node
            if self.state is not None:
                self.record(node)
            node.may_be_indexed(entry, st.st_nlink)
            if copy is not None:
                node.has_origin()
                node.is_indexed_copy(index.place, index.more_links(entry, copy, st.st_nlink))
                self.linked(node, copy)
            elif self.on_known is not None:
                self.on_known(node)
        else:
            known = node.is_indexed and node.lower_links
            node.may_be_indexed(entry, st.st_nlink)
            if copy is not None and not known:
                # a name of the copy was found first
                node.is_indexed_copy(index.place, index.more_links(entry, copy, st.st_nlink))
            self.add_name(node, parent, name, place)
        self.linked(node, st)
        return node

    def add_bound(
        self, Territory territory not None, Node parent not None, bytes name not None, number, st,
        Place place not None, *, held=-1
    ):
        """A node for one name of an object of bound storage: hard links are separate nodes with one
        ``number``. ``held``: an O_PATH fd of an object without a name.
        """
        node = Node(
            self.free(number), territory, parent, name, st.st_mode & S_IFMT, [place],
            ino=number, generation=self.next_generation(), held=held, identity=(st.st_dev, st.st_ino),
        )
        self.by_id.add(node)
        if name:
            parent.children[name] = node
        return node

    def linked(self, Node node not None, st):
        """Record that the object of ``node``, with the attributes ``st``, has several hard links."""
        key = st.st_dev, st.st_ino
        if self.by_inode.get(key) is not node:
            self.by_inode[key] = node
            self.inodes_of.setdefault(node.id, []).append(key)
            self.record_number(node)

    def add_name(self, Node node not None, Node parent not None, bytes name not None, Place place):
        """Add the name ``name`` in ``parent`` to ``node``; ``place`` is that real directory."""
        if node.record != NULL and node.unlinked:  # before its fd is closed
            self.state.write(node.record, parent.id, node.ino, name)
            node.record.flags &= ~UNLINKED
        node.get_name(parent, name, place)

    def remove_name(self, Node node not None, Node parent not None, bytes name not None):
        """Remove the name ``name`` in ``parent`` from ``node``; see ``Union.outliving``."""
        node.lose_name(parent, name)
        self.record_name(node)
        self.release(parent)

    def move(
        self, Node node not None, Node parent not None, bytes name not None, Node new_parent not None,
        bytes new_name not None
    ):
        """Record a rename of ``node``."""
        node.change_name(parent, name, new_parent, new_name)
        self.record_name(node)
        self.release(parent)

    def has_index(self, index):
        """Set the index of another upper; None: it has none."""
        self.index = index

    def unnamed(self, Node parent not None, int held):
        """A node for an upper file without a name yet (O_TMPFILE); ``held`` is an O_PATH fd of it."""
        st = os.stat(held)
        number = self.free(self.numbers.of(st.st_dev, st.st_ino))
        node = Node(
            number, parent.territory, parent, b"", st.st_mode & S_IFMT, [parent.parts[0]],
            generation=self.next_generation(), held=held,
        )
        self.by_id.add(node)
        if self.state is not None:
            self.record(node)
        self.linked(node, st)
        return node

    def supersede(self, Node node not None):
        """Make a new node for the object of ``node``; the old node keeps its open files and lookups."""
        number = self.free(self.numbers.after(node.id))
        new = node.supersede(number, self.next_generation())
        self.by_id.add(new)
        if self.state is not None:
            self.record(new)
            self.record_number(new)
            if node.record != NULL:
                node.record.parent = number
                node.record.flags = (node.record.flags & ~UNLINKED) | SUPERSEDED
                node.record.held = -1
        for key in self.inodes_of.get(node.id, ()):
            self.by_inode[key] = new
        if node.id in self.inodes_of:
            self.inodes_of[number] = self.inodes_of.pop(node.id)
        return new

    def lose(self, Node node not None, Node parent not None, bytes name not None):
        """Drop a node whose name another process gave to another object."""
        node.lose_name(parent, name)
        self.record_name(node)
        if node.unlinked:
            node.key = _NO_KEY
            for key in self.inodes_of.pop(node.id, ()):  # names found later are another node
                if self.by_inode.get(key) is node:
                    del self.by_inode[key]
            for part in node.parts:
                part.lost()
        self.release(parent)

    def forget(self, Node node not None, int64_t lookups):
        """Subtract lookups that the kernel forgot."""
        self.subtract(node, lookups)

    cdef void subtract(self, Node node, int64_t lookups):
        node.lookups -= lookups
        if node.record != NULL:
            node.record.lookups = node.lookups
        self.release(node)

    cdef release(self, Node node):
        """Drop the node if nothing needs it, and parents that only it needed."""
        cdef Node current = node
        while current is not None and current.id != ROOT:
            if current.lookups > 0 or current.children:
                return
            if current.rare is not None and current.rare.superseded:
                return
            if current.use is not None and current.use.handles:
                return
            if self.former is not None and current.id in self.former.below:
                return
            if not self.by_id.remove(current):
                return
            if current.record != NULL:
                self.state.drop(current.record)
                current.record = NULL
            self.end(current)
            if successor_of(current) is not None:
                current = current.rare.successor
                current.rare.superseded -= 1
                continue
            if current.rare is not None and current.rare.links:
                for directory in current.forget_names():
                    self.release(directory)
            elif current.parent is not None:
                current.parent.drop_child(current.name, current)
            if self.inodes_of or current.held >= 0:
                self.drop_inode(current)
            current = current.parent

    cdef end(self, Node node):
        """End the use of a forgotten node, and close the fds of its parts."""
        cdef Place part
        kept = node.use is not None and node.use.kept
        if self.gone is not None and (kept or self.on_known is not None):
            try:
                self.gone(node)
            except Exception:
                log.exception("the end of node %d failed", node.id)
        node.use = None
        for part in node.parts:
            self.gate.forget(part)

    cdef drop_inode(self, Node node):
        cdef Place place
        if self.inodes_of:
            for key in self.inodes_of.pop(node.id, ()):
                if self.by_inode.get(key) is node:
                    del self.by_inode[key]
        if node.held >= 0:
            place = node.parts[0] if node.kind == S_IFDIR else node.place
            if self.unstored and place is not None and place.layer.is_upper:
                try:
                    self.release_number(node.held, place.layer)
                except OSError:  # for example EMFILE
                    log.exception("whether the inode of node %d has other names cannot be seen", node.id)
            close(node.held)
            node.held = -1

    cdef release_number(self, int held, Layer layer):
        """Forget the number of the upper's object ``held``, unless it has names: the inode may be reused."""
        cdef stat_t st
        if fstat(held, &st) != 0:
            if c_errno != ESTALE:
                raise failure(c_errno)
            # the server no longer has it, such as a removed directory on NFS
            self.unstored.pop((layer.dev, known_inode(held)), None)
            return
        if <Py_ssize_t>st.st_nlink <= layer.links_of_removed:
            self.unstored.pop((st.st_dev, st.st_ino), None)


cdef known_inode(int fd):
    """The inode number of ``fd`` without asking a server, which may have lost it.

    From /proc/self/fdinfo (``ino`` since Linux 5.14); 0 if unknown.
    """
    with open(f"/proc/self/fdinfo/{fd}", "rb") as lines:
        return next((int(line[4:]) for line in lines if line.startswith(b"ino:")), 0)
