"""The nodes of a table by id: those that are known, and those that a former daemon knew; and what another daemon needs of
them, see `state`. Without a state nothing is recorded."""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from unionfs.core.marks cimport marks
from unionfs.core.node cimport Node, successor_of
from unionfs.core.places cimport Place
from unionfs.core.state cimport EXCHANGING as C_EXCHANGING
from unionfs.core.state cimport FIXED, MAPPED, MOST_PARTS, PARTS, SUPERSEDED, UNLINKED, WRITTEN, Record
from unionfs.core.state cimport REMOVING as C_REMOVING
from unionfs.core.state cimport RENAMING as C_RENAMING
from unionfs.core.stats cimport S_IFDIR


cdef uint32_t layers_of_parts(Node node):
    """A bit for each layer of a directory's parts; 0: its name in the parts of its parent does not lead to them, or
    not to what is known of them."""
    cdef uint32_t layers = 0
    cdef Place part
    if node.parent is None or node.unlinked:
        return 0
    for part in node.parts:
        if not 0 <= part.layer.index < MOST_PARTS or part.name != node.name or part.parent not in node.parent.parts:
            return 0
        if part.layer.slow and (part.impure or part.copied):
            return 0
        layers |= 1 << <uint32_t>part.layer.index
    return layers


cdef class Recorder:
    """The base of the node table."""

    # by_id: the nodes; former: the others, while there may be some.

    cdef Node found(self, uint64_t id_):
        cdef Node node = self.known(id_), successor
        while node is not None:
            successor = successor_of(node)
            if successor is None:
                break
            node = successor
        return node

    def get(self, uint64_t id_):
        """The node with that id, or its successor, if known."""
        return self.found(id_)

    def named(self, uint64_t id_):
        """The node that has that id itself."""
        return self.known(id_)

    cdef Node known(self, uint64_t id_):
        cdef Node node = self.by_id.get(id_)
        return self.revived(id_) if node is None and self.former is not None else node

    # -- what another daemon needs --------------------------------------------------------------------

    cdef void record(self, Node node):
        """Record a new node; one that a former daemon knew continues its record."""
        cdef Record *record = NULL if self.former is None else self.former.take(node.id)
        if record == NULL:
            node.record = self.state.add(
                node.id, 0 if node.parent is None else node.parent.id, node.generation, node.kind,
                (FIXED if node.ino != node.id else 0) | (UNLINKED if node.unlinked else 0), node.ino, node.name,
            )
            if node.record != NULL:
                node.record.held = node.held
                self.record_layer(node)
            return
        node.record = record
        node.generation, node.lookups = record.generation, record.lookups
        if record.flags & FIXED:
            node.ino = self.state.number_of(record)
        if record.flags & (WRITTEN | MAPPED):
            node.in_use().was_written(bool(record.flags & WRITTEN), bool(record.flags & MAPPED))
        self.record_layer(node)
        if self.former.opens:
            self.former.restoring.opens_of(node)

    cdef void record_name(self, Node node):
        """Record its name."""
        if node.record == NULL:
            return
        if node.unlinked:
            if not node.record.flags & PARTS:
                node.record.layer = <uint16_t>node.top_layer().index
            node.record.held = node.held
            node.record.flags |= UNLINKED
            return
        self.state.write(node.record, node.parent.id, node.ino, node.name)
        node.record.flags &= ~UNLINKED
        self.record_layer(node)

    cdef void record_number(self, Node node):
        """Record its number, which the layers do not tell, or that it has several names."""
        cdef Record *old = node.record
        cdef Record *new
        if old == NULL or (old.flags & FIXED and self.state.number_of(old) == node.ino):
            return
        new = self.state.add(
            node.id, old.parent, old.generation, node.kind, old.flags | FIXED, node.ino, self.state.name_of(old)
        )
        if new != NULL:
            new.lookups, new.unique, new.held, new.layer = old.lookups, old.unique, old.held, old.layer
            self.state.drop(old)
            node.record = new

    cdef void record_layer(self, Node node) noexcept:
        """Record the layer of its object, or those of its parts if some are slow."""
        cdef uint32_t layers = 0
        if node.record == NULL:
            return
        if node.kind == S_IFDIR and marks != NULL:
            layers = layers_of_parts(node)
        node.record.flags &= ~PARTS
        if layers:
            node.record.layer = <uint16_t>layers
            node.record.flags |= PARTS
        else:
            node.record.layer = <uint16_t>node.top_layer().index

    def merges_others(self, Node node not None):
        """Record the parts of a directory, which have changed."""
        self.record_layer(node)

    cdef void begin(
        self, uint32_t kind, Node parent, bytes name, Node new_parent, bytes new_name, Node node, Node target, int held
    ) noexcept:
        """Names are about to change on disk; ``held``: an fd of the object that loses its name."""
        if self.state is not None:
            self.state.begin(
                kind, parent.id, name, 0 if new_parent is None else new_parent.id,
                b"" if new_name is None else new_name, 0 if node is None else node.id,
                0 if target is None else target.id, held,
            )

    cdef void holds(self, int fd) noexcept:
        """The object that is about to lose its name is held by that fd."""
        if self.state is not None:
            self.state.head.change.held = fd

    cdef void done(self) noexcept:
        """They have changed, or not."""
        if self.state is not None:
            self.state.done()

    def removing(self, Node parent not None, bytes name not None, Node node not None, int held):
        """The name of a node is about to be removed on disk; call :meth:`changed` afterwards. ``held``: an fd of its
        object."""
        self.begin(C_REMOVING, parent, name, None, None, None, node, held)

    def renaming(
        self, Node parent not None, bytes name not None, Node new_parent not None, bytes new_name not None,
        Node node not None, Node target, int held=-1, *, bint exchange=False
    ):
        """The same for a rename, over ``target``, or in exchange for it."""
        self.begin(C_EXCHANGING if exchange else C_RENAMING, parent, name, new_parent, new_name, node, target, held)

    def has_exchanged(self):
        """The names that were about to be exchanged on disk are."""
        if self.state is not None:
            self.state.head.exchange_done = 1

    def changed(self):
        """The change that was about to be made is recorded, or was not made."""
        self.done()

    # -- what a former daemon knew --------------------------------------------------------------------

    cdef Node revived(self, uint64_t id_):
        """The node of an id that a former daemon knew, or None."""
        cdef Record *record = self.former.at(id_)
        cdef Node parent
        if record == NULL:
            return None
        if record.flags & SUPERSEDED:
            self.former.restoring.superseded(id_)
            return self.by_id.get(id_)
        parent = self.found(record.parent)
        record = self.former.at(id_)
        if record == NULL or parent is None or parent.children is None or parent.unlinked:
            return self.by_id.get(id_)
        self.former.expected = record
        try:
            if not self.found_again(parent, record):
                parent.territory.lookup(parent, self.state.name_of(record))
        finally:
            self.former.expected = NULL
        return self.by_id.get(id_)

    cdef bint found_again(self, Node parent, Record *record) except -1:
        """Make a former node without a call into slow layers that know nothing more of it."""
        cdef bint is_directory = record.kind == S_IFDIR >> 12
        cdef uint32_t layers = record.layer
        if marks == NULL or (is_directory and not record.flags & PARTS):
            return False
        if not is_directory:
            if layers >= MOST_PARTS:
                return False
            layers = 1 << layers
        return parent.territory.has_again(
            parent, self.state.name_of(record), <uint32_t>record.kind << 12, self.state.number_of(record), layers
        )

    cdef release_former(self, uint64_t id_):
        """Drop a former node if nothing needs it, and parents that only it needed."""
        cdef Record *record = self.former.at(id_)
        cdef uint64_t parent
        while record != NULL and record.lookups <= 0 and id_ not in self.former.below and id_ not in self.former.opens:
            parent = record.parent
            self.former.take(id_)
            self.state.drop(record)
            if self.by_id.has(parent):
                self.release(self.by_id.get(parent))
                return
            id_, record = parent, self.former.at(parent)

    cdef void forget_id(self, uint64_t id_, int64_t lookups):
        """The same for an id, known or not."""
        cdef Node node = self.by_id.get(id_)
        if node is not None:
            self.subtract(node, lookups)
        elif self.former is not None and self.former.at(id_) != NULL:
            self.former.at(id_).lookups -= lookups
            self.release_former(id_)

    cdef void subtract(self, Node node, int64_t lookups):
        raise NotImplementedError

    cdef release(self, Node node):
        raise NotImplementedError
