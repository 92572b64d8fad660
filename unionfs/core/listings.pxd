# The answers to READDIR and READDIRPLUS.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from unionfs.core.entries cimport Entries, Item
from unionfs.core.node cimport Attributes, Node, Territory
from unionfs.core.nodes cimport NodeTable
from unionfs.core.places cimport Place
from unionfs.core.search cimport Search
from unionfs.core.stats cimport fuse_attr, stat_t

cdef struct fuse_dirent:
    # include/uapi/linux/fuse.h; the name follows
    uint64_t ino
    uint64_t off
    uint32_t namelen
    uint32_t type

cdef struct fuse_entry_out:
    uint64_t nodeid
    uint64_t generation
    uint64_t entry_valid
    uint64_t attr_valid
    uint32_t entry_valid_nsec
    uint32_t attr_valid_nsec
    fuse_attr attr

cdef class Dirents:
    cdef readonly size_t size, limit
    cdef readonly list nodes
    cdef bytearray data

    cdef bint fits(self, size_t length, bint plus) noexcept
    cdef char *put(
        self, const char *name, size_t length, uint64_t ino, uint64_t off, uint32_t mode, bint plus
    ) noexcept
    cdef void put_node(
        self, const char *name, size_t length, uint64_t off, Node node, Attributes attributes
    )

cdef class Lister:
    cdef NodeTable nodes
    cdef Search merge
    cdef Territory merged
    cdef object unreachable
    cdef Node child
    cdef Attributes attributes

    cpdef Py_ssize_t add_names(self, Node directory, Entries entries, Py_ssize_t first, Dirents answer) except -1
    cpdef Py_ssize_t add_nodes(
        self, Node directory, Entries entries, Py_ssize_t first, Dirents answer, Py_ssize_t at_most=*
    ) except -1
    cdef int find(self, Node directory, bytes name, Py_ssize_t first) except -1
    cdef int find_merged(self, Node directory, bytes name, Py_ssize_t first) except -1
    cdef bint stat_known(self, Node node, stat_t *st) except -1
    cdef object number(self, Node directory, bytes name)
    cdef bint is_plain(self, Entries entries, const Item *item, bytearray parts) except -1
    cdef int state_of(self, Entries entries, Py_ssize_t index) except -1
