# The I/O modes of nodes.

from libc.stdint cimport int32_t, uint32_t

from unionfs.core.files cimport Handle, OpenFile, Use
from unionfs.core.state cimport State
from unionfs.core.wire cimport fuse_open_out

cdef class IoModes:
    cdef readonly Py_ssize_t passed_through, refused, registered
    cdef readonly dict kept, awaited
    cdef State state
    cdef int fd
    cdef bint uppers, keeps
    cdef uint32_t through_flags, cached_flags

    cpdef bint register(self, Handle handle) except -1
    cdef int unregister(self, int id_) except -1
    cdef int let_go_of(self, tuple kept) except -1
    cdef int open_in_place(self, Handle handle, fuse_open_out *out) except -1
    cdef int count(self, Handle handle, bint in_place, fuse_open_out *out) except -1
    cpdef int released(self, Handle handle) except -1
