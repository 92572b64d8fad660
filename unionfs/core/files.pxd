# Open files: backing fds, and the use of a node.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from unionfs.core.state cimport HandleRecord
from unionfs.core.stats cimport stat_t

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len

cdef class OpenFile:
    cdef int number
    cdef stat_t stat
    cdef bint has_stat
    cdef object result
    cdef readonly list xattrs
    cdef readonly bint readable, writable, waits
    cdef bint counted
    cdef readonly Py_ssize_t users

    cdef int descriptor(self) except -2
    cdef void leave(self)
    cdef ssize_t read_now(self, char *buffer, size_t size, uint64_t offset) except -2
    cpdef take(self)
    cpdef release(self)

cdef class UnreadFile(OpenFile):
    cdef object open, node
    cdef RestingFiles resting

    cdef bint is_idle(self)
    cdef void rest(self) noexcept
    cdef void leaves(self) noexcept

cdef class RestingFiles:
    cdef dict open_now
    cdef readonly Py_ssize_t most
    cdef readonly uint64_t rested

    cdef int opened(self, UnreadFile file) except -1

cdef class Handle:
    cdef readonly OpenFile file
    cdef readonly object who, node
    cdef readonly bint writes, maps, through
    cdef HandleRecord *record
    cdef bint holds, late
    cdef uint32_t uid
    cdef object table

cdef class Use:
    cdef readonly OpenFile file
    cdef readonly list handles
    cdef readonly Py_ssize_t cached, through, writers, mappers, writebacks
    cdef readonly bint filled, of_upper, resized, written, kept
    cdef readonly bint mapped  # ended by `validity`
    cdef readonly int backing_id
    cdef readonly bytes capability
    cdef readonly object mtime_ns, tickets

    cpdef opened(self, Handle handle)
    cpdef int closed(self, Handle handle)

cdef OpenFile new_file(int fd, bint waits, st)
