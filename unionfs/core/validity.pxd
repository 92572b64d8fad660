# How long the kernel may keep what an answer contains.

from libc.stdint cimport uint32_t, uint64_t

from unionfs.core.node cimport Attributes, Node

cdef struct Timeout:
    uint64_t seconds
    uint32_t nanoseconds

cdef Timeout name_validity(Node node) noexcept
cdef Timeout attribute_validity(Node node, Attributes attributes) noexcept
