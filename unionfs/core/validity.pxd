# How long the kernel may keep what an answer says.

from libc.stdint cimport uint32_t, uint64_t

from unionfs.core.node cimport Attributes, Node
from unionfs.core.territory cimport Territory
from unionfs.core.wire cimport attr_answer, fuse_entry_out, validity

cdef uint64_t entry_valid(Territory territory) noexcept
cdef validity valid_for(Node node, bint lasting) noexcept
cdef void fill_entry(fuse_entry_out *out, Attributes found) noexcept
cdef void fill_answer(attr_answer *answer, Attributes found, uint64_t id_) noexcept
