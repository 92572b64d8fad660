# A hash table of nodes by id.

from cpython.ref cimport PyObject
from libc.stdint cimport uint64_t

from unionfs.core.node cimport Node

cdef class IdTable:
    cdef PyObject **slots
    cdef size_t mask
    cdef readonly Py_ssize_t count
    cdef object collectable

    cdef Node get(self, uint64_t id_)
    cdef bint has(self, uint64_t id_) noexcept
    cdef int add(self, Node node) except -1
    cdef bint remove(self, Node node) noexcept
    cdef list nodes(self)
    cdef size_t slot_of(self, uint64_t id_) noexcept
    cdef void close_gap(self, size_t gap) noexcept
    cdef bint resize(self, size_t size) noexcept
