"""Nodes that a former daemon of the mount knew, until they are used again.

A node is looked up again when a request, or the lookup of its name, needs it: that finds what its object is now. So a
daemon that takes over serves at once, however many nodes the kernel knows.
"""

from unionfs.core.state cimport FIXED, SUPERSEDED, UNLINKED


cdef class Former:
    """Their records, by id."""

    # slots: the slot of each record.
    # below: how many of them have a node as their parent.
    # fixed: the ids of those whose number is stored, by parent and name; linked: of those with several names, by number.
    # opens: the records of open files, by the id of their node; numbers: the ids of these nodes, by the file's number.
    # restoring: takes over what needs more than a lookup.
    # expected: the one whose name is looked up just now.

    def __init__(self, State state not None):
        cdef uint32_t slot
        cdef Record *record
        cdef Record *other
        self.state, self.slots, self.below, self.fixed, self.linked = state, {}, {}, {}, {}
        self.opens, self.numbers = {}, {}
        for slot in range(1, state.head.slots):
            record = &state.slots[slot]
            if not record.id:
                continue
            known = self.slots.get(record.id)
            if known is not None:  # it was about to become fixed
                other = &state.slots[<uint32_t>known]
                if record.lookups > other.lookups:
                    other, record = record, other
                    self.slots[other.id] = <uint32_t>(other - state.slots)
                state.drop(record)
                continue
            self.slots[record.id] = slot
            self.below[record.parent] = self.below.get(record.parent, 0) + 1

    def __len__(self):
        return len(self.slots)

    def ids(self, flags):
        """The ids of the records with any of these flags."""
        return [id_ for id_, slot in self.slots.items() if self.state.slots[<uint32_t>slot].flags & <uint32_t>flags]

    cdef Record *at(self, uint64_t id_):
        """The record of an id, or NULL."""
        slot = self.slots.get(id_)
        return NULL if slot is None else &self.state.slots[<uint32_t>slot]

    def fixed_stay(self):
        """Find the nodes whose number is stored, which are not known yet, also by their names and numbers."""
        cdef Record *record
        for id_ in self.ids(FIXED):
            record = self.at(id_)
            if not record.flags & (UNLINKED | SUPERSEDED):
                self.fixed[record.parent, self.state.name_of(record)] = id_
                self.linked[self.state.number_of(record), record.kind] = id_

    cdef uint64_t id_for(self, uint64_t number, uint64_t parent, bytes name, uint32_t kind, bint linked) except? 0:
        """The id that the object with that inode number had under a name; 0 if it is not known. ``linked``: of all
        objects with that number, it may have other names."""
        cdef Record *record = self.expected
        if self.fixed:
            known = self.fixed.get((parent, name))
            if known is None and linked:
                known = self.linked.get((number, kind >> 12))
            if known is not None and self.at(known) != NULL and self.at(known).kind == kind >> 12:
                return known
        if record == NULL or record.parent != parent or self.state.name_of(record) != name:
            record = self.at(number)
        elif record.flags & FIXED and record.kind == kind >> 12:
            return record.id
        if record == NULL or record.id != number or record.parent != parent or record.kind != kind >> 12:
            return 0
        if record.flags & (FIXED | UNLINKED | SUPERSEDED) or self.state.name_of(record) != name:
            return 0
        return number

    cdef Record *take(self, uint64_t id_):
        """The record of an id, which is no longer that of a former node; or NULL."""
        cdef Record *record = self.at(id_)
        if record != NULL:
            del self.slots[id_]
            self.left(record.parent)
        return record

    cdef object left(self, uint64_t parent):
        """One node less is below a parent."""
        count = self.below.get(parent, 0) - 1
        if count > 0:
            self.below[parent] = count
        else:
            self.below.pop(parent, None)
