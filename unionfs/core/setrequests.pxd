# SETATTR in the plain case.

from unionfs.core.copyup cimport SmallCopyUps
from unionfs.core.flags cimport NodeFlags
from unionfs.core.nodes cimport NodeTable
from unionfs.core.places cimport Gate
from unionfs.core.setting cimport Change
from unionfs.core.wire cimport fuse_in_header, fuse_setattr_in

cdef class SetRequests:
    cdef NodeTable nodes
    cdef Gate gate
    cdef NodeFlags flags
    cdef SmallCopyUps copies
    cdef dict running
    cdef Change change

    cdef size_t plain_answer(
        self, const fuse_in_header *header, const char *body, size_t size, void *out
    ) except? 0
    cdef size_t answer(self, const fuse_in_header *header, const char *body, size_t size, void *out) except? 0
    cdef void answered(self) noexcept
    cdef void take(self, const fuse_setattr_in *given) noexcept
