# Changes of entries of the upper's directories.

from libc.stdint cimport uint32_t, uint64_t

from unionfs.core.creds cimport Creator
from unionfs.core.flags cimport NodeFlags
from unionfs.core.node cimport Attributes, Node
from unionfs.core.nodes cimport NodeTable
from unionfs.core.origins cimport OriginFormat
from unionfs.core.places cimport Gate, Place
from unionfs.core.search cimport Search
from unionfs.core.stats cimport stat_t
from unionfs.core.steps cimport NAME_SIZE, Workplace

cdef struct New:
    int fd
    bint opens, made, replaces
    uint32_t uid, gid, mode
    uint64_t rdev
    const char *target
    const char *opaque
    char name[NAME_SIZE]
    stat_t st

cdef struct Step:
    # made: whether a whiteout is in work. held, links: an fd of the object that loses a name, and how many it had.
    int kind, flags, dir_fd, new_fd, held
    uint64_t links
    bint made
    const char *name
    const char *new_name
    char whiteout[NAME_SIZE]

cdef class EntryChanges:
    cdef Gate gate
    cdef Search merge
    cdef NodeTable nodes
    cdef OriginFormat origins
    cdef Workplace work
    cdef Creator identity
    cdef NodeFlags flags
    cdef bint remembers
    cdef bytes metacopy, opaque

    cdef Place place_to_change(self, Node directory)
    cdef Attributes made(self, New *new, Node parent, bytes name, uint32_t umask)
    cdef bint make_entry(
        self, New *new, int dir_fd, const char *name, Creator identity, Workplace work
    ) except -1 nogil
    cdef void unmake(
        self, New *new, int dir_fd, const char *name, Workplace work, bint replaced
    ) noexcept nogil
    cdef bint replace(self, New *new, int work, int dir_fd, const char *name) except -1 nogil
    cdef Node node_of(self, Node parent, bytes name, Place place, const stat_t *st)
    cpdef bint unlink(self, Node parent, bytes name) except -1
    cpdef bint rmdir(self, Node parent, bytes name) except -1
    cpdef bint rename(self, Node parent, bytes name, Node new_parent, bytes new_name) except -1
    cdef bint remove(self, Step *step, Place place, Node node, Node parent, bytes name) except -1
    cdef bint carry_out(
        self, Step *step, Place place, Place new_place, Node lost, Node parent, bytes name
    ) except -1
    cdef int hold(self, Node node, Step *step) except -1
    cdef bint change_entry(self, Step *step, Workplace work) except -1 nogil
    cdef int lose(self, Node node, Node parent, bytes name, Step *step) except -1
    cdef bint has_flags(self, Node node, Node parent) except -1
    cdef bint may_move(self, Node node, Node parent) except -1
    cdef bint has_data(self, Node node) except -1
