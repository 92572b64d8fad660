"""How long the kernel may keep what an answer says."""

#: 136 years: converted, it fits the kernel's clock on every machine (fs/fuse/dir.c, time_to_jiffies).
cdef uint64_t FOREVER = <uint64_t>1 << 32
cdef uint32_t WHILE_WRITING_NS = 20_000_000


cdef validity valid_for(Node node, bint lasting) noexcept:
    """How long a node's attributes are valid.

    The kernel sends no request for a write through a backing file, but invalidates the attributes itself. A
    store through a mapping is not reported at all: so attributes are valid for some milliseconds while such a
    file is open for writing (enough for the fstat after an open), and for a second afterwards, as a mapping
    outlives the close.
    """
    cdef validity found
    found.seconds = found.nanoseconds = 0
    if lasting:
        if node.use is None or not node.use.written:
            found.seconds = FOREVER
        elif node.use.writers:
            found.nanoseconds = WHILE_WRITING_NS
        else:
            found.seconds = 1
    return found


def valid(Node node not None, bint lasting):
    """How long a node's attributes are valid: seconds and nanoseconds. ``lasting``: see `Attributes`."""
    found = valid_for(node, lasting)
    return found.seconds, found.nanoseconds


cdef uint64_t entry_valid(Territory territory) noexcept:
    """How many seconds a name is valid, also one without an object."""
    return FOREVER if territory.lasting else 0


cdef void fill_entry(fuse_entry_out *out, Attributes found) noexcept:
    """fuse_entry_out of a node, whose lookups the caller counts."""
    cdef Node node = found.node
    cdef validity attributes = valid_for(node, found.lasting)
    out.nodeid = node.id
    out.generation = node.generation
    out.entry_valid = entry_valid(node.territory)
    out.entry_valid_nsec = 0
    out.attr_valid, out.attr_valid_nsec = attributes.seconds, attributes.nanoseconds
    found.fill(&out.attr)


cdef void fill_answer(attr_answer *answer, Attributes found, uint64_t id_) noexcept:
    """The answer to GETATTR and SETATTR of the node ``id_``, but for its unique number."""
    cdef Node node = found.node
    # Notices about changes of the node that superseded this one contain the new id.
    cdef validity lasts = valid_for(node, found.lasting and node.id == id_)
    answer.body.attr_valid, answer.body.attr_valid_nsec, answer.body.dummy = lasts.seconds, lasts.nanoseconds, 0
    found.fill(&answer.body.attr)
    answer.header.length, answer.header.error = sizeof(attr_answer), 0
