# What calls into slow layers returned, for the request that is being answered.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from unionfs.core.marks cimport Mark
from unionfs.core.stats cimport stat_t

cdef enum:
    # The size of a buffer for the names of all xattrs
    NAMES_SIZE = 4096
    # What a call asks
    STAT
    OPEN
    READLINK
    XATTR
    FLAGS
    ATTRIBUTES
    READ
    ENTRIES
    FUNCTION

cdef class Call:
    cdef readonly uint32_t layer
    cdef int kind, fd
    cdef object key
    cdef bytes name, text
    cdef int64_t number
    cdef size_t size
    cdef object function, arguments, options
    cdef readonly bint done
    cdef bint started
    # the result
    cdef long value
    cdef int code
    cdef object data
    cdef stat_t st
    cdef bint opened
    cdef Mark mark
    cdef list found

    cdef int carry_out(self) except -1
    cdef int call(self) except -1
    cdef int read(self) except -1
    cdef int list_entries(self) except -1
    cdef int look_at_opened(self) except -1
    cdef Call follow(self, int kind, bytes name, int64_t number, size_t size)

cdef class Memo:
    cdef dict results, pending
    cdef uint64_t generation
    cdef readonly bint closed

    cdef Call ask(
        self, int kind, int fd, bytes name, bytes text, int64_t number, size_t size,
        object function=*, tuple arguments=*, object options=*
    )
    cdef int enter(self, Call call) except -1
    cdef int forget(self) except -1

cdef bint answering
cdef Memo current

cdef bint may_ask(int fd) noexcept nogil
