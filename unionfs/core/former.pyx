"""Nodes that a former daemon of the mount knew, until they are used again.

A node is looked up again when a request, or the lookup of its name, needs it: that finds what its object is now. So a
daemon that takes over serves at once, however many nodes the kernel knows.
"""

from unionfs.core.state cimport FIXED, SUPERSEDED, UNLINKED


cdef class Former:
    """Their records, by id."""

    # slots: the slot of each record.
    # below: how many of them have a node as their parent.
    # expected: the one whose name is looked up just now.

    def __init__(self, State state not None):
        cdef uint32_t slot
        cdef Record *record
        cdef Record *other
        self.state, self.slots, self.below = state, {}, {}
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

    cdef uint64_t id_for(self, uint64_t number, uint64_t parent, bytes name, uint32_t kind) except? 0:
        """The id that the object with that inode number had under a name; 0 if it is not known."""
        cdef Record *record = self.expected
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
