# Changes of entries of the upper's directories.

from libc.stdint cimport uint32_t, uint64_t

from unionfs.core.creds cimport Creator
from unionfs.core.flags cimport NodeFlags
from unionfs.core.node cimport Node
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
    cdef bint make_entry(
        self, New *new, int dir_fd, const char *name, Creator identity, Workplace work
    ) except -1 nogil
    cdef bint replace(self, New *new, int work, int dir_fd, const char *name) except -1 nogil
    cdef Node node_of(self, Node parent, bytes name, Place place, const stat_t *st)
    cdef int hold(self, Node node) except -2
    cdef bint has_flags(self, Node node, Node parent) except -1
    cdef bint may_move(self, Node node, Node parent) except -1
    cdef bint has_data(self, Node node) except -1
    cdef bint unlink_entry(
        self, New *whiteout, int dir_fd, const char *name, bint in_place, bint below, Workplace work
    ) except -1 nogil
    cdef int lose(self, Node node, Node parent, bytes name, int held) except -1
