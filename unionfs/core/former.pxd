# Nodes that a former daemon of the mount knew.

from libc.stdint cimport uint32_t, uint64_t

from unionfs.core.state cimport Record, State

cdef class Former:
    cdef State state
    cdef dict slots, below, fixed, linked
    cdef readonly dict opens, numbers
    cdef public object restoring
    cdef Record *expected

    cdef Record *at(self, uint64_t id_)
    cdef uint64_t id_for(self, uint64_t number, uint64_t parent, bytes name, uint32_t kind, bint linked) except? 0
    cdef Record *take(self, uint64_t id_)
    cdef object left(self, uint64_t parent)
