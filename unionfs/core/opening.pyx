"""Opening files in the plain case, and the tables of open files."""

import logging
import os

from libc.errno cimport EMFILE
from libc.errno cimport errno as c_errno
from libc.string cimport strcmp, strlen
from posix.fcntl cimport O_NONBLOCK

from unionfs.core.files cimport UnreadFile
from unionfs.core.lookup cimport Names
from unionfs.core.layercalls cimport flistxattr, fstat
from unionfs.core.marks cimport close
from unionfs.core.node cimport has_entry, has_lower_data
from unionfs.core.places cimport before_reserve, open_quietly
from unionfs.core.state cimport MAPS, WRITES
from unionfs.core.stats cimport O_CLOEXEC, O_NOFOLLOW, O_RDONLY, S_IFMT, S_IFREG, failure

log = logging.getLogger(__name__)

cdef extern from "Python.h":
    Py_ssize_t PY_SSIZE_T_MAX

cdef extern from "<fcntl.h>" nogil:
    int O_NOCTTY
    int O_RDWR
    int F_DUPFD_CLOEXEC
    int fcntl(int fd, int command, ...)

cdef enum:
    NAMES_SIZE = 4096

cdef const char *CAPABILITY = b"security.capability"


cdef class Handles:
    """The open files of one mount, by number (file handle).

    Those of the upper hold an fd each, and removed ones another. Names and copy-ups need some, too: so open files get
    three quarters of what the process may have, and beyond the half a user only what the others do not have.
    """

    # bytes_read: from them for answers, excluding the page cache and passthrough.
    # fds, fds_of_users: how many fds they hold, together and by the uid of who opened them.

    def __init__(self, NodeTable nodes not None, Py_ssize_t limit=0, *, bint counts_all=False):
        """``limit``: the number of fds that this process may have; 0: any. ``counts_all``: whether fds count that are
        no open file's, such as those of removed files."""
        self.nodes, self.by_number, self.fds_of_users = nodes, {}, {}
        self.shared, self.most, self.counts_all = limit // 2, limit * 3 // 4, counts_all
        self.before_reserve = before_reserve(limit)

    def __len__(self):
        return len(self.by_number)

    def all(self):
        """All open files."""
        return list(self.by_number.values())

    def was_read(self, uint64_t count):
        """Count bytes read for an answer."""
        self.bytes_read += count

    def get(self, uint64_t number):
        """The open file with that number, or None."""
        return self.found(number)

    cdef Handle found(self, uint64_t number):
        cdef Handle handle = self.by_number.get(number)
        if self.nodes.former is not None and (handle is None or handle.late):
            if handle is None:
                known = self.nodes.former.numbers.get(number)
                if known is None:
                    return None
                self.nodes.known(known)
                handle = self.by_number.get(number)
            if handle is not None and handle.late:
                self.nodes.former.restoring.opens_again(handle)
        return handle

    @property
    def next(self):
        """The number of the next one."""
        return self.last + 1

    def register(self, Node node not None, OpenFile file not None, who, *, bint writes, bint maps=False):
        """Record an open of a node; returns its number. ``who``: the process that opened it, if known.
        ``maps``: see `Handle`."""
        return self.add(node, file, who, 0 if who is None else who.uid, writes, maps, getattr(who, "unique", 0))

    cpdef int may_hold(self, uint32_t uid) except -1:
        """Raise EMFILE if a user must not open one more file that holds an fd."""
        cdef Py_ssize_t used = self.fds, of_user, users
        if self.counts_all and self.latest >= self.shared:
            used = max(used, lowest_free())
            self.latest = used
        if not self.most or used < self.shared:
            return 0
        of_user = self.fds_of_users.get(uid, 0)
        # a user without any counts, too
        users = len(self.fds_of_users) + (not of_user)
        if self.fds >= self.most or of_user * users >= max(self.fds, self.shared // 2):
            raise failure(EMFILE)
        if used >= self.before_reserve:  # the others may be of removed files, which are no user's
            raise failure(EMFILE)
        return 0

    cdef uint64_t add(self, Node node, OpenFile file, who, uint32_t uid, bint writes, bint maps, uint64_t unique=0):
        cdef Handle handle = Handle.__new__(Handle)
        handle.file, handle.who, handle.node, handle.writes, handle.maps = file, who, node, writes, maps
        node.in_use().handles.append(handle)
        self.last += 1
        if self.nodes.state is not None:
            handle.record = self.nodes.state.add_handle(
                self.last, node.id, unique, (WRITES if writes else 0) | (MAPS if maps else 0)
            )
        self.take_in(handle, self.last, uid)
        return self.last

    cdef int take_in(self, Handle handle, uint64_t number, uint32_t uid) except -1:
        self.by_number[number] = handle
        self.latest = max(self.latest, handle.file.number)
        handle.table, handle.uid = self, uid
        return self.hold(handle)

    cdef int hold(self, Handle handle) except -1:
        """Charge the fd of its file to an open file, unless another one is charged with it, or it is a lower's, which
        is closed when there are many."""
        if handle.file.counted or isinstance(handle.file, UnreadFile):
            return 0
        handle.holds = handle.file.counted = True
        self.fds += 1
        self.nodes.gate.open_files = self.fds
        self.fds_of_users[handle.uid] = self.fds_of_users.get(handle.uid, 0) + 1
        return 0

    cdef int let_go(self, Handle handle) except -1:
        """Charge it no longer."""
        if not handle.holds:
            return 0
        handle.holds = handle.file.counted = False
        self.fds -= 1
        self.nodes.gate.open_files = self.fds
        self.fds_of_users[handle.uid] -= 1
        if not self.fds_of_users[handle.uid]:
            del self.fds_of_users[handle.uid]
        return 0

    def went_on(self, Node node not None):
        """All open files of a node have the same file now."""
        cdef Handle handle
        for handle in node.use.handles:
            self.let_go(handle)
        self.hold(node.use.handles[0])

    def release(self, uint64_t number):
        """Close an open file. Raises KeyError."""
        self.found(number)
        handle = self.remove(number)
        if handle is None:
            raise KeyError(number)
        return handle

    cdef Handle remove(self, uint64_t number):
        cdef Handle handle = self.by_number.pop(number, None), other
        cdef Node node
        if handle is not None:
            node = handle.node
            if handle.record != NULL:
                self.nodes.state.drop_handle(handle.record)
                handle.record = NULL
            node.use.handles.remove(handle)
            if handle.holds:
                self.let_go(handle)
                for other in node.use.handles:
                    if other.file is handle.file:
                        self.hold(other)
                        break
            try:
                take_back(node, handle.file)
            finally:  # even if close(2) reports an error
                self.nodes.subtract(node, 0)
        return handle


cpdef int may_copy_up(Node node, uint32_t uid) except -1:
    """Raise EMFILE if a user must not copy up a file because it is open: its open files need no fd as long as it is a
    lower's, and would hold one. It is charged to who opened it, but refused to who changes it: else a user could
    keep others from changing what that user reads."""
    cdef Use use = node.use
    cdef Handle handle
    if use is None or not use.handles:
        return 0
    handle = use.handles[0]
    if handle.table is not None and not handle.file.counted:
        (<Handles>handle.table).may_hold(uid)
    return 0


cdef Py_ssize_t lowest_free() noexcept:
    """The lowest number that no fd has: there are at least as many."""
    cdef int fd = fcntl(0, F_DUPFD_CLOEXEC, 0)
    if fd < 0:
        return PY_SSIZE_T_MAX if c_errno == EMFILE else 0
    close(fd)
    return fd


cpdef take_back(Node node, OpenFile file):
    """End one loan of a node's backing file; the last one closes it. Raises ``OSError``."""
    cdef Use use = node.use
    if file.users == 1 and use is not None and use.file is file:
        use.file = None
    file.release()


cdef class KeptFiles:
    """Backing files that stay open for requests without a file handle; the least recently used are closed."""

    # by_node: the least recently used first.

    def __init__(self, Py_ssize_t most=512):
        self.by_node, self.most = {}, most

    def __len__(self):
        return len(self.by_node)

    cpdef OpenFile find(self, Node node, bint write):
        """The file of a node, if one with that access is open; another one is closed."""
        cdef OpenFile file = self.by_node.get(node)
        if file is None:
            return None
        if node.use is None or file is not node.use.file or not (file.writable if write else file.readable):
            self.drop(node)  # it was copied up, or needs another access mode
            return None
        if node is not self.newest:
            del self.by_node[node]
            self.by_node[node] = file
            self.newest = node
        return file

    cpdef keep(self, Node node, OpenFile file):
        """Keep a file that was lent."""
        self.by_node[node] = file
        self.newest = node
        node.in_use().kept = True
        if len(self.by_node) > self.most:
            self.drop(next(iter(self.by_node)))

    def clear(self):
        """Take all back."""
        for node in list(self.by_node):
            self.drop(node)

    cpdef drop(self, Node node):
        """Take back the file of a node, if there is one."""
        cdef OpenFile file = self.by_node.pop(node, None)
        if file is None:
            return
        if node is self.newest:
            self.newest = None
        node.in_use().kept = False
        try:
            take_back(node, file)
        except Exception:  # no request waits for an error of close(2), as NFS reports
            log.exception("a file could not be closed")


cdef bint is_plain(Node node) noexcept:
    """Whether a node is a regular file of a lower under its own name, and with its own attributes."""
    return (
        node.kind == S_IFREG and node.place is not None and not node.place.layer.in_place
        and not has_lower_data(node) and node.held < 0 and not has_entry(node)
        and node.place.layer.permissions is None and isinstance(node.territory, Names)
    )


cdef bint is_plain_in_upper(Node node) noexcept:
    """Whether a node is a regular file of the upper under its own name, and with its own attributes. Its data may
    still lie elsewhere."""
    return (
        node.kind == S_IFREG and node.place is not None and node.place.layer.is_upper
        and not has_lower_data(node) and node.held < 0 and not has_entry(node)
        and node.place.layer.permissions is None
    )


cdef class Opener:
    """Opens files in the plain case; see `is_plain` and `is_plain_in_upper`."""

    def __init__(
        self, Gate gate not None, bytes metacopy not None, open, RestingFiles resting not None, *, bint remembers,
        bint unread
    ):
        """``metacopy``: the name of that xattr. ``open`` opens any node's file, an `OpenFile`. ``resting``: those
        of lowers, whose number of fds is limited. ``remembers`` which files have no capabilities; ``unread``: see
        `UnreadFile`."""
        self.gate, self.metacopy, self.open, self.resting = gate, metacopy, open, resting
        self.remembers, self.unread = remembers, unread

    cdef OpenFile lend(self, Node node, Use use):
        """The backing file of a plain node; None if it is not plain, or cannot be opened."""
        if use.file is not None and use.file.users and use.file.readable:
            use.file.users += 1
            return use.file
        file = self.open_plain(node)
        if file is not None:
            use.file = file
        return file

    cpdef OpenFile lend_unread(self, Node node, Use use):
        """The same for a file whose data the kernel may have cached completely."""
        cdef UnreadFile file
        if not self.unread or (use.file is not None and use.file.users and use.file.readable):
            return self.lend(node, use)
        file = UnreadFile.__new__(UnreadFile)
        file.number, file.readable, file.users = -1, True, 1
        file.waits = not node.place.layer.memory
        file.open, file.node = self.open, node
        use.file = file
        return file

    cpdef OpenFile open_plain(self, Node node):
        """Open the file of a plain node, and look at its xattrs; None if it is not plain, has its data
        elsewhere, or cannot be opened."""
        return self.opened(node, False) if is_plain(node) else None

    cdef OpenFile lend_in_upper(self, Node node, Use use, bint writes):
        """The backing file of a plain node of the upper; as :meth:`lend`."""
        cdef OpenFile file = use.file
        if file is not None and file.users and file.readable and (file.writable or not writes):
            file.users += 1
            return file
        file = self.opened(node, writes)
        if file is not None:
            use.file = file
        return file

    cdef OpenFile opened(self, Node node, bint writes):
        cdef OpenFile file
        cdef UnreadFile lower = None
        cdef int flags = (O_RDWR if writes else O_RDONLY) | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | O_NOCTTY
        cdef int dir_fd, fd
        cdef bint found
        dir_fd = self.gate.fd(node.place)
        fd = open_quietly(node.place.layer, dir_fd, node.name, flags)
        if fd < 0:
            return None
        if node.place.layer.in_place:
            file = OpenFile.__new__(OpenFile)
        else:
            file = lower = UnreadFile.__new__(UnreadFile)
            lower.open, lower.node = self.open, node
        file.number, file.users, file.readable, file.writable, file.has_stat = fd, 1, True, writes, True
        file.waits = not node.place.layer.memory
        try:
            found = self.is_still(node, file) and self.look_at_xattrs(node, file)
        except BaseException:
            close(fd)
            file.number = -1
            raise
        if not found:
            close(fd)
            file.number = -1
            return None
        if lower is not None:
            self.resting.opened(lower)
        return file

    cdef bint is_still(self, Node node, OpenFile file) except -1:
        """Whether what was opened is the node's regular file."""
        return (
            fstat(file.number, &file.stat) == 0 and file.stat.st_mode & S_IFMT == S_IFREG
            and (not node.key or node.place.layer.key_of(&file.stat) == node.key)
        )

    cdef bint look_at_xattrs(self, Node node, OpenFile file) except -1:
        """Record the names of all xattrs; returns False if there are too many, or the data is elsewhere."""
        cdef char names[NAMES_SIZE]
        cdef char *name = names
        cdef ssize_t size = flistxattr(file.number, names, NAMES_SIZE)
        cdef bint capable = False
        if size < 0 or (size and names[size - 1]):
            return False
        found = []
        while name < names + size:
            if strcmp(name, self.metacopy) == 0:
                return False
            capable = capable or strcmp(name, CAPABILITY) == 0
            found.append(os.fsdecode(<bytes>name))
            name += strlen(name) + 1
        file.xattrs = found
        node.no_capability = self.remembers and not capable
        return True
