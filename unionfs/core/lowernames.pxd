# Which lowers have a name.

from unionfs.core.entries cimport Entries
from unionfs.core.places cimport Gate, Place

cdef class Lowers:
    cdef list given, lowers
    cdef Entries names
    cdef Py_ssize_t asked

cdef class LowerNames:
    cdef Gate gate
    cdef dict kept
    cdef Lowers newest
    cdef readonly Py_ssize_t many, count
    cdef Py_ssize_t asked, most_names, most_directories, large

    cpdef list parts(self, list parts, bytes name)
    cdef Lowers known(self, list parts, Py_ssize_t first)
    cdef int read(self, Lowers lowers) except -1
    cdef int limit(self) except -1
    cdef int drop(self, Place lowest) except -1
