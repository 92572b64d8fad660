# The copy-up of small files.

from libc.stdint cimport int64_t, uint64_t

from unionfs.core.files cimport OpenFile
from unionfs.core.node cimport Attributes, Node
from unionfs.core.nodes cimport NodeTable
from unionfs.core.origins cimport ORIGIN_SIZE, OriginFormat
from unionfs.core.places cimport Gate, Layer
from unionfs.core.setting cimport Change
from unionfs.core.stats cimport stat_t
from unionfs.core.steps cimport NAME_SIZE, Workplace

cdef struct Copy:
    int source, target
    bint made, appeared, has_origin
    char name[NAME_SIZE]
    stat_t st
    int64_t size, key
    unsigned int mode
    int origin_size
    unsigned char origin[ORIGIN_SIZE]

cdef class SmallCopyUps:
    cdef readonly int64_t count, copied_bytes, nanoseconds
    cdef object told, directory, clones_never
    cdef int left[2]
    cdef Gate gate
    cdef Workplace work
    cdef NodeTable nodes
    cdef OriginFormat origins
    cdef bytes origin_name
    cdef const char *origin_text
    cdef unsigned int uid, gid, settable
    cdef int64_t limit
    cdef uint64_t no_clones
    cdef bint needs_write, remembers
    cdef char *buffer

    cdef Attributes answer(self, Node node, Change change)
    cdef Attributes make(self, Node node, Change change, int64_t limit, bint keep, bint answers)
    cdef void close_left(self) noexcept
    cdef bint may_copy(self, Node node)
    cdef OpenFile lend(self, Node node, Copy *copy)
    cdef bint prepare(
        self, Copy *copy, Layer layer, Workplace work, OriginFormat origins, int64_t limit
    ) except -1 nogil
    cdef bint copy_data(self, Copy *copy, int64_t whole) except -1 nogil
    cdef bint fetch(self, Copy *copy) except -1 nogil
    cdef bint may_clone(self, uint64_t device) except -1 nogil
    cdef int never_clones(self, uint64_t device) except -1 with gil
    cdef bint put(self, Copy *copy, Node node, bint answers) except -1
    cdef bint names(self, Copy *copy, Node node) except -1
    cdef int clean(self, Copy *copy, OpenFile lent) except -1
    cdef int change(self, Node node, Change change, Copy *copy) except -1

cpdef OpenFile hand_over(Node node, int fd, st, bint lend)
cpdef Node enters(NodeTable nodes, Node directory)
cpdef void entered(NodeTable nodes, Node directory) except *
