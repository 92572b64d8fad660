# What the bundles of system calls share.

from libc.stdint cimport uint64_t

from unionfs.core.stats cimport stat_t

cdef enum:
    # "#", 16 hexadecimal digits, a null byte
    NAME_SIZE = 18

cdef bint hooked

cdef class Workplace:
    cdef readonly int fd
    cdef uint64_t number
    cdef int last_whiteout
    cdef bint links, by_path

    cdef void next(self, char *name) noexcept nogil
    cdef int whiteout(self, int dir_fd, const char *name) noexcept nogil
    cdef int link_whiteout(self, int dir_fd, const char *name) noexcept nogil

cdef int call_hook(const char *step) except -1 with gil

cdef inline int passed(const char *step) except -1 nogil:
    """A step is done: the hook may let the change fail here."""
    if hooked:
        return call_hook(step)
    return 0
