"""SETATTR: the change of an object's attributes, made by a bundle of system calls on one fd."""

from libc.errno cimport ENOSYS, EPERM
from libc.errno cimport errno as c_errno
from libc.stdio cimport snprintf
from posix.time cimport timespec
from posix.unistd cimport close

from unionfs.core.files cimport OpenFile
from unionfs.core.node cimport Attributes, Node, has_changed, has_entry, has_lower_data
from unionfs.core.objects cimport path_fd
from unionfs.core.places cimport Gate
from unionfs.core.stats cimport fstat, nanoseconds_of, stat_t, time_of
from unionfs.core.steps cimport passed

cdef extern from "<fcntl.h>" nogil:
    int AT_EMPTY_PATH

cdef extern from "<sys/stat.h>" nogil:
    long UTIME_OMIT
    int chmod(const char *path, unsigned int mode)
    int fchmod(int fd, unsigned int mode)
    int futimens(int fd, const timespec *times)
    int utimensat(int fd, const char *path, const timespec *times, int flags)

cdef extern from "<unistd.h>" nogil:
    int fchown(int fd, unsigned int uid, unsigned int gid)
    int fchownat(int fd, const char *path, unsigned int uid, unsigned int gid, int flags)
    int ftruncate(int fd, int64_t size)

cdef extern from *:
    """
    #include <sys/syscall.h>
    #include <unistd.h>
    /* since Linux 6.6; include/uapi/asm-generic/unistd.h, and the same on x86-64 */
    #define UNIONFS_FCHMODAT2 452
    static int unionfs_fchmodat2(int fd, const char *path, unsigned int mode, int flags) {
        return (int)syscall(UNIONFS_FCHMODAT2, fd, path, mode, flags);
    }
    """
    int fchmodat2 "unionfs_fchmodat2"(int fd, const char *path, unsigned int mode, int flags) nogil

cdef enum:
    PERMISSIONS = 0o7777
    # /proc/self/fd/, a number, a null byte
    PATH_SIZE = 32


cdef class Change:
    """The changes of a SETATTR; None: unchanged. Times in nanoseconds since 1970.

    ``killer``: the process, if its change clears set-id bits.
    """

    def __init__(
        self, *, size=None, uid=None, gid=None, mode=None, atime_ns=None, mtime_ns=None, killer=None
    ):
        if size is not None:
            self.valid, self.new_size = self.valid | SIZE, size
        if uid is not None:
            self.valid, self.new_uid = self.valid | UID, uid
        if gid is not None:
            self.valid, self.new_gid = self.valid | GID, gid
        if mode is not None:
            self.valid, self.new_mode = self.valid | MODE, mode
        if atime_ns is not None:
            self.valid, self.new_atime = self.valid | ATIME, time_of(atime_ns)
        if mtime_ns is not None:
            self.valid, self.new_mtime = self.valid | MTIME, time_of(mtime_ns)
        self.killer = killer

    @property
    def size(self):
        return self.new_size if self.valid & SIZE else None

    @property
    def uid(self):
        return self.new_uid if self.valid & UID else None

    @property
    def gid(self):
        return self.new_gid if self.valid & GID else None

    @property
    def mode(self):
        return self.new_mode if self.valid & MODE else None

    @property
    def atime_ns(self):
        return nanoseconds_of(self.new_atime) if self.valid & ATIME else None

    @property
    def mtime_ns(self):
        return nanoseconds_of(self.new_mtime) if self.valid & MTIME else None

    @property
    def owner(self):
        """The arguments of chown(2), where -1 leaves an id as it is; None if both stay."""
        if not self.valid & (UID | GID):
            return None
        return id_of(self.new_uid, self.valid & UID), id_of(self.new_gid, self.valid & GID)

    @property
    def only_mode(self):
        """The mode, if nothing else changes."""
        return self.new_mode if self.valid == MODE and self.killer is None else None

    def has_owner(self, int64_t uid, int64_t gid):
        """Set the ids to store, of those that change; -1 after all leaves one as it is."""
        self.new_uid, self.new_gid = <uint32_t>uid, <uint32_t>gid

    cdef int apply(self, int fd, bint path) noexcept nogil:
        """Change size, owner, mode and times, in this order, of an open file; ``path``: an fd of O_PATH, and the
        size stays.

        Returns -1 with errno.
        """
        cdef timespec times[2]
        cdef unsigned int uid, gid
        if self.valid & SIZE and ftruncate(fd, self.new_size) != 0:
            return -1
        if self.valid & (UID | GID):
            uid = self.new_uid if self.valid & UID else <unsigned int>-1
            gid = self.new_gid if self.valid & GID else <unsigned int>-1
            if (fchownat(fd, "", uid, gid, AT_EMPTY_PATH) if path else fchown(fd, uid, gid)) != 0:
                return -1
        if self.valid & MODE:
            if (chmod_path(fd, self.new_mode) if path else fchmod(fd, self.new_mode & PERMISSIONS)) != 0:
                return -1
        if self.valid & (ATIME | MTIME):
            times[0].tv_sec = times[1].tv_sec = 0
            times[0].tv_nsec = times[1].tv_nsec = UTIME_OMIT
            if self.valid & ATIME:
                times[0] = self.new_atime
            if self.valid & MTIME:
                times[1] = self.new_mtime
            if (utimensat(fd, "", times, AT_EMPTY_PATH) if path else futimens(fd, times)) != 0:
                return -1
        return 0


cdef int64_t id_of(uint32_t number, bint changes) noexcept nogil:
    return number if changes and number != <uint32_t>-1 else -1


cdef int chmod_path(int fd, unsigned int mode) noexcept nogil:
    """chmod(2) of the object of an fd of O_PATH."""
    cdef char path[PATH_SIZE]
    cdef int done = fchmodat2(fd, "", mode & PERMISSIONS, AT_EMPTY_PATH)
    # EPERM: as a filter of system calls says of one that it does not know
    if done == 0 or (c_errno != ENOSYS and c_errno != EPERM):
        return done
    snprintf(path, PATH_SIZE, "/proc/self/fd/%d", fd)
    return chmod(path, mode & PERMISSIONS)


cpdef Attributes set_attributes(Gate gate, Node node, Change change):
    """Change the attributes of an object that is changed in place, the size only of a file that is open for
    writing. Returns its attributes.

    None if the case is not plain, and nothing has changed; or if a call has failed, and the change must be made again,
    in steps after whose errors the kernel learns what has changed. Raises ``OSError``.
    """
    cdef OpenFile file = None
    cdef stat_t st
    cdef int fd = -1
    cdef bint path = False, mine = False, failed
    if change.killer is not None or not may_set(node, change):
        return None
    if node.use is not None and not has_lower_data(node):
        file = node.use.file
    if file is not None and file.users > 0 and file.number >= 0:
        fd = file.number
    if change.valid & SIZE:
        if fd < 0 or not file.writable:
            return None
        node.use.resized = True
    if fd < 0:
        fd, path = path_fd(gate, node, &mine), True
        if fd < 0:
            return None
    try:
        has_changed(node)
        with nogil:
            failed = change.apply(fd, path) != 0 or fstat(fd, &st) != 0
        if failed:
            return None
        passed("set")
        return node.shown(&st)
    finally:
        if mine:
            close(fd)


cdef bint may_set(Node node, Change change):
    """Whether an object is changed as it is: without flags, entries in an index, and modes or owners of a
    layer's own."""
    if node.flags is None or node.flags or has_entry(node) or not node.is_changed_in_place():
        return False
    if node.territory.read_only or node.top_layer().permissions is not None:
        return False
    return node.territory.owners is None or not change.valid & (UID | GID)
