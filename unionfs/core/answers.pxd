# Requests that need no decision.

from libc.stdint cimport uint64_t

from unionfs.core.files cimport iovec
from unionfs.core.listings cimport ListingRequests
from unionfs.core.memo cimport Memo
from unionfs.core.namerequests cimport NameRequests
from unionfs.core.node cimport Node
from unionfs.core.nodes cimport NodeTable
from unionfs.core.objects cimport Objects
from unionfs.core.opens cimport Opens
from unionfs.core.reads cimport Reads
from unionfs.core.setrequests cimport SetRequests
from unionfs.core.wire cimport OPCODES, fuse_in_header

cdef extern from "<sys/uio.h>" nogil:
    ssize_t writev(int fd, const iovec *parts, int count)

cdef class Answers:
    cdef int fd
    cdef NodeTable nodes
    cdef Objects objects
    cdef Opens opens
    cdef NameRequests names
    cdef SetRequests sets
    cdef ListingRequests listings
    cdef Reads reads
    cdef bint acl
    cdef object refused
    cdef Memo memo
    cdef bint repeats
    cdef uint64_t counted[OPCODES]
    cdef bint left[OPCODES]

    cdef int answer(self, const char *message, size_t size) except -1
    cdef int answer_now(self, const char *message, size_t size) except -1
    cdef int begin(self, const fuse_in_header *header, const char *body, size_t size) except -1
    cdef int lookup(self, const fuse_in_header *header, const char *body, size_t size) except -1
    cdef int getattr(self, const fuse_in_header *header, size_t size) except -1
    cdef int setattr(self, const fuse_in_header *header, const char *body, size_t size) except -1
    cdef int open_or_release(self, const fuse_in_header *header, const char *body, size_t size) except -1
    cdef int change(self, const fuse_in_header *header, const char *body, size_t size) except -1
    cdef int read(self, const fuse_in_header *header, const char *body, size_t size) except -1
    cdef int readdir(self, const fuse_in_header *header, const char *body, size_t size) except -1
    cdef int statfs(self, const fuse_in_header *header) except -1
    cdef int readlink(self, const fuse_in_header *header) except -1
    cdef int getxattr(self, const fuse_in_header *header, const char *body, size_t size) except -1
    cdef int listxattr(self, const fuse_in_header *header, const char *body, size_t size) except -1
    cdef int stored_xattr(
        self, const fuse_in_header *header, Node node, const char *name, size_t wanted
    ) except -1
    cdef void forget(self, const fuse_in_header *header, const char *body, size_t size)
    cdef void send(self, void *answer, size_t size)
    cdef void send_parts(self, iovec *parts, int count)
    cdef void fail(self, const fuse_in_header *header, int code)
