"""How long the kernel may keep what an answer says."""

from libc.errno cimport EAGAIN
from libc.errno cimport errno as c_errno
from posix.fcntl cimport F_RDLCK, O_NONBLOCK, fcntl
from posix.unistd cimport close

from unionfs.core.files cimport Use
from unionfs.core.stats cimport O_CLOEXEC, O_NOFOLLOW, O_RDONLY, openat

cdef extern from "<fcntl.h>" nogil:
    int F_SETLEASE, F_SETSIG

cdef extern from "<signal.h>" nogil:
    int SIGURG

#: 136 years: converted, it fits the kernel's clock on every machine (fs/fuse/dir.c, time_to_jiffies).
cdef uint64_t FOREVER = <uint64_t>1 << 32
cdef uint32_t WHILE_WRITING_NS = 20_000_000

cdef enum:
    NOBODY, SOMEBODY, UNKNOWN


cdef validity valid_for(Node node, bint lasting) noexcept:
    """How long a node's attributes are valid.

    The kernel sends no request for a write through a backing file, but invalidates the attributes itself. A store
    through a mapping changes the times without anybody being told: so as long as the file may have such a mapping,
    its attributes are not valid at all. A mapping outlives the close; whether there is one, the backing file tells
    when it is not open here any more. Where it does not, they are valid for a second.
    """
    cdef Use use = node.use
    cdef validity found
    cdef int who
    found.seconds = found.nanoseconds = 0
    if not lasting:
        return found
    if use is None or not (use.writers or use.mapped):
        found.seconds = FOREVER
    elif not use.mapped:
        found.nanoseconds = WHILE_WRITING_NS
    elif not use.handles:
        who = writer_of(node)
        if who == NOBODY:
            use.mapped = False  # from the next answer on: the attributes in this one may be older
        elif who == UNKNOWN:
            found.seconds = 1
    return found


cdef int writer_of(Node node) noexcept:
    """Whether somebody has a node's file open to write, or mapped so: then it cannot have a read lease (fcntl(2)).

    The lease lasts for this call. Somebody who opens the file meanwhile to write waits until then, and the kernel
    sends a signal that is ignored by default: not SIGIO, which ends a process.
    """
    cdef int found = UNKNOWN, fd, flags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC
    if node.place is None or node.place.fd < 0 or node.held >= 0:
        return UNKNOWN
    fd = openat(node.place.fd, node.stored_name(), flags)
    if fd < 0:
        return UNKNOWN
    if fcntl(fd, F_SETSIG, SIGURG) == 0:
        if fcntl(fd, F_SETLEASE, F_RDLCK) == 0:
            found = NOBODY
        elif c_errno == EAGAIN:
            found = SOMEBODY
    close(fd)  # ends the lease
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
