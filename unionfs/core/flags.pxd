# The flags of nodes.

from unionfs.core.node cimport Node
from unionfs.core.places cimport Gate

cdef class NodeFlags:
    cdef Gate gate
    cdef bytes protattr

    cpdef int of(self, Node node) except -1
    cdef bint has_none(self, Node node) except -1
    cdef bint stores_none(self, Node node) except -1
