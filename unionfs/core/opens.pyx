"""OPEN and RELEASE of files of lowers that are only read, and of files of the upper.

The kernel receives the data of a small lower file with its first open, which saves the READ. The file has no
other open then, so no request that waits for this daemon holds a lock on its pages.
"""

from libc.errno cimport errno as c_errno
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.fcntl cimport O_ACCMODE, O_RDWR, O_TRUNC
from posix.unistd cimport ftruncate, write

from unionfs.core.memo cimport may_ask
from unionfs.core.node cimport successor_of
from unionfs.core.opening cimport is_plain, is_plain_in_upper, take_back
from unionfs.core.stats cimport failure
from unionfs.core.wire cimport (
    FUSE_NOTIFY_INVAL_INODE, FUSE_NOTIFY_STORE, SMALL_FILE, fuse_out_header, inval_inode_notice, open_answer,
)

cdef enum:
    FOPEN_KEEP_CACHE = 2
    # FUSE_OPEN_KILL_SUIDGID, include/uapi/linux/fuse.h
    KILL_SET_IDS = 1


cdef class Opens:
    """Opens and closes files for the requests of one mount."""

    def __cinit__(self):
        self.notice = <store_notice *>malloc(sizeof(store_notice))
        if self.notice == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.notice)

    def __init__(
        self, int fd, NodeTable nodes not None, Handles handles not None, Opener opener not None,
        IoModes modes not None, NodeFlags protected not None, dict running not None,
        *, uint32_t flags, int64_t small
    ):
        """``running``: as in `SetRequests`. ``flags``: FOPEN_* of files in the page cache. ``small``: for larger
        files of lowers (bytes) Python decides whether they pass through."""
        self.fd, self.nodes, self.handles, self.opener = fd, nodes, handles, opener
        self.modes, self.protected, self.running = modes, protected, running
        self.flags, self.small = flags, small

    cdef int open(self, const fuse_in_header *header, const char *body, size_t size, void *out) except -1:
        """OPEN; returns the size of the answer, or 0 if Python must answer."""
        cdef open_answer *answer = <open_answer *>out
        cdef Node node = self.nodes.known(header.nodeid)
        cdef OpenFile file
        cdef Use use
        cdef Handle handle
        cdef uint64_t number
        if size < 8 or node is None or successor_of(node) is not None:
            return 0
        if is_plain_in_upper(node):
            return self.open_in_upper(header, node, <const uint32_t *>body, answer)
        if (<const uint32_t *>body)[0] & <uint32_t>(O_ACCMODE | O_TRUNC) or not is_plain(node):
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
        if not use.filled and not use.cached and may_ask(file.number):
            self.fetch(node, file)
        number = self.handles.add(node, file, None, header.uid, False, False, header.unique)
        handle = self.handles.by_number[number]
        answer.body.fh, answer.body.backing_id = number, 0
        use.opened(handle)
        answer.body.open_flags = self.flags & ~<uint32_t>(FOPEN_KEEP_CACHE if use.written else 0)
        if not use.filled and use.cached == 1 and answer.body.open_flags & FOPEN_KEEP_CACHE:
            use.filled = True
            self.fill(node, file)
        answer.header.length, answer.header.error = sizeof(open_answer), 0
        return sizeof(open_answer)

    cdef int open_in_upper(
        self, const fuse_in_header *header, Node node, const uint32_t *flags, open_answer *answer
    ) except -1:
        """The same for a file of the upper; ``flags``: those of open(2), and FUSE_OPEN_*."""
        cdef bint writes = flags[0] & <uint32_t>O_ACCMODE != 0, truncates = flags[0] & <uint32_t>O_TRUNC != 0
        cdef Use use = node.in_use()
        cdef OpenFile file
        cdef uint64_t number
        cdef bint mapped = use.mapped
        if (use.through and not use.of_upper) or (self.running and node in self.running):
            return 0
        if (writes or truncates) and (node.territory.read_only or self.protected.of(node)):
            return 0
        if truncates and flags[1] & KILL_SET_IDS:
            return 0
        self.handles.may_hold(header.uid)
        file = self.opener.lend_in_upper(node, use, writes or truncates)
        if file is None:
            return 0
        if truncates and ftruncate(file.number, 0) != 0:
            error = failure(c_errno)
            take_back(node, file)
            raise error
        number = self.handles.add(
            node, file, None, header.uid, writes, flags[0] & <uint32_t>O_ACCMODE == <uint32_t>O_RDWR, header.unique
        )
        try:
            self.modes.open_in_place(self.handles.by_number[number], &answer.body)
        except BaseException:
            self.handles.remove(number)
            raise
        if use.mapped and not mapped:
            self.forget_attributes(node)
        answer.body.fh = number
        answer.header.length, answer.header.error = sizeof(open_answer), 0
        return sizeof(open_answer)

    cdef void forget_attributes(self, Node node) noexcept:
        """Let the kernel drop the attributes that it has cached: stores through a mapping will change them. The node
        is held by its request, so this waits for nothing."""
        cdef inval_inode_notice notice
        notice.header.length, notice.header.error = sizeof(notice), FUSE_NOTIFY_INVAL_INODE
        notice.header.unique = 0
        notice.body.ino, notice.body.offset, notice.body.length = node.id, -1, 0
        write(self.fd, &notice, sizeof(notice))

    cdef int fetch(self, Node node, OpenFile file) except -1:
        """Read a small file of a slow layer before anything is recorded: see `memo`."""
        try:
            if file.stat.st_size <= SMALL_FILE:
                file.read_now(self.notice.data, file.stat.st_size, 0)
        except OSError:
            return 0
        except BaseException:
            take_back(node, file)
            raise
        return 0

    cdef int fill(self, Node node, OpenFile file) except -1:
        """Put a small file into the page cache; after an error the READ reports it."""
        cdef store_notice *notice = self.notice
        cdef ssize_t size = file.stat.st_size if file.has_stat else 0
        if not 0 < size <= SMALL_FILE or file.number < 0:  # one that has to be opened again comes too late here
            return 0
        try:
            if file.read_now(notice.data, size, 0) != size:
                return 0
        except OSError:
            return 0
        notice.header.length = sizeof(store_notice) - SMALL_FILE + size
        notice.header.error, notice.header.unique = FUSE_NOTIFY_STORE, 0
        notice.body.nodeid, notice.body.offset = node.id, 0
        notice.body.size, notice.body.padding = <uint32_t>size, 0
        write(self.fd, notice, notice.header.length)
        self.handles.bytes_read += size
        return 0

    cdef int release(self, const fuse_in_header *header, const char *body, size_t size, void *out) except -1:
        """RELEASE; as `open`."""
        cdef fuse_out_header *answer = <fuse_out_header *>out
        cdef Handle handle
        cdef uint64_t number
        if size < sizeof(uint64_t):
            return 0
        number = (<const uint64_t *>body)[0]
        if number:
            handle = self.handles.found(number)
            if handle is None:
                return 0
            try:
                self.modes.released(handle)
            finally:  # the kernel sends no other RELEASE
                self.handles.remove(number)
        answer.length, answer.error = sizeof(fuse_out_header), 0
        return sizeof(fuse_out_header)
