# Nodes, the objects of a union's tree.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from unionfs.core.files cimport Use
from unionfs.core.places cimport Layer, Place
from unionfs.core.stats cimport fuse_attr, stat_t

cdef class Attributes:
    cdef stat_t stat
    cdef readonly Node node
    cdef readonly uint64_t ino
    cdef readonly int64_t ctime_ns
    cdef readonly uint32_t nlink
    cdef readonly bint lasting
    cdef object result

    cdef void fill(self, fuse_attr *attr) noexcept

cdef class Territory:
    cdef readonly bint lasting, has_markers, read_only
    cdef readonly object owners

cdef class Node:
    cdef readonly uint64_t id, ino
    cdef readonly int64_t key
    cdef public int64_t lookups  # settable for tests
    cdef int64_t ctime_given, ctime_shown
    cdef readonly Territory territory
    cdef readonly Node parent, successor
    cdef readonly bytes name, entry
    cdef readonly list parts
    cdef readonly Place place
    cdef readonly dict children
    cdef readonly object lower_data, flags, links, identity
    cdef readonly Use use
    cdef readonly uint32_t generation, kind
    cdef readonly int held, superseded
    cdef readonly int64_t lower_links, more_links
    cdef readonly bint unlinked, no_capability, from_origin
    cdef bint has_ctime

    cpdef Use in_use(self)
    cdef Attributes shown(self, const stat_t *st)
    cdef bytes stored_name(self)
    cdef bint is_changed_in_place(self) noexcept
    cdef bint is_copy_in_index(self) noexcept
    cdef Layer top_layer(self)
    cdef int64_t ctime_to_show(self, int64_t ctime) noexcept
    cdef int check_stat(self, const stat_t *st) except -1
    cdef void drop_child(self, bytes name, Node node)

cdef Node new_node(
    uint64_t id_, Territory territory, Node parent, bytes name, uint32_t kind, list places, int64_t key,
    uint64_t ino, uint32_t generation
)
