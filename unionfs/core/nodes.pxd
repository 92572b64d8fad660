# The node table.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from unionfs.core.node cimport Node
from unionfs.core.territory cimport Territory
from unionfs.core.places cimport Gate, Layer, Place
from unionfs.core.recorder cimport Recorder
from unionfs.core.stats cimport stat_t

cdef class NodeTable(Recorder):
    cdef readonly Node root
    cdef readonly object numbers
    cdef dict by_inode, inodes_of, unstored
    cdef object gone, on_known, origins, index
    cdef bint copies_up, unique
    cdef uint32_t generation
    cdef Gate gate
    cdef uint64_t plain_device, plain_limit

    cdef int is_copy(self, Node node, const stat_t *st, bint readable) except -1
    cdef Node place_object(self, Node parent, bytes name, const stat_t *st, list places)
    cdef Node enter(
        self, Node parent, bytes name, const stat_t *st, list places, uint64_t number, bint from_origin, entry
    )
    cdef uint64_t number_of(self, bytes name, const stat_t *st, list places, bint *from_origin, list entry) except 0
    cdef uint64_t free(self, uint64_t number) except 0
    cdef uint64_t id_for(self, uint64_t number, Node parent, bytes name, uint32_t kind, bint linked=*) except 0
    cdef uint32_t next_generation(self) noexcept
    cdef bint is_linkable(self, const stat_t *st, Place place) noexcept
    cdef bint may_share(self, const stat_t *st, Place place) noexcept
    cdef end(self, Node node)
    cdef drop_inode(self, Node node)
    cdef release_number(self, int held, Layer layer)
