"""Takes over the nodes and the open files of a former daemon of the mount; see `state` and `former`.

Nodes whose id or object the layers do not tell are made at once: those without a name, of which an fd is held, those
with several names, and those that were superseded. So are those of open files. The others are former nodes until they
are used; so are those for which a slow layer has to be asked, since it may not answer.
"""

import logging
import os
from contextlib import suppress

from libc.stdint cimport int64_t, uint32_t, uint64_t

from unionfs.core.files cimport Handle, OpenFile, UnreadFile, Use
from unionfs.core.former cimport Former
from unionfs.core.lookup cimport Names
from unionfs.core.marks cimport mark_held
from unionfs.core.memo cimport Memo
from unionfs.core.node cimport Node, Rare, new_node
from unionfs.core.nodes cimport NodeTable
from unionfs.core.opening cimport Handles
from unionfs.core.places cimport Layer, Place, new_place
from unionfs.core.state cimport (
    BACKING_ALONE, COUNTED, EXCHANGING, FIXED, MAPS, OF_UPPER, REMOVING, RENAMING, SUPERSEDED, THROUGH, UNLINKED, WRITES, Change,
    HandleRecord, Record, State, layer_of,
)
from unionfs.core.stats cimport AT_SYMLINK_NOFOLLOW, S_IFDIR, fstatat, stat_t

from unionfs.core.memo import Wanted

cdef enum:
    # Who opened the files of a former daemon is not recorded: they count as one user's, whose id no process has.
    UNKNOWN_USER = 0xFFFFFFFF

log = logging.getLogger(__name__)


