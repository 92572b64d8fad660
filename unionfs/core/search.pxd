# The merge of names over the layers.

from unionfs.core.lowernames cimport LowerNames
from unionfs.core.places cimport Gate, Place
from unionfs.core.stats cimport stat_t

cdef class Search:
    cdef readonly Gate gate
    cdef readonly object markers, named
    cdef object directories
    cdef LowerNames lower_names
    cdef bytes whiteout
    cdef Py_ssize_t many, lowest
    cdef bint lacks_at

    cdef list find(self, list parts, bytes name, Py_ssize_t first, stat_t *st)
    cdef list merged(self, list parts, list searched, Py_ssize_t index, bytes name, stat_t *st)
    cdef list plain_parts(self, list searched, Py_ssize_t index, bytes name, const stat_t *top)
    cpdef bint is_visible_below(self, list parts, bytes name) except -1
    cdef bint hides(self, Place part, bytes name, int dir_fd) except -1
    cdef int whiteout_at(self, const stat_t *st, int dir_fd, bytes name) except -1

cdef bint is_hiding(bytes name) noexcept
cdef int stat_at(Gate gate, Place place, int dir_fd, bytes name, stat_t *st) except -1
