"""Copy-up of small regular files, each by one bundle of system calls; see `steps`.

The plain case: a file with data of its own and one name, without xattrs and flags, whose copy gets owner, mode
and times and is not synced. The others, and whatever fails before the copy appears, are `union.filecopy`'s.
"""

from libc.errno cimport EDQUOT, EINVAL, EIO, ENOSPC, ENOSYS, ENOTTY, EOPNOTSUPP, EPERM, EXDEV, EACCES
from libc.errno cimport errno as c_errno
from libc.stdlib cimport free, malloc
from posix.time cimport timespec
from posix.unistd cimport pwrite, unlink

from unionfs.core.clock cimport now_ns
from unionfs.core.files cimport Handle, OpenFile, Use, new_file
from unionfs.core.layercalls cimport flistxattr, fstat, get_flags, pread
from unionfs.core.marks cimport close
from unionfs.core.memo cimport may_ask
from unionfs.core.node cimport Rare, has_changed, has_entry, has_links, has_lower_data
from unionfs.core.places cimport Layer, Place, open_quietly
from unionfs.core.setting cimport MODE, SIZE
from unionfs.core.stats cimport (
    O_CLOEXEC, O_NOFOLLOW, O_RDONLY, S_IFMT, S_IFREG, ctime_of, failure, openat,
)
from unionfs.core.steps cimport passed

from unionfs.core.steps import NotPlain

cdef extern from "<fcntl.h>" nogil:
    int O_NOCTTY
    int O_NONBLOCK
    int O_RDWR
    int O_CREAT
    int O_EXCL
    int AT_EMPTY_PATH
    int unlinkat(int fd, const char *path, int flags)

cdef extern from "<stdio.h>" nogil:
    int renameat(int old_fd, const char *old, int new_fd, const char *new)

cdef extern from "<sys/stat.h>" nogil:
    long UTIME_NOW, UTIME_OMIT
    int futimens(int fd, const timespec *times)
    int utimensat(int fd, const char *path, const timespec *times, int flags)

cdef extern from "<sys/xattr.h>" nogil:
    int fsetxattr(int fd, const char *name, const void *value, size_t size, int flags)

cdef extern from "<unistd.h>" nogil:
    int fchown(int fd, unsigned int uid, unsigned int gid)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<linux/fs.h>" nogil:
    unsigned long FICLONE
    unsigned int FS_SYNC_FL, FS_IMMUTABLE_FL, FS_APPEND_FL, FS_NOATIME_FL

cdef enum:
    C_UNSEEN = -1  # as in `node`
    PIECE = 64 * 1024
    PERMISSIONS = 0o7777
    OWNER_WRITES = 0o200


cpdef OpenFile hand_over(Node node, int fd, st, bint lend):
    """Switch a copied-up node to ``fd`` (O_RDWR), its file in the upper, with the attributes ``st``, if known.

    All opens of the node continue with it, and see later writes. ``lend``: lend it to the caller too. Returns
    None if it has no users; then the caller keeps ``fd``.
    """
    cdef Use use = node.in_use() if lend else node.use
    cdef Handle handle
    cdef OpenFile file
    if use is None:
        return None
    if not lend and not use.handles:
        use.file = None
        return None
    file = new_file(fd, not node.place.layer.memory, st)
    use.file = file
    for handle in use.handles:
        handle.go_on(file.take())
    if use.handles and (<Handle>use.handles[0]).table is not None:
        (<Handle>use.handles[0]).table.went_on(node)
    if not lend:
        file.release()
    return file


cpdef Node enters(NodeTable nodes, Node directory):
    """Prepare a directory of the upper for a copy that enters it by one rename or link; then call
    :func:`entered`: a copy-up is not a change, so its mtime and the ctime shown for it stay.

    Returns the directory if its size may have changed for the kernel.
    """
    cdef Place place = directory.parts[0]
    cdef Node resized = None
    cdef stat_t st
    cdef int dir_fd = nodes.gate.fd(place)
    cdef Rare rare = directory.rare
    if rare is None or not rare.has_ctime or rare.ctime_given != C_UNSEEN:
        # the first copy-up since its attributes were requested, or since a change
        if fstat(dir_fd, &st) != 0:
            raise failure(c_errno)
        resized = directory
        place.mtime = st.st_mtim
        directory.show_ctime(directory.ctime_to_show(ctime_of(&st)))
    place.empty = False
    if not place.impure:
        nodes.origins.becomes_impure(place, dir_fd)
    return resized