cdef class Restoring:
    """Takes over for one mount."""

    cdef NodeTable nodes
    cdef State state
    cdef Former former
    cdef Handles handles
    cdef list layers
    cdef object reopen, open
    cdef dict opened
    cdef set backing_ids, kept

    def __init__(self, NodeTable nodes not None, list layers not None, Handles handles not None, reopen, open):
        """``nodes``: with the root alone. ``layers``: all of them, by their indexes. ``handles``: will have the open
        files. ``reopen`` returns the backing file of a node, an `OpenFile`, to write or not; ``open`` opens one anew,
        to read."""
        self.nodes, self.state, self.layers = nodes, nodes.state, layers
        self.handles, self.reopen, self.open = handles, reopen, open
        self.opened, self.backing_ids, self.kept = {}, set(), set()
        self.former = nodes.former = Former(nodes.state)
        self.former.restoring = self

    def take_over(self):
        """Take over nodes and open files. Returns the open files by the number of the request that opened them, to
        which those are added that are still unknown; the backing ids; and those without open files. Raises ``OSError``
        of a layer."""
        cdef Record *record
        self.find_opens()
        self.finish_change()
        for id_ in self.former.ids(UNLINKED):
            self.make_unlinked(id_)
        for id_ in self.former.ids(FIXED):
            record = self.former.at(id_)
            if record != NULL and not record.flags & SUPERSEDED:
                self.now(self.is_found, id_)
        self.former.fixed_stay()
        for id_ in self.former.ids(SUPERSEDED):
            self.now(self.superseded, id_)
        for id_ in list(self.former.opens):
            self.now(self.is_open, id_)
        for handle in list(self.handles.by_number.values()):
            self.now(self.opens_again, handle)
        return self.opened, self.backing_ids, self.kept

    def now(self, step, what):
        """Make a step if it needs no call into a slow layer; otherwise it is made when a request needs it."""
        cdef Memo memo = Memo()
        try:
            with memo:
                step(what)
        except Wanted:
            pass
        finally:
            memo.close()

    def is_found(self, id_):
        """Make a node that still has a name."""
        if self.nodes.known(id_) is None:
            self.give_up(id_)

    # -- the change in progress -----------------------------------------------------------------------

    cdef finish_change(self):
        """Record the change of names that was in progress, if it was made."""
        cdef Change change = self.state.head.change
        cdef bytes name = change.name[:change.size], new_name = change.new_name[:change.new_size]
        if change.kind == REMOVING:
            if self.is_gone(change.target, change.parent, name):
                self.loses_name(change.target, change.parent, name, change.held)
        elif change.kind == RENAMING:
            if self.is_gone(change.node, change.parent, name):
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

    cdef bint is_gone(self, uint64_t id_, uint64_t parent, bytes name) except -1:
        """Whether an object lost the name that it was about to lose."""
        cdef Node directory = self.nodes.found(parent)
        cdef Record *record = self.former.at(id_)
        cdef Names names
        cdef Place part
        cdef Memo memo
        cdef stat_t st
        cdef int fd
        if directory is None or directory.children is None or directory.unlinked:
            return True
        part, names = directory.parts[0], directory.territory
        if part.layer.is_upper:
            fd = names.merge.gate.fd(part)
            if fstatat(fd, name, &st, AT_SYMLINK_NOFOLLOW) == 0:
                return names.merge.whiteout_at(&st, fd, name) != 0
        memo = Memo()
        try:
            with memo:
                return self.number_at(parent, name) == 0
        except Wanted:  # a slow lower may have an object of that name: was that it?
            return record == NULL or (layer_of(record) == 0 and (<Layer>self.layers[0]).is_upper)
        finally:
            memo.close()

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
            or (held >= 0 and self.is_gone(id_, record.parent, self.state.name_of(record)))
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
        cdef Layer layer
        cdef Place place
        if record.held < 0 or layer_of(record) >= <uint32_t>len(self.layers):
            self.give_up(id_)
            return
        layer = self.layers[layer_of(record)]
        st = None
        if layer.slow:
            mark_held(record.held, layer.root.fd)
        else:
            try:
                st = os.stat(record.held)
            except OSError:
                self.give_up(id_)
                return
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
        if st is not None and node.kind != S_IFDIR and (node.record.flags & FIXED or st.st_nlink):
            self.nodes.linked(node, st)

    def superseded(self, id_):
        """Make a node that leads to the one that took over its state."""
        cdef Record *record = self.former.at(id_)
        cdef Node successor, node
        cdef Rare rare
        if record == NULL:
            return
        successor = self.nodes.found(record.parent)
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

    cdef find_opens(self):
        """Find the open files, by their nodes."""
        cdef State state = self.state
        cdef HandleRecord *record
        cdef uint32_t place
        self.handles.last = state.head.last_handle
        for place in range(1, state.head.handles):
            record = &state.handles[place]
            if not record.number:
                continue
            if record.flags & BACKING_ALONE:
                self.kept.add(record.backing_id)
                state.drop_handle(record)
            elif not record.flags & COUNTED or self.former.at(record.node) == NULL:
                state.drop_handle(record)
            else:
                self.former.opens.setdefault(record.node, []).append(place)
                self.former.numbers[record.number] = record.node
                if record.flags & THROUGH:
                    self.backing_ids.add(record.backing_id)

    def opens_of(self, Node node not None):
        """A node is known now: take over its open files. Each is opened when it is used."""
        cdef HandleRecord *record
        cdef UnreadFile file
        places = self.former.opens.pop(node.id, None)
        if places is None:
            return
        file = UnreadFile(self.open, node, waits=not node.top_layer().memory)
        file.users = len(places)
        node.in_use().has(file)
        for place in places:
            record = &self.state.handles[<uint32_t>place]
            del self.former.numbers[record.number]
            handle = self.handle(node, record, file)
            self.handles.take_in(handle, record.number, UNKNOWN_USER)
            self.opened[record.unique] = record.number, handle

    def is_open(self, id_):
        """Make the node of an open file."""
        cdef uint32_t place
        if self.nodes.known(id_) is not None:
            return
        for place in self.former.opens.pop(id_, ()):
            del self.former.numbers[self.state.handles[place].number]
            self.state.drop_handle(&self.state.handles[place])

    def opened_by(self, unique):
        """The file that a request opened, and its number; None if it opened none."""
        cdef uint32_t place
        for id_, places in list(self.former.opens.items()):
            for place in places:
                if self.state.handles[place].unique == unique:
                    self.nodes.known(id_)
        return self.opened.get(unique)

    cdef Handle handle(self, Node node, HandleRecord *record, OpenFile file):
        cdef Handle handle = Handle.__new__(Handle)
        cdef Use use = node.in_use()
        handle.file, handle.node, handle.writes = file, node, record.flags & WRITES != 0
        handle.maps, handle.late = record.flags & MAPS != 0, True
        if record.flags & THROUGH:
            use.backing_id, use.of_upper = record.backing_id, record.flags & OF_UPPER != 0
        handle.record = record
        use.handles.append(handle)
        use.opened(handle)
        return handle

    def opens_again(self, Handle handle not None):
        """Open the backing file of an open file."""
        cdef Node node
        if not handle.late:
            return
        node = handle.node
        try:
            file = self.reopen(self.nodes.found(node.id), write=handle.writes)
        except OSError as error:
            log.warning("the open file of node %d was not found again: %s", node.id, error)
            handle.late = False  # its requests report the error
            return
        handle.late = False
        self.handles.let_go(handle)
        handle.go_on(file)
        self.handles.hold(handle)
