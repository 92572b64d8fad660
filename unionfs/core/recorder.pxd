# The nodes of a table by id, and what another daemon needs of them.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from unionfs.core.former cimport Former
from unionfs.core.idtable cimport IdTable
from unionfs.core.node cimport Node
from unionfs.core.state cimport Record, State

cdef class Recorder:
    cdef IdTable by_id
    cdef State state
    cdef Former former

    cdef void record(self, Node node)
    cdef void record_name(self, Node node)
    cdef void record_layer(self, Node node) noexcept
    cdef void record_number(self, Node node)
    cdef void begin(
        self, uint32_t kind, Node parent, bytes name, Node new_parent, bytes new_name, Node node, Node target, int held
    ) noexcept
    cdef void holds(self, int fd) noexcept
    cdef void done(self) noexcept
    cdef Node found(self, uint64_t id_)
    cdef Node known(self, uint64_t id_)
    cdef Node revived(self, uint64_t id_)
    cdef bint found_again(self, Node parent, Record *record) except -1
    cdef release_former(self, uint64_t id_)
    cdef void forget_id(self, uint64_t id_, int64_t lookups)
    cdef void subtract(self, Node node, int64_t lookups)
    cdef release(self, Node node)
