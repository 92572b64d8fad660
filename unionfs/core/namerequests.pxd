# Requests that change names, in the plain case.

from libc.stdint cimport uint32_t

from unionfs.core.changing cimport EntryChanges, New
from unionfs.core.iomodes cimport IoModes
from unionfs.core.node cimport Attributes, Node
from unionfs.core.nodes cimport NodeTable
from unionfs.core.opening cimport Handles
from unionfs.core.wire cimport fuse_in_header

cdef class NameRequests:
    cdef NodeTable nodes
    cdef EntryChanges changes
    cdef Handles handles
    cdef IoModes modes
    cdef bint masks

    cdef size_t answer(self, const fuse_in_header *header, const char *body, size_t size, void *out) except? 0
    cdef Node directory(self, object id_)
    cdef Attributes make(
        self, New *new, const fuse_in_header *header, const char *body, size_t size, uint32_t umask
    )
    cdef size_t made(self, const fuse_in_header *header, const char *body, size_t size, void *out) except? 0
    cdef size_t created(self, const fuse_in_header *header, const char *body, size_t size, void *out) except? 0
    cdef bint renamed(self, const fuse_in_header *header, const char *body, size_t size) except -1

cdef bytes name_in(const char *body, size_t size)
