# READ.

from libc.stdint cimport uint64_t

from unionfs.core.files cimport OpenFile
from unionfs.core.nodes cimport NodeTable
from unionfs.core.opening cimport Handles, KeptFiles, Opener
from unionfs.core.wire cimport fuse_in_header, fuse_out_header

cdef class Reads:
    cdef NodeTable nodes
    cdef Handles handles
    cdef Opener opener
    cdef KeptFiles kept
    cdef char *buffer

    cdef fuse_out_header *answer(self, const fuse_in_header *header, const char *body, size_t size) except? NULL
    cdef OpenFile file(self, uint64_t id_, uint64_t number)
