# Reading real directories, and the listings that are being read.

from libc.stdint cimport uint64_t

from unionfs.core.entries cimport Entries
from unionfs.core.places cimport Gate

cdef class Listing:
    cdef readonly list parts, fds
    cdef readonly bint large, merged

    cdef int open(self, Gate gate) except -1
    cpdef Entries entries(self, hashed=*)

cdef class KeptListings:
    cdef dict by_id
    cdef Py_ssize_t names, most

    cpdef Entries kept(self, uint64_t id_)
    cpdef keep(self, uint64_t id_, Entries entries)
    cpdef drop(self, uint64_t id_)
