# The answers to READDIR and READDIRPLUS.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from unionfs.core.directories cimport KeptListings
from unionfs.core.entries cimport Entries, Item
from unionfs.core.node cimport Attributes, Node
from unionfs.core.territory cimport Territory
from unionfs.core.nodes cimport NodeTable
from unionfs.core.places cimport Place
from unionfs.core.search cimport Search
from unionfs.core.wire cimport fuse_entry_out, fuse_in_header

cdef struct fuse_dirent:
    # include/uapi/linux/fuse.h; the name follows
    uint64_t ino
    uint64_t off
    uint32_t namelen
    uint32_t type

cdef class Dirents:
    cdef readonly size_t size, limit
    cdef readonly list nodes
    cdef bytearray data

    cdef bint fits(self, size_t length, bint plus) noexcept
    cdef char *put(
        self, const char *name, size_t length, uint64_t ino, uint64_t off, uint32_t mode, bint plus
    ) noexcept
    cdef void put_node(self, const char *name, size_t length, uint64_t off, Attributes found)
    cpdef add_dots(self, Node directory, uint64_t off, bint plus)
    cdef char *start(self) noexcept
    cpdef sent(self, uint64_t unique=*)

cdef class Lister:
    cdef NodeTable nodes
    cdef Search merge
    cdef Territory merged
    cdef object unreachable

    cpdef add(self, Node directory, Entries entries, Py_ssize_t first, Dirents answer, bint plus)
    cpdef Py_ssize_t add_names(self, Node directory, Entries entries, Py_ssize_t first, Dirents answer) except -1
    cpdef Py_ssize_t add_nodes(self, Node directory, Entries entries, Py_ssize_t first, Dirents answer) except -1
    cdef object number(self, Node directory, bytes name)
    cdef bint is_plain(self, Entries entries, const Item *item, bytearray parts) except -1
    cdef int state_of(self, Entries entries, Py_ssize_t index) except -1

cdef class ListingRequests:
    cdef NodeTable nodes
    cdef Lister lister
    cdef KeptListings kept

    cdef Dirents answer(self, const fuse_in_header *header, const char *body, size_t size)
    cdef Entries entries(self, Node node, uint64_t offset)
