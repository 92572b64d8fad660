# Nodes, the objects of a union's tree.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from unionfs.core.files cimport Use
from unionfs.core.places cimport Layer, Place
from unionfs.core.state cimport Record, is_resent, short_unique
from unionfs.core.stats cimport fuse_attr, stat_t
from unionfs.core.territory cimport Territory

cdef extern from "<stdbool.h>":
    ctypedef bint flag "bool"  # of one byte

cdef class Attributes:
    cdef stat_t stat
    cdef readonly Node node
    cdef readonly uint64_t ino
    cdef readonly int64_t ctime_ns
    cdef readonly uint32_t nlink
    cdef readonly bint lasting
    cdef object result

    cdef void fill(self, fuse_attr *attr) noexcept

cdef class Rare:
    cdef bytes entry
    cdef list links
    cdef object lower_data, identity
    cdef Node successor
    cdef int64_t superseded, lower_links, more_links, ctime_given, ctime_shown
    cdef bint has_ctime

cdef class Node:
    # There are as many as the kernel knows inodes: a word more is a megabyte more for 131,072.
    cdef readonly uint64_t id, ino
    cdef readonly int64_t key
    cdef public int64_t lookups  # settable for tests
    cdef readonly Territory territory
    cdef readonly Node parent
    cdef readonly bytes name
    cdef readonly list parts
    cdef readonly Place place
    cdef readonly dict children
    cdef readonly object flags
    cdef readonly Use use
    cdef Rare rare
    cdef Record *record
    cdef readonly uint32_t generation, kind
    cdef readonly int held
    cdef readonly flag unlinked, no_capability, from_origin

    cdef void begin(
        self, uint64_t id_, Territory territory, Node parent, bytes name, uint32_t kind, list places, int64_t key,
        uint64_t ino, uint32_t generation
    )
    cdef Rare uncommon(self)
    cpdef Use in_use(self)
    cdef Attributes shown(self, const stat_t *st)
    cdef bytes stored_name(self)
    cdef bint is_changed_in_place(self) noexcept
    cdef bint is_copy_in_index(self) noexcept
    cdef Layer top_layer(self)
    cdef int64_t ctime_to_show(self, int64_t ctime) noexcept
    cdef int check_stat(self, const stat_t *st) except -1
    cdef void drop_child(self, bytes name, Node node)

cdef Node new_node(
    uint64_t id_, Territory territory, Node parent, bytes name, uint32_t kind, list places, int64_t key,
    uint64_t ino, uint32_t generation
)

cdef inline void count_lookup(Node node, uint64_t unique) noexcept:
    """An answer contains the node. A request that was sent before may have been counted then."""
    cdef Record *record = node.record
    if record == NULL:
        node.lookups += 1
        return
    if is_resent(unique) and record.unique == short_unique(unique):
        return
    node.lookups += 1
    record.lookups, record.unique = node.lookups, short_unique(unique)

cdef inline bint has_lower_data(Node node) noexcept:
    """Whether its data is known to lie elsewhere."""
    return node.rare is not None and node.rare.lower_data is not None

cdef inline bint has_entry(Node node) noexcept:
    """Whether it has an entry in the index, or would get one with a copy-up."""
    return node.rare is not None and node.rare.entry is not None

cdef inline bint has_links(Node node) noexcept:
    """Whether it has additional names."""
    return node.rare is not None and node.rare.links is not None and len(node.rare.links) > 0

cdef inline void has_changed(Node node) noexcept:
    """Its object changes: see `Node.changes`."""
    if node.rare is not None:
        node.rare.has_ctime = False

cdef inline Node successor_of(Node node):
    """The node that took over its state, or None."""
    return None if node.rare is None else node.rare.successor
