"""Takes over the nodes and the open files of a former daemon of the mount; see `state` and `former`.

Nodes whose id or object the layers do not tell are made at once: those without a name, of which an fd is held, those
with several names, and those that were superseded. So are those of open files. The others are former nodes until they
are used.
"""

import logging
import os
from contextlib import suppress

from libc.stdint cimport int64_t, uint32_t, uint64_t

from unionfs.core.files cimport Handle, Use
from unionfs.core.former cimport Former
from unionfs.core.lookup cimport Names
from unionfs.core.node cimport Node, Rare, new_node
from unionfs.core.nodes cimport NodeTable
from unionfs.core.opening cimport Handles
from unionfs.core.places cimport Place, new_place
from unionfs.core.state cimport (
    BACKING_ALONE, COUNTED, EXCHANGING, FIXED, MAPS, OF_UPPER, REMOVING, RENAMING, SUPERSEDED, THROUGH, UNLINKED, WRITES, Change,
    HandleRecord, Record, State,
)
from unionfs.core.stats cimport S_IFDIR, stat_t

from unionfs.core.files import UnreadFile

log = logging.getLogger(__name__)


cdef class Restoring:
    """Takes over for one mount."""

    cdef NodeTable nodes
    cdef State state
    cdef Former former
    cdef list layers

    def __init__(self, NodeTable nodes not None, list layers not None):
        """``nodes``: with the root alone. ``layers``: all of them, by their indexes."""
        self.nodes, self.state, self.layers = nodes, nodes.state, layers
        self.former = nodes.former = Former(nodes.state)

    def nodes_of_former(self):
        """Take over the nodes. Raises ``OSError`` of a layer."""
        cdef Record *record
        self.finish_change()
        for id_ in self.former.ids(UNLINKED):
            self.make_unlinked(id_)
        for id_ in self.former.ids(FIXED):
            record = self.former.at(id_)
            if record != NULL and not record.flags & SUPERSEDED and self.nodes.known(id_) is None:
                self.give_up(id_)
        for id_ in self.former.ids(SUPERSEDED):
            self.make_superseded(id_)

    # -- the change in progress -----------------------------------------------------------------------

    cdef finish_change(self):
        """Record the change of names that was in progress, if it was made."""
        cdef Change change = self.state.head.change
        cdef bytes name = change.name[:change.size], new_name = change.new_name[:change.new_size]
        if change.kind == REMOVING:
            if self.number_at(change.parent, name) == 0:
                self.loses_name(change.target, change.parent, name, change.held)
        elif change.kind == RENAMING:
            if self.number_at(change.parent, name) == 0:
                self.loses_name(change.target, change.new_parent, new_name, change.held)
                self.moves(change.node, change.new_parent, new_name)
        elif change.kind == EXCHANGING:
            if self.is_at(change.node, change.new_parent, new_name):
                self.moves(change.node, change.new_parent, new_name)
                self.moves(change.target, change.parent, name)
                self.nodes.has_exchanged()
        if change.kind and change.held >= 0 and not self.is_held(change.target, change.held):
            with suppress(OSError):  # it was closed just before
                os.close(change.held)
        self.nodes.done()

    cdef uint64_t number_at(self, uint64_t parent, bytes name) except? 0:
        """The number of the object that has a name now; 0 if there is none."""
        cdef Node directory = self.nodes.found(parent)
        cdef list places
        cdef stat_t st
        cdef bint from_origin = False
        if directory is None or directory.children is None or directory.unlinked:
            return 0
        places = (<Names?>directory.territory).merge.find(directory.parts, name, 0, &st)
        return 0 if places is None else self.nodes.number_of(name, &st, places, &from_origin, None)

    cdef bint is_at(self, uint64_t id_, uint64_t parent, bytes name) except -1:
        cdef Record *record = self.former.at(id_)
        return record != NULL and self.number_at(parent, name) == self.state.number_of(record)

    cdef loses_name(self, uint64_t id_, uint64_t parent, bytes name, int held):
        """Record that an object lost a name. Of its names a record has one, which may be half written."""
        cdef Record *record = self.former.at(id_)
        if record == NULL or (record.flags & UNLINKED and record.held >= 0):
            return
        if (
            record.flags & UNLINKED or (record.parent == parent and self.state.name_of(record) == name)
            or (held >= 0 and not self.is_at(id_, record.parent, self.state.name_of(record)))
        ):
            record.held = held
            record.flags |= UNLINKED

    cdef bint is_held(self, uint64_t id_, int held) except -1:
        cdef Record *record = self.former.at(id_)
        return record != NULL and record.flags & UNLINKED and record.held == held

    cdef moves(self, uint64_t id_, uint64_t parent, bytes name):
        cdef Record *record = self.former.at(id_)
        if record != NULL:
            self.former.left(record.parent)
            self.state.write(record, parent, self.state.number_of(record), name)
            self.former.below[parent] = self.former.below.get(parent, 0) + 1

    # -- nodes ----------------------------------------------------------------------------------------

    cdef give_up(self, uint64_t id_):
        """The object of a node is gone; the kernel still forgets it some day."""
        cdef Record *record = self.former.at(id_)
        name = b"?" if record == NULL else self.state.name_of(record)
        log.warning(
            "the object of node %d was not found again: %r (flags %d, fd %d)", id_, name,
            0 if record == NULL else record.flags, -1 if record == NULL else record.held,
        )

    cdef make_unlinked(self, uint64_t id_):
        """Make a node without a name, of which an fd is held."""
        cdef Record *record = self.former.at(id_)
        cdef Node parent = self.nodes.by_id.get(record.parent), node
        cdef Place place
        if record.held < 0 or record.layer >= <uint32_t>len(self.layers):
            self.give_up(id_)
            return
        try:
            st = os.stat(record.held)
        except OSError:
            self.give_up(id_)
            return
        layer = self.layers[record.layer]
        place = new_place(layer, layer.root, b"", 0)
        if parent is None or parent.children is None:
            parent = self.nodes.root
        node = new_node(
            id_, parent.territory, parent, self.state.name_of(record), <uint32_t>record.kind << 12, [place], 0,
            self.state.number_of(record), record.generation,
        )
        node.unlinked, node.held = True, record.held
        self.nodes.by_id.add(node)
        self.nodes.record(node)
        if node.kind != S_IFDIR and (node.record.flags & FIXED or st.st_nlink):
            self.nodes.linked(node, st)

    cdef make_superseded(self, uint64_t id_):
        """Make a node that leads to the one that took over its state."""
        cdef Record *record = self.former.at(id_)
        cdef Node successor = self.nodes.found(record.parent), node
        cdef Rare rare
        if successor is None:
            self.give_up(id_)
            return
        places = successor.parts if successor.place is None else [successor.place]
        node = new_node(
            id_, successor.territory, successor.parent, successor.name, successor.kind, places, successor.key,
            successor.ino, record.generation,
        )
        rare = node.uncommon()
        rare.successor = successor
        rare = successor.uncommon()
        rare.superseded += 1
        self.nodes.by_id.add(node)
        self.nodes.record(node)

    # -- open files -----------------------------------------------------------------------------------

    def files_of_former(self, Handles handles not None, open):
        """Take over the open files; ``open`` returns the backing file of a node, an `OpenFile`, to write or not.
        Returns those by the number of the request that opened them, the backing ids, and those without open files."""
        cdef State state = self.state
        cdef HandleRecord *record
        cdef Handle handle
        cdef uint32_t place
        cdef Node node
        opened, ids, kept = {}, set(), set()
        handles.last = state.head.last_handle
        for place in range(1, state.head.handles):
            record = &state.handles[place]
            if not record.number:
                continue
            if record.flags & BACKING_ALONE:
                kept.add(record.backing_id)
                state.drop_handle(record)
                continue
            node = self.nodes.known(record.node)
            if node is None or not record.flags & COUNTED:
                state.drop_handle(record)
                continue
            handle = self.handle(node, record, open)
            handles.by_number[record.number] = handle
            opened[record.unique] = record.number, handle
            if record.flags & THROUGH:
                ids.add(record.backing_id)
        return opened, ids, kept

    cdef Handle handle(self, Node node, HandleRecord *record, open):
        cdef Handle handle = Handle.__new__(Handle)
        cdef Use use = node.in_use()
        cdef bint writes = record.flags & WRITES != 0
        try:
            file = open(self.nodes.found(node.id), write=writes)
        except OSError as error:
            log.warning("the open file of node %d was not found again: %s", node.id, error)
            file = UnreadFile(open, node, waits=False)  # its requests report the error
        handle.file, handle.node, handle.writes = file, node, writes
        handle.maps = record.flags & MAPS != 0
        if record.flags & THROUGH:
            use.backing_id, use.of_upper = record.backing_id, record.flags & OF_UPPER != 0
        handle.record = record
        use.handles.append(handle)
        use.opened(handle)
        return handle
