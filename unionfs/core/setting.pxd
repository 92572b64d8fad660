# Changes of attributes.

from libc.stdint cimport int64_t, uint32_t
from posix.time cimport timespec

from unionfs.core.node cimport Attributes, Node
from unionfs.core.places cimport Gate

cdef enum:
    # FATTR_*, include/uapi/linux/fuse.h
    MODE = 1
    UID = 2
    GID = 4
    SIZE = 8
    ATIME = 16
    MTIME = 32
    FH = 64
    NOW = 384  # of both times
    LOCKOWNER = 512
    CTIME = 1024
    KILL_SET_IDS = 2048  # FATTR_KILL_SUIDGID

cdef class Change:
    cdef uint32_t valid, new_mode, new_uid, new_gid
    cdef int64_t new_size
    cdef timespec new_atime, new_mtime
    cdef readonly object killer

    cdef int apply(self, int fd, bint path) noexcept nogil

cpdef Attributes set_attributes(Gate gate, Node node, Change change)
