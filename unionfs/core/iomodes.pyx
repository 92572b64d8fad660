"""The I/O modes of nodes: opens with a backing file (passthrough), and through the page cache of the mount.

`fuse.direct.nodeio` has the rules, and decides about files of lowers. fs/fuse/backing.c: FUSE_DEV_IOC_BACKING_OPEN
and _CLOSE.
"""

from libc.errno cimport EBADF, EFAULT
from libc.errno cimport errno as c_errno
from libc.stdint cimport uint64_t

from unionfs.core.node cimport Node, has_lower_data, successor_of
from unionfs.core.state cimport MAPPED, WRITTEN
from unionfs.core.stats cimport failure

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef enum:
    # include/uapi/linux/fuse.h: _IOW(229, 1, struct fuse_backing_map), _IOW(229, 2, uint32_t); 7.40
    BACKING_OPEN = 0x4010E501
    BACKING_CLOSE = 0x4004E502
    FOPEN_KEEP_CACHE = 2
    KEPT = 256

cdef struct fuse_backing_map:
    int32_t fd
    uint32_t flags
    uint64_t padding


cdef class IoModes:
    """Counts the opens of one mount, and registers backing files."""

    # passed_through, refused: opens with a backing file, and those whose backing file the kernel refused.
    # registered: backing files registered now.
    # kept: programs whose last open was closed: their backing files stay open and registered for the next one,
    #     which saves half of its time; those used last. Each with its backing id and file.
    # awaited: inode numbers of lower files whose writer is about to come back; see `await_writer`.

    def __init__(self, int fd, *, bint uppers, bint keeps, uint32_t through_flags, uint32_t cached_flags,
        State state=None,
    ):
        """``fd``: the device. ``uppers``: whether files of the upper get a backing file. ``keeps``: whether files
        of lowers are kept. FOPEN_* of opens with a backing file, and of others. ``state``: where to record what
        another daemon needs."""
        self.state = state
        self.fd, self.uppers, self.keeps = fd, uppers, keeps
        self.through_flags, self.cached_flags = through_flags, cached_flags
        self.kept, self.awaited = {}, {}

    def has_registered(self, ids, kept):
        """Count the backing files that a former daemon registered, and let go of those that it kept."""
        self.registered += len(ids) + len(kept)
        for id_ in kept:
            try:
                self.unregister(id_)
            except OSError:  # it died before it had registered it, or when it had let go
                pass

    cpdef bint register(self, Handle handle) except -1:
        """Register the file of an open, which decides the mode of its node. Returns False where the kernel refuses:
        ELOOP for a file on too many stacked filesystems, EPERM without privilege. Raises ``OSError``."""
        cdef Node node = handle.node
        cdef Use use = node.use
        cdef OpenFile file
        cdef fuse_backing_map given
        cdef int id_
        kept = self.kept.pop(node, None) if self.kept else None
        if kept is not None:
            id_, file, place = kept
            if file is handle.file:
                if self.state is not None:
                    self.state.drop_kept(place)
                file.release()
                use.passes_through(id_, of_upper=False)
                return True
            self.let_go_of(kept)  # it was copied up
        given.fd, given.flags, given.padding = handle.file.descriptor(), 0, 0
        id_ = ioctl(self.fd, BACKING_OPEN, &given)
        if id_ < 0:
            if c_errno == EBADF or c_errno == EFAULT:
                raise failure(c_errno)
            self.refused += 1  # this file uses the page cache
            return False
        self.registered += 1
        use.backing_id, use.resized = id_, False
        use.of_upper = not has_lower_data(node) and node.is_changed_in_place()
        return True

    cdef int unregister(self, int id_) except -1:
        """The kernel keeps a backing file until the last open file with it is closed."""
        cdef uint32_t given = id_
        self.registered -= 1
        if ioctl(self.fd, BACKING_CLOSE, &given) < 0:
            raise failure(c_errno)
        return 0

    cdef int let_go_of(self, tuple kept) except -1:
        cdef OpenFile file
        id_, file, place = kept
        if self.state is not None:
            self.state.drop_kept(place)
        self.unregister(id_)
        file.release()
        return 0

    def let_go(self):
        """Close the files kept for the next open: others may have replaced them in the lower."""
        while self.kept:
            self.let_go_of(self.kept.popitem()[1])

    cdef int open_in_place(self, Handle handle, fuse_open_out *out) except -1:
        """Count an open of a file whose data is changed in place, and register the file."""
        cdef Node node = handle.node
        if self.awaited:
            self.awaited.pop(node.ino, None)
        # Others change bound storage too, so it uses the page cache.
        if self.uppers and not node.use.through and not node.use.cached and node.territory.lasting:
            self.register(handle)
        return self.count(handle, True, out)

    cdef int count(self, Handle handle, bint in_place, fuse_open_out *out) except -1:
        cdef Node node = handle.node
        cdef Use use = node.use
        use.opened(handle)
        if node.record != NULL and use.written:
            node.record.flags |= WRITTEN | (MAPPED if use.mapped else 0)
        if handle.through:
            self.passed_through += 1
            out.open_flags, out.backing_id = self.through_flags, use.backing_id
            return 0
        out.open_flags, out.backing_id = self.cached_flags, 0
        if use.written or not node.territory.lasting:
            out.open_flags &= ~<uint32_t>FOPEN_KEEP_CACHE  # older cached data may be outdated
        elif not in_place:
            use.filled = True
        return 0

    def opened_in_place(self, Handle handle not None):
        """Count an open of a file whose data is changed in place; returns FOPEN_* flags and the backing id for the
        answer."""
        cdef fuse_open_out out
        self.open_in_place(handle, &out)
        return out.open_flags, out.backing_id

    def opened_elsewhere(self, Handle handle not None):
        """The same for a file of a lower, after :meth:`register` if it is to pass through."""
        cdef fuse_open_out out
        self.count(handle, False, &out)
        return out.open_flags, out.backing_id

    cpdef int released(self, Handle handle) except -1:
        """Count a close."""
        cdef Node node = handle.node
        cdef int id_ = node.use.closed(handle)
        if not id_:
            return 0
        if not self.keeps or node.is_changed_in_place() or node.unlinked or successor_of(node) is not None:
            return self.unregister(id_)
        self.kept[node] = id_, handle.file.take(), 0 if self.state is None else self.state.add_kept(node.id, id_)
        if len(self.kept) > KEPT:
            self.let_go_of(self.kept.pop(next(iter(self.kept))))
        return 0
