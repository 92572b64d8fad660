# Real directories in layers, and the one gate from a directory to an fd.

from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.time cimport timespec

from unionfs.core.stats cimport stat_t

cdef class Layer:
    cdef readonly Py_ssize_t index
    cdef readonly str path
    cdef readonly bint is_upper, in_place, acl, quiet, memory, keeps_numbers, is_idmapped, remote
    cdef readonly uint32_t slow
    cdef readonly unsigned long magic
    cdef readonly dict known
    cdef public bint atime_stays  # settable for tests, as is the next one
    cdef public Py_ssize_t links_of_removed
    cdef readonly object dev, permissions
    cdef readonly Place root
    cdef bint is_bound, was_upper

    cdef int64_t key_of(self, const stat_t *st) noexcept nogil

cdef class BoundLayer(Layer):
    cdef readonly bint read_only

cdef class Place:
    cdef readonly Layer layer
    cdef readonly Place parent
    cdef readonly bytes name, default_acl
    cdef readonly int fd
    cdef readonly bint empty, impure, copied
    cdef readonly int64_t asked_named, key
    cdef timespec mtime
    cdef readonly uint64_t dev, inode
    cdef Place newer, older

cdef inline Py_ssize_t before_reserve(Py_ssize_t limit) noexcept:
    # How many fds of `limit` all may take that stay: names and copy-ups need the rest.
    return limit * 13 // 16

cdef class Gate:
    cdef readonly Py_ssize_t capacity
    cdef readonly object rights
    cdef Py_ssize_t limit, open_files  # of fds, and those of open files
    cdef Place newest, oldest
    cdef Py_ssize_t count

    cpdef int fd(self, Place place) except -1
    cpdef int keeps(self, int fd) except -1
    cpdef int open_for_listing(self, Place place) except -1
    cdef int walk(self, Place place) except -1
    cdef object refused(self, Place place, bytes name, int code)
    cdef int opened(self, int dir_fd, Place step) except -1
    cpdef forget(self, Place place)
    cdef void close_one(self, Place place)
    cdef void add(self, Place place)
    cdef void remove(self, Place place)

cdef int require_some(list places) except -1
cdef int open_quietly(Layer layer, int dir_fd, const char *name, int flags) except? -2
cdef Place new_place(Layer layer, Place parent, bytes name, int64_t key)
