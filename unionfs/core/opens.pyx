"""OPEN and RELEASE of files that are only read.

The kernel receives the data of a small lower file with its first open, which saves the READ. The file has no
other open then, so no request that waits for this daemon holds a lock on its pages.
"""

from libc.errno cimport EINVAL, EOPNOTSUPP
from libc.errno cimport errno as c_errno
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from posix.fcntl cimport O_ACCMODE, O_TRUNC
from posix.unistd cimport pread, write

from unionfs.core.node cimport successor_of
from unionfs.core.opening cimport is_plain, take_back
from unionfs.core.wire cimport FUSE_NOTIFY_STORE, SMALL_FILE, fuse_out_header, open_answer

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    int RWF_NOWAIT
    ssize_t preadv2(int fd, const iovec *parts, int count, long offset, int flags)

cdef enum:
    FOPEN_KEEP_CACHE = 2


cdef class Opens:
    """Opens and closes files for the requests of one mount."""

    def __cinit__(self):
        self.notice = <store_notice *>malloc(sizeof(store_notice))
        if self.notice == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.notice)

    def __init__(
        self, int fd, NodeTable nodes not None, Handles handles not None, Opener opener not None, released,
        *, uint32_t flags, int64_t small
    ):
        """``released`` counts the close of a file in passthrough. ``flags``: FOPEN_* of files in the page
        cache. ``small``: for larger files (bytes) Python decides whether they pass through."""
        self.fd, self.nodes, self.handles, self.opener = fd, nodes, handles, opener
        self.released, self.flags, self.small = released, flags, small

    cdef int open(self, const fuse_in_header *header, const char *body, size_t size, void *out) except -1:
        """OPEN; returns the size of the answer, or 0 if Python must answer."""
        cdef open_answer *answer = <open_answer *>out
        cdef Node node = self.nodes.by_id.get(header.nodeid)
        cdef OpenFile file
        cdef Use use
        cdef Handle handle
        cdef uint64_t number
        if size < 8 or (<const uint32_t *>body)[0] & <uint32_t>(O_ACCMODE | O_TRUNC) or node is None:
            return 0
        if successor_of(node) is not None or not is_plain(node):
            return 0
        use = node.in_use()
        if use.through:
            return 0
        file = self.opener.lend_unread(node, use) if use.filled else self.opener.lend(node, use)
        if file is None:
            return 0
        if not use.filled and not use.cached and (not file.has_stat or file.stat.st_size > self.small):
            take_back(node, file)
            return 0
        number = self.handles.add(node, file, None, False, False)
        handle = self.handles.by_number[number]
        answer.body.fh, answer.body.backing_id = number, 0
        use.opened(handle)
        answer.body.open_flags = self.flags & ~<uint32_t>(FOPEN_KEEP_CACHE if use.written else 0)
        if not use.filled and use.cached == 1 and answer.body.open_flags & FOPEN_KEEP_CACHE:
            use.filled = True
            self.fill(node, file)
        answer.header.length, answer.header.error = sizeof(open_answer), 0
        return sizeof(open_answer)

    cdef void fill(self, Node node, OpenFile file) noexcept:
        """Put a small file into the page cache; after an error the READ reports it."""
        cdef store_notice *notice = self.notice
        cdef ssize_t size = file.stat.st_size if file.has_stat else 0, count
        cdef iovec part
        if not 0 < size <= SMALL_FILE:
            return
        part.iov_base, part.iov_len = notice.data, size
        if file.waits:
            count = preadv2(file.number, &part, 1, 0, RWF_NOWAIT)
            if count < 0 and (c_errno == EOPNOTSUPP or c_errno == EINVAL):
                file.waits = False
        if not file.waits:
            count = pread(file.number, notice.data, size, 0)
        if count != size:
            return
        notice.header.length = sizeof(store_notice) - SMALL_FILE + size
        notice.header.error, notice.header.unique = FUSE_NOTIFY_STORE, 0
        notice.body.nodeid, notice.body.offset = node.id, 0
        notice.body.size, notice.body.padding = <uint32_t>size, 0
        write(self.fd, notice, notice.header.length)
        self.handles.bytes_read += size

    cdef int release(self, const fuse_in_header *header, const char *body, size_t size, void *out) except -1:
        """RELEASE; as `open`."""
        cdef fuse_out_header *answer = <fuse_out_header *>out
        cdef Handle handle
        cdef uint64_t number
        if size < sizeof(uint64_t):
            return 0
        number = (<const uint64_t *>body)[0]
        if number:
            handle = self.handles.by_number.get(number)
            if handle is None:
                return 0
            if handle.through:
                self.released(handle)
            else:
                (<Node>handle.node).use.closed(handle)
            self.handles.remove(number)
        answer.length, answer.error = sizeof(fuse_out_header), 0
        return sizeof(fuse_out_header)
