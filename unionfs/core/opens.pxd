# OPEN and RELEASE.

from libc.stdint cimport int64_t, uint32_t

from unionfs.core.files cimport Handle, OpenFile, Use
from unionfs.core.flags cimport NodeFlags
from unionfs.core.iomodes cimport IoModes
from unionfs.core.node cimport Node
from unionfs.core.nodes cimport NodeTable
from unionfs.core.opening cimport Handles, Opener
from unionfs.core.wire cimport fuse_in_header, open_answer, store_notice

cdef class Opens:
    cdef int fd
    cdef NodeTable nodes
    cdef Handles handles
    cdef Opener opener
    cdef IoModes modes
    cdef NodeFlags protected
    cdef dict running
    cdef uint32_t flags
    cdef int64_t small
    cdef store_notice *notice

    cdef int open(self, const fuse_in_header *header, const char *body, size_t size, void *out) except -1
    cdef int release(self, const fuse_in_header *header, const char *body, size_t size, void *out) except -1
    cdef int open_in_upper(
        self, const fuse_in_header *header, Node node, const uint32_t *flags, open_answer *answer
    ) except -1
    cdef void forget_attributes(self, Node node) noexcept
    cdef int fetch(self, Node node, OpenFile file) except -1
    cdef int fill(self, Node node, OpenFile file) except -1