cpdef void entered(NodeTable nodes, Node directory) except *:
    """Restore the directory after the rename. Ignores an error of utimensat(2)."""
    cdef Place place = directory.parts[0]
    keep_mtime(nodes.gate.fd(place), place.mtime)


cdef void keep_mtime(int dir_fd, timespec mtime) noexcept nogil:
    cdef timespec times[2]
    times[0].tv_sec, times[0].tv_nsec = 0, UTIME_OMIT
    times[1] = mtime
    utimensat(dir_fd, "", times, AT_EMPTY_PATH)


cdef class SmallCopyUps:
    """Copies up small files of one union."""

    # count, copied_bytes, nanoseconds: of these copy-ups.
    # told: called with a copied node, unless the answer contains its attributes, and its directory if its size
    #     may have changed for the kernel.
    # left: fds to be closed after the answer, -1: none.
    # directory: makes the directory of a node one of the upper.
    # clones_never: see `union.filedata`; no_clones: the last device known to be in it.

    def __cinit__(self):
        self.left[0] = self.left[1] = -1
        self.buffer = <char *>malloc(PIECE)
        if self.buffer is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.buffer)

    def __init__(
        self, union, Workplace work not None, *, told, directory, clones_never, limit, remembers,
    ):
        """``limit``: the size of a small file in bytes. ``remembers``: whether a node remembers that it has no
        capabilities."""
        identity, markers = union.identity, union.markers
        self.told, self.directory, self.clones_never = told, directory, clones_never
        self.gate, self.nodes, self.origins, self.work = union.gate, union.nodes, union.origins, work
        self.origin_name, self.needs_write = markers.origin, markers.requires_write
        self.origin_text = self.origin_name
        self.uid, self.gid, self.settable = identity.uid, identity.gid, identity.sets
        self.limit, self.remembers = limit, remembers

    def copy(self, Node node not None, Change change=None, int64_t limit=-1, *, bint keep=False):
        """Copy a file up and change its attributes. Returns these.

        None if the case is not plain; then nothing has changed. ``limit``: copy only that many bytes.
        ``keep``: the node's file is lent to the caller. Raises ``OSError`` if the change fails; the copy stays.
        """
        try:
            return self.make(node, change, limit, keep, False)
        finally:
            self.close_left()

    cdef Attributes answer(self, Node node, Change change):
        """The same, for an answer with the attributes of that node, after which :meth:`close_left` is called. A
        directory that must be copied up before is not plain.

        If the change fails, it is to be made again, on the copy: a notice about that must precede the answer.
        """
        if change.valid & SIZE:
            return None
        try:
            return self.make(node, change, -1, False, True)
        except OSError:
            if node.is_changed_in_place():
                return None
            raise

    cdef void close_left(self) noexcept:
        """Close the files of the last copy-up."""
        cdef int index
        for index in range(2):
            if self.left[index] >= 0:
                close(self.left[index])
                self.left[index] = -1

    cdef Attributes make(self, Node node, Change change, int64_t limit, bint keep, bint answers):
        cdef Copy copy
        cdef int64_t began = now_ns()
        cdef bint plain
        cdef OpenFile lent = None
        if not self.may_copy(node) or (answers and not node.parent.is_changed_in_place()):
            return None
        self.close_left()
        copy.source = copy.target = -1
        copy.made = copy.has_origin = copy.appeared = False
        try:
            lent = self.lend(node, &copy)
            if copy.source < 0:
                return None
            copy.key, copy.mode = node.key, self.settable + 1
            if change is not None and change.valid == MODE:
                copy.mode = change.new_mode & PERMISSIONS
            with nogil:
                plain = self.prepare(&copy, node.place.layer, self.work, self.origins, limit)
            if not plain or not self.put(&copy, node, answers):
                return None
            self.count += 1
            self.copied_bytes += copy.size
            self.nanoseconds += now_ns() - began
            passed("appear")
            if change is not None:
                self.change(node, change, &copy)
            return node.shown(&copy.st)
        except NotPlain:
            return None
        except BaseException:
            if answers and copy.appeared:
                self.told(node, None)
            raise
        finally:
            if copy.appeared and hand_over(node, copy.target, None, keep) is not None:
                copy.target = -1
            self.clean(&copy, lent)

    cdef bint may_copy(self, Node node):
        if node.kind != S_IFREG or node.place is None or node.parent is None or node.unlinked:
            return False
        if node.held >= 0 or node.flags or node.from_origin or has_links(node):
            return False
        if has_entry(node) or has_lower_data(node) or node.territory.read_only:
            return False
        return not node.place.layer.in_place and node.place.layer.permissions is None

    cdef OpenFile lend(self, Node node, Copy *copy):
        """Open the source; not if that fails. Returns the file that it is already open as, if any."""
        cdef OpenFile file = None if node.use is None else node.use.file
        cdef int flags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | O_NOCTTY
        cdef int dir_fd
        if file is not None and file.users > 0 and file.readable and file.number >= 0:
            copy.source = file.number
            return file.take()
        dir_fd = self.gate.fd(node.place)
        copy.source = open_quietly(node.place.layer, dir_fd, node.name, flags)
        return None

    cdef bint prepare(
        self, Copy *copy, Layer layer, Workplace work, OriginFormat origins, int64_t limit
    ) except -1 nogil:
        """Make the copy in work. Returns whether it is made."""
        cdef stat_t *st = &copy.st
        cdef timespec times[2]
        cdef int flags = 0
        passed("open")
        if fstat(copy.source, st) != 0 or st.st_mode & S_IFMT != S_IFREG or st.st_nlink != 1:
            return False
        copy.size = st.st_size if limit < 0 else min(limit, <int64_t>st.st_size)
        if copy.size > self.limit or st.st_blocks * 512 < st.st_size:
            return False
        if copy.key and layer.key_of(st) != copy.key:
            return False
        if copy.mode & ~self.settable:
            copy.mode = st.st_mode & PERMISSIONS
        if copy.mode & ~self.settable or (self.needs_write and not copy.mode & OWNER_WRITES):
            return False
        if flistxattr(copy.source, NULL, 0) != 0:
            return False
        if get_flags(copy.source, &flags) != 0:
            if c_errno not in (ENOTTY, EINVAL, EOPNOTSUPP, ENOSYS, EPERM, EACCES):  # as union.flags
                return False
        elif <unsigned int>flags & (FS_SYNC_FL | FS_IMMUTABLE_FL | FS_APPEND_FL | FS_NOATIME_FL):
            return False

        if may_ask(copy.source) and not self.fetch(copy):
            return False
        work.next(copy.name)
        copy.target = openat(work.fd, copy.name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, copy.mode)
        if copy.target < 0:
            return False
        copy.made = True
        passed("create")
        if copy.size and not self.copy_data(copy, st.st_size):
            return False
        passed("data")
        copy.origin_size = origins.encode(copy.source, "", st.st_dev, 0, copy.origin)
        if copy.origin_size >= 0:
            copy.has_origin = fsetxattr(
                copy.target, self.origin_text, copy.origin, copy.origin_size, 0
            ) == 0
        passed("origin")
        if st.st_uid != self.uid or st.st_gid != self.gid:
            if fchown(copy.target, st.st_uid, st.st_gid) != 0:
                return False
            passed("owner")
        times[0], times[1] = st.st_atim, st.st_mtim
        if copy.size < st.st_size:  # truncated: a change, which must not show without its time
            times[1].tv_nsec = UTIME_NOW
        if futimens(copy.target, times) != 0:
            return False
        passed("times")
        return True

    cdef bint copy_data(self, Copy *copy, int64_t whole) except -1 nogil:
        """Share or copy the first `size` bytes, of the ``whole`` file if it has no more. Returns whether they
        are there."""
        cdef int64_t done = 0
        cdef ssize_t count
        if copy.size == whole and self.may_clone(copy.st.st_dev):
            if ioctl(copy.target, FICLONE, copy.source) == 0:
                return True
            if c_errno in (ENOSPC, EDQUOT, EIO):
                return False
            if c_errno in (EOPNOTSUPP, EXDEV, ENOTTY):
                self.never_clones(copy.st.st_dev)
        while done < copy.size:
            count = pread(copy.source, self.buffer, min(copy.size - done, <int64_t>PIECE), done)
            if count <= 0 or pwrite(copy.target, self.buffer, count, done) != count:
                return False
            done += count
        return True

    cdef bint fetch(self, Copy *copy) except -1 nogil:
        """Read the data from a slow layer before anything is made: see `memo`. Returns whether it is there."""
        cdef int64_t done = 0
        cdef ssize_t count
        while done < copy.size:
            count = pread(copy.source, self.buffer, min(copy.size - done, <int64_t>PIECE), done)
            if count <= 0:
                return False
            done += count
        return True

    cdef bint may_clone(self, uint64_t device) except -1 nogil:
        if device == self.no_clones:
            return False
        with gil:
            if device in self.clones_never:
                self.no_clones = device
        return device != self.no_clones

    cdef int never_clones(self, uint64_t device) except -1 with gil:
        self.clones_never.add(device)
        return 0

    cdef bint put(self, Copy *copy, Node node, bint answers) except -1:
        """Put the copy into the upper, where it appears. Returns whether it did."""
        cdef Node directory = node.parent, resized
        cdef Place place
        cdef const char *name = node.name
        cdef int dir_fd, code, work = self.work.fd
        cdef timespec mtime
        if not directory.is_changed_in_place():
            self.directory(directory)
        place = directory.parts[0]
        resized = enters(self.nodes, directory)
        dir_fd, mtime = self.gate.fd(place), place.mtime
        passed("enter")
        with nogil:
            code = renameat(work, copy.name, dir_fd, name)
            if code == 0:
                keep_mtime(dir_fd, mtime)
        if code != 0:
            return False
        copy.made = False
        if fstat(copy.target, &copy.st) != 0:
            code = c_errno
            unlinkat(dir_fd, name, 0)
            raise failure(code)
        copy.appeared = True
        node.place, node.flags = place, 0
        node.no_capability = self.remembers and node.territory.lasting
        self.nodes.is_copy(node, &copy.st, copy.has_origin and place.impure and self.names(copy, node))
        if resized is not None or not answers:
            self.told(None if answers else node, resized)
        return True

    cdef bint names(self, Copy *copy, Node node) except -1:
        """Whether the stored origin has the number of the node."""
        cdef uint64_t device, inode
        if not self.origins.decode(copy.origin, copy.origin_size, &device, &inode):
            return False
        return self.origins.number(device, inode) == node.ino

    cdef int change(self, Node node, Change change, Copy *copy) except -1:
        """Change the attributes of the copy, unless it was made with them."""
        cdef bint failed
        has_changed(node)
        if change.valid != MODE or copy.mode != change.new_mode & PERMISSIONS:
            with nogil:
                failed = change.apply(copy.target, False) != 0 or fstat(copy.target, &copy.st) != 0
            if failed:
                raise failure(c_errno)
            passed("set")
        return 0

    cdef int clean(self, Copy *copy, OpenFile lent) except -1:
        """Remove a copy that has not appeared, and leave what is open to be closed."""
        if copy.made and unlinkat(self.work.fd, copy.name, 0) != 0:
            self.work.discard(<bytes>copy.name)
        self.left[0] = copy.target
        if lent is not None:
            lent.leave()
        else:
            self.left[1] = copy.source
        return 0
