# Opening files, and the table of open files.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from unionfs.core.files cimport Handle, OpenFile, RestingFiles, Use
from unionfs.core.node cimport Node
from unionfs.core.nodes cimport NodeTable
from unionfs.core.places cimport Gate

cdef class Handles:
    cdef NodeTable nodes
    cdef dict by_number
    cdef uint64_t last
    cdef readonly uint64_t bytes_read
    cdef readonly dict fds_of_users
    cdef readonly Py_ssize_t fds
    cdef Py_ssize_t shared, most, before_reserve, latest
    cdef bint counts_all

    cdef Handle found(self, uint64_t number)
    cpdef int may_hold(self, uint32_t uid) except -1
    cdef uint64_t add(self, Node node, OpenFile file, who, uint32_t uid, bint writes, bint maps, uint64_t unique=*)
    cdef Handle remove(self, uint64_t number)
    cdef int take_in(self, Handle handle, uint64_t number, uint32_t uid) except -1
    cdef int hold(self, Handle handle) except -1
    cdef int let_go(self, Handle handle) except -1

cdef class KeptFiles:
    cdef dict by_node
    cdef Py_ssize_t most
    cdef Node newest

    cpdef OpenFile find(self, Node node, bint write)
    cpdef keep(self, Node node, OpenFile file)
    cpdef drop(self, Node node)

cdef class Opener:
    cdef Gate gate
    cdef bytes metacopy
    cdef bint remembers, unread
    cdef object open
    cdef RestingFiles resting

    cpdef OpenFile open_plain(self, Node node)
    cdef bint is_still(self, Node node, OpenFile file) except -1
    cdef bint look_at_xattrs(self, Node node, OpenFile file) except -1
    cdef OpenFile opened(self, Node node, bint writes)
    cdef OpenFile lend(self, Node node, Use use)
    cdef OpenFile lend_in_upper(self, Node node, Use use, bint writes)
    cpdef OpenFile lend_unread(self, Node node, Use use)

cdef bint is_plain(Node node) noexcept
cdef bint is_plain_in_upper(Node node) noexcept
cpdef int may_copy_up(Node node, uint32_t uid) except -1
cpdef take_back(Node node, OpenFile file)
