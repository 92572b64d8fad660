# The format of the origin of a copy.

from libc.stdint cimport uint64_t

cdef enum:
    # The length of an origin is one of its bytes.
    ORIGIN_SIZE = 255

cdef struct Filesystem:
    uint64_t device, subvolume
    unsigned long magic
    unsigned char uuid[16]
    bint known

cdef class OriginFormat:
    cdef readonly object numbers
    cdef Filesystem *filesystems
    cdef Py_ssize_t count
    cdef uint64_t plain_device, plain_limit

    cdef int encode(
        self, int dir_fd, const char *name, uint64_t device, unsigned char flags, unsigned char *origin
    ) noexcept nogil
    cdef bint decode(
        self, const unsigned char *origin, Py_ssize_t size, uint64_t *device, uint64_t *inode
    ) noexcept nogil
    cdef uint64_t number(self, uint64_t device, uint64_t inode) except? 0
