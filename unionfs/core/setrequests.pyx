"""SETATTR in the plain case: see `setting`, and `copyup` for a small file of a lower.

What else a SETATTR asks for, such as clearing set-id bits for a process, is left to Python, with nothing changed.
"""

from libc.errno cimport EINTR, EIO
from libc.stdint cimport uint32_t

from unionfs.core.node cimport Attributes, Node
from unionfs.core.opening cimport may_copy_up
from unionfs.core.setting cimport (
    ATIME, CTIME, FH, GID, KILL_SET_IDS, LOCKOWNER, MODE, MTIME, NOW, SIZE, UID, set_attributes,
)
from unionfs.core.stats cimport failure, nanoseconds_of
from unionfs.core.validity cimport fill_answer
from unionfs.core.wire cimport attr_answer, fuse_setattr_in

cdef enum:
    CHANGED = MODE | UID | GID | SIZE | ATIME | MTIME
    # A time that is to be the present one is sent too.
    PLAIN = CHANGED | FH | LOCKOWNER | CTIME | NOW

cpdef bint are_kept_times(uint32_t valid) noexcept:
    """Whether a SETATTR has times that the kernel has kept and writes later; fs/fuse/inode.c, fuse_flush_times."""
    return valid & ~(FH | LOCKOWNER) == (MTIME | CTIME)


cpdef object error_to_answer(error, uint32_t valid):
    """The error that a failed SETATTR returns. Of kept times EINTR is EIO: fsync(2) would report it once, and succeed
    when its caller repeats it."""
    return failure(EIO) if error.errno == EINTR and are_kept_times(valid) else error


cdef bint is_plain(uint32_t valid, bint by_root) noexcept:
    if valid & KILL_SET_IDS:  # which root's chown(2) does by itself
        return by_root and valid & (UID | GID) and not valid & (SIZE | ~(PLAIN | KILL_SET_IDS))
    return valid & CHANGED and not valid & ~PLAIN


cdef class SetRequests:
    """Changes attributes for the requests of one mount."""

    def __init__(
        self, NodeTable nodes not None, Gate gate not None, NodeFlags flags not None, SmallCopyUps copies,
        dict running not None
    ):
        """``copies``: what copies up small files, None if they are not plain. ``running``: the nodes that are
        being copied up in a thread, as keys."""
        self.nodes, self.gate, self.flags, self.copies, self.running = nodes, gate, flags, copies, running
        self.change = Change()

    cdef size_t answer(self, const fuse_in_header *header, const char *body, size_t size, void *out) except? 0:
        """The size of the answer, or 0 if Python must answer. Raises ``OSError``."""
        try:
            return self.plain_answer(header, body, size, out)
        except OSError as error:
            raise error_to_answer(error, (<const fuse_setattr_in *>body).valid)

    cdef size_t plain_answer(
        self, const fuse_in_header *header, const char *body, size_t size, void *out
    ) except? 0:
        cdef const fuse_setattr_in *given = <const fuse_setattr_in *>body
        cdef Node node
        cdef Attributes found = None
        if size < sizeof(fuse_setattr_in) or not is_plain(given.valid, header.uid == 0):
            return 0
        node = self.nodes.found(header.nodeid)
        if node is None or (self.running and node in self.running):
            return 0
        self.take(given)
        if node.is_changed_in_place():
            self.flags.of(node)
            found = set_attributes(self.gate, node, self.change)
        elif self.copies is not None and node.id == header.nodeid:
            may_copy_up(node, header.uid)
            found = self.copies.answer(node, self.change)
        if found is None:
            return 0
        if given.valid & MTIME and node.use is not None and node.use.writebacks:
            node.use.mtime_ns = nanoseconds_of(self.change.new_mtime)
        fill_answer(<attr_answer *>out, found, header.nodeid)
        return sizeof(attr_answer)

    cdef void answered(self) noexcept:
        """The request is over: close the files of a copy-up, while the caller wakes up."""
        if self.copies is not None:
            self.copies.close_left()

    cdef void take(self, const fuse_setattr_in *given) noexcept:
        cdef Change change = self.change
        change.valid = given.valid & CHANGED
        change.new_mode, change.new_uid, change.new_gid = given.mode, given.uid, given.gid
        change.new_size = given.size
        change.new_atime.tv_sec, change.new_atime.tv_nsec = given.atime, given.atimensec
        change.new_mtime.tv_sec, change.new_mtime.tv_nsec = given.mtime, given.mtimensec
