"""Real directories in layers, and the one gate from a directory to an fd.

A `Place` identifies a real directory: its layer, its parent place, its name. No other code builds paths:
`Gate.fd` walks down from the nearest open ancestor, one openat(2) per component, never through a symlink. So
trees deeper than PATH_MAX work, and renaming a directory changes one object for everything below it.
"""

import errno
import os

from libc.errno cimport EACCES, EMFILE, EPERM, ESTALE
from libc.errno cimport errno as c_errno
from unionfs.core.layercalls cimport fstat, openat
from unionfs.core.marks cimport close, mark_root
from unionfs.core.stats cimport (
    O_CLOEXEC, O_DIRECTORY, O_NOFOLLOW, O_PATH, O_RDONLY, failure, read_result, stat_t,
)

from unionfs.core.layercalls import call
from unionfs.core.marks import lacks_xattrs

cdef extern from "<fcntl.h>" nogil:
    int O_NOATIME

cdef extern from "<sys/vfs.h>" nogil:
    cdef struct statfs_t "statfs":
        long f_type
    int fstatfs(int fd, statfs_t *buffer)

NOT_THERE = (errno.ENOENT, errno.ENAMETOOLONG)
#: A `Layer.key` that matches no object.
NO_KEY = -1

# include/uapi/linux/magic.h
cdef enum:
    TMPFS = 0x01021994
    RAMFS = 0x858458F6
    NFS = 0x6969
    FUSE = 0x65735546

#: ext2 to 4, xfs, btrfs, tmpfs, ramfs, f2fs, squashfs, erofs, NFS, bcachefs; and zfs. On others (FUSE, FAT,
#: overlayfs of several filesystems) a number may change after cache eviction.
cdef object KEEP_NUMBERS = frozenset({
    0xEF53, 0x58465342, 0x9123683E, TMPFS, <unsigned long>RAMFS, 0xF2F52010, 0x73717368, 0xE0F5E1E2, NFS,
    0xCA451A4E, 0x2FC12FC1,
})

cdef object MEMORY = frozenset({TMPFS, <unsigned long>RAMFS})

#: The filesystems that other hosts may change, or another kernel through the server: name, types in mount tables, magic
#: numbers. Sources: the kernel's include/uapi/linux/magic.h, fs/gfs2, fs/ocfs2, fs/vboxsf, fs/orangefs; for Lustre, GPFS,
#: BeeGFS, PanFS, StorNext, VxFS and VMware coreutils, src/stat.c. FUSE is also sshfs, rclone and glusterfs.
cdef object _SHARED = (
    ("NFS", ("nfs", "nfs4"), (NFS,)),
    ("FUSE", ("fuse", "virtiofs"), (FUSE,)),
    ("SMB", ("cifs", "smb3", "smbfs"), (0x517B, 0xFE534D42, 0xFF534D42)),
    ("Ceph", ("ceph",), (0x00C36400,)),
    ("AFS", ("afs",), (0x6B414653, 0x5346414F)),
    ("Lustre", ("lustre",), (0x0BD00BD0,)),
    ("9p", ("9p",), (0x01021997,)),
    ("Coda", ("coda",), (0x73757245,)),
    ("GFS2", ("gfs2",), (0x01161970,)),
    ("OCFS2", ("ocfs2",), (0x7461636F,)),
    ("a VirtualBox share", ("vboxsf",), (0x786F4256,)),
    ("GPFS", ("gpfs",), (0x47504653,)),
    ("BeeGFS", ("beegfs",), (0x19830326,)),
    ("PanFS", ("panfs",), (0xAAD7AAEA,)),
    ("StorNext", ("cvfs",), (0xBEEFDEAD,)),
    ("VxFS", ("vxfs",), (0xA501FCF5,)),
    ("a VMware share", ("vmhgfs",), (0xBACBACBC,)),
    ("OrangeFS", ("pvfs2",), (0x20030528,)),
)
#: Their names by their magic numbers.
SHARED = {magic: name for name, _, magics in _SHARED for magic in magics}
#: Their types in mount tables, but for subtypes of FUSE (proc_pid_mountinfo(5)).
SHARED_TYPES = tuple(fstype for _, types, _ in _SHARED for fstype in types)

#: Those of them whose calls wait for a server and which answer statx(2) with AT_STATX_DONT_SYNC without it, which `marks`
#: needs: so not 9p, Coda and OpenAFS, cluster filesystems on shared disks, and others whose sources are not in the
#: kernel, but for Lustre (its llite/file.c).
cdef object REMOTE = frozenset({
    NFS, 0x517B, 0xFF534D42, 0xFE534D42, 0x00C36400, 0x6B414653, FUSE, 0x0BD00BD0,
})

cdef enum:
    # More lookups than any directory without whiteouts by name has.
    MANY = 1 << 30
    # Of the way to a directory, at most the last of so many parts of the open directories stays open.
    PART_OF_WAY = 8


cdef int64_t mixed(uint64_t number, uint64_t owner, uint64_t rest) noexcept nogil:
    """A hash of an object's identity, never 0 or -1; the mixing of splitmix64."""
    cdef uint64_t value = number * 0x9E3779B97F4A7C15u + owner
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u + rest
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBu
    value = (value ^ (value >> 31)) >> 1
    return <int64_t>value | 2


cdef class Layer:
    """One directory tree of the stack; ``root`` is its place, whose fd stays open."""

    def __init__(self, index, str path, int root_fd, *, bint is_upper, bint quiet=False, dict known=None):
        """``quiet``: reading must not change access times. ``known``: see :meth:`once`."""
        self.index = index
        self.path = path
        self.is_upper = is_upper
        #: Whether its objects are changed in place, without a copy-up.
        self.in_place = is_upper
        self.root = new_place(self, None, b"", 0)
        self.root.fd = root_fd
        #: What was asked of the root; see `once`.
        self.known = {} if known is None else known
        # The last: whether reading does not change access times, as in a lower's read-only clone.
        self.dev, uid, magic, self.acl, self.atime_stays = self.once("root", look_at_root)
        #: The type of its filesystem.
        self.magic = magic
        #: Whether to open files with O_NOATIME, which fails for files of other users.
        self.quiet = quiet and not self.atime_stays and uid == os.geteuid()
        #: In memory: no need to sync, and reads never wait for a disk.
        self.memory = magic in MEMORY
        #: The link count of a removed file that is still open: on NFS it has another name (`.nfs` and a
        #: number, fs/nfs/unlink.c) until it is closed.
        self.links_of_removed = 1 if magic == NFS else 0
        #: Whether objects keep their inode numbers.
        self.keeps_numbers = magic in KEEP_NUMBERS
        #: Whether calls into it wait for a server, which may not answer.
        self.remote = magic in REMOTE
        #: Its number as a slow layer; 0: calls into it are made at once. See `memo`.
        self.slow = 0
        #: Whether its mount maps ids (known only to a union that does so, too).
        self.is_idmapped = False
        #: How its objects have owner, mode and type in an xattr; None: as they are.
        self.permissions = None

    def has_mapped_ids(self):
        """Record that its mount maps ids."""
        self.is_idmapped = True

    def once(self, str what not None, look):
        """What ``look`` returns for the fd of the root, JSON-able: a daemon that takes over knows it from the former
        one, and need not ask a server that does not answer."""
        if what not in self.known:
            self.known[what] = look(self.root.fd)
        return self.known[what]

    def is_slow(self):
        """Record that requests put calls into it aside; see `memo`."""
        self.slow = self.index + 1
        mark_root(self.root.fd, self.slow, self.once("bare", lacks_xattrs))

    def becomes_lower(self):
        """Record that another upper lies on top of it: from now on its objects are copied up, and stay the same ones
        whatever their owner and mode, as before."""
        self.is_upper = self.in_place = False
        self.was_upper = True
        self.quiet = not self.atime_stays and os.stat(self.root.fd).st_uid == os.geteuid()

    def becomes_upper_again(self, *, bint quiet):
        """Undo :meth:`becomes_lower`; ``quiet`` as before."""
        self.is_upper = self.in_place = True
        self.was_upper = False
        self.quiet = quiet

    def is_moved_to(self, str path):
        """Record its path."""
        self.path = path

    def keeps_permissions(self, permissions):
        """Record that its objects have owner, mode and type in an xattr."""
        self.permissions = permissions

    @property
    def root_fd(self):
        return self.root.fd

    def key(self, st):
        """Identifies the object with these attributes against a replacement under its name; 0: not possible.

        The kernel checks permissions with the attributes it received. A user who may rename in a layer can
        replace one of their own objects with another user's, so an object found again by its name must be the
        same one; in a lower, whose attributes do not change, with the same owner and mode.
        """
        cdef stat_t given
        read_result(st, &given)
        return self.key_of(&given)

    cdef int64_t key_of(self, const stat_t *st) noexcept nogil:
        cdef uint64_t number = st.st_ino if self.keeps_numbers else 0
        if self.is_bound:
            return 0
        if self.is_upper or self.was_upper or self.permissions is not None:  # then the attributes shown are others
            return mixed(number, 0, 0) if number else 0
        return mixed(number, (<uint64_t>st.st_uid << 32) | st.st_gid, st.st_mode)


cdef class BoundLayer(Layer):
    """Storage shown at one place of the union without merging. Other processes change it too."""

    def __init__(self, index, str path, int root_fd, *, bint read_only):
        super().__init__(index, path, root_fd, is_upper=False)
        self.in_place = True
        self.is_bound = True
        self.read_only = read_only


def look_at_root(int fd):
    """Device, owner, type of the filesystem; whether that has ACLs; whether reading leaves access times alone."""
    st = os.stat(fd)
    stays = bool(os.fstatvfs(fd).f_flag & (os.ST_RDONLY | os.ST_NOATIME))
    return st.st_dev, st.st_uid, filesystem_magic(fd), has_acls(fd), stays


cdef bint has_acls(int fd):
    """Whether the filesystem has POSIX ACLs: then ENODATA reports a missing one."""
    try:
        os.getxattr(b"/proc/self/fd/%d" % fd, b"system.posix_acl_access")
    except OSError as error:
        return error.errno == errno.ENODATA
    return True


cdef unsigned long filesystem_magic(int fd) except? 0:
    cdef statfs_t found
    if fstatfs(fd, &found) != 0:
        raise failure(c_errno)
    return <unsigned long>found.f_type & 0xFFFFFFFF


cdef int require_some(list places) except -1:
    """Check the real directories that a caller in Python has for an object: compiled code uses the first one
    without a look at their number. Raises ValueError."""
    if not len(places):
        raise ValueError("an object is in one real directory at least")
    return 0


cdef int open_quietly(Layer layer, int dir_fd, const char *name, int flags) except? -2:
    """openat(2), without a change of the access time in a layer where that must not be, unless the object is
    another user's. Returns -1 with errno."""
    cdef int fd = openat(dir_fd, name, flags | (O_NOATIME if layer.quiet else 0))
    if fd < 0 and layer.quiet and c_errno == EPERM:
        return openat(dir_fd, name, flags)
    return fd


cdef Place new_place(Layer layer, Place parent, bytes name, int64_t key):
    cdef Place place = Place.__new__(Place)
    place.layer = layer
    place.parent = parent
    place.name = name
    place.fd = -1
    place.key = key
    return place


cdef class Place:
    """A directory of one layer. ``fd`` is -1 unless the gate has it open."""

    # key: the directory's `Layer.key`; 0: unknown.
    # default_acl: in the upper: the default ACL, b"" if there is none; None: unknown.
    # empty: in the upper: a copied-up directory into which nothing has been put since.
    # mtime: in the upper: its time of modification after a copy-up; valid while `Node.ctime` is `UNSEEN`.
    # asked_named: the number of lookups of whiteouts by name in it; -1: it is known to have none.
    # impure, copied: whether it may contain copies, and whether it is one itself; see `origin`.
    # dev, inode: of its directory, for all but the topmost part of a directory.

    def __init__(self, Layer layer not None, Place parent, bytes name not None, int fd=-1, *, int64_t key=0):
        self.layer = layer
        self.parent = parent
        self.name = name
        self.fd = fd
        self.key = key

    @property
    def identity(self):
        """Device and inode number, for all but the topmost part of a directory."""
        return self.dev, self.inode

    def move(self, Place parent not None, bytes name not None):
        """Record a rename."""
        self.parent, self.name = parent, name

    def found_as(self, Place place not None):
        """Record that its directory was found as another place of the same layer."""
        self.parent, self.name, self.key = place.parent, place.name, place.key

    def lost(self):
        """Record that another object has its name."""
        self.key = NO_KEY

    def stands_for(self, st):
        """Set its directory to the one with these attributes."""
        self.key = self.layer.key(st)

    def marked(self, *, bint impure, bint copied):
        """Record whether it may contain copies, and whether it is one itself."""
        self.impure, self.copied = impure, copied

    def is_object(self, st):
        """Record its device and inode number."""
        self.dev, self.inode = st.st_dev, st.st_ino

    def copied_up(self, *, bint empty):
        """Record its copy-up; ``empty``: it stays known as empty until :meth:`fills`."""
        self.empty = empty
        self.asked_named = -1

    def fills(self):
        """An entry is about to be added to it."""
        self.empty = False

    def ask_named(self):
        """Count a lookup of a whiteout by name."""
        self.asked_named += 1

    def knows_named(self, *, bint some):
        """Record whether it has whiteouts by name; see `named`."""
        self.asked_named = MANY if some else -1

    def forget_named(self):
        """Forget whether it has whiteouts by name, which others may have changed in a lower."""
        if not self.layer.is_upper:
            self.asked_named = 0

    def know_default_acl(self, bytes acl):
        """Record its default ACL; None: it has changed."""
        self.default_acl = acl


cdef class Gate:
    """Directory fds (O_PATH), opened on demand; the least recently used are closed.

    An fd from :meth:`fd` is valid until ``capacity`` other directories were requested: use it at once, and
    duplicate it for another thread.
    """

    def __init__(self, capacity=1024, rights=None, limit=0):
        """``rights``: for accesses that permission bits deny to their owner. ``limit``: how many fds this process
        may have; 0: any."""
        self.capacity = max(capacity, 64)
        self.limit, self.open_files = limit, 0
        self.rights = rights

    def __len__(self):
        return self.count

    cpdef int fd(self, Place place) except -1:
        """The directory's fd. Raises ``OSError`` (ENOENT, EACCES ...) if it cannot be opened, ESTALE if
        another directory now has its name."""
        if place is None:
            raise TypeError("a directory is needed")
        if place.fd < 0:
            return self.walk(place)
        if place.parent is not None and self.newest is not place:
            self.remove(place)
            self.add(place)
        return place.fd

    cpdef int keeps(self, int fd) except -1:
        """An fd is about to be kept as long as the kernel knows an object. Raises EMFILE if few are left then, which
        names and copy-ups need."""
        # all below it are in use
        if self.limit and (fd >= before_reserve(self.limit) or fd - self.open_files >= self.limit * 5 // 8):
            raise failure(EMFILE)
        return 0

    cdef int walk(self, Place place) except -1:
        cdef list chain = []
        cdef Place above = place, step
        cdef Py_ssize_t number
        cdef int fd
        cdef stat_t st
        while above is not None and above.fd < 0:
            chain.append(above)
            above = above.parent
        assert above is not None, "the root of a layer is always open"
        fd = above.fd
        for number, step in enumerate(reversed(chain), 1):
            fd = self.opened(fd, step)
            if step.key and fstat(fd, &st) != 0:
                error = failure(c_errno)
                close(fd)
                raise error
            if step.key and step.layer.key_of(&st) != step.key:
                close(fd)
                raise OSError(ESTALE, "a layer holds another directory there")
            step.fd = fd
            self.add(step)
            if self.count > self.capacity:
                self.close_one(self.oldest)
            # In a deep tree a long way down must not displace those of the other layers, or every call walks.
            if number > self.capacity // PART_OF_WAY:
                self.forget(chain[self.capacity // PART_OF_WAY - number])
        return fd

    cdef int opened(self, int dir_fd, Place step) except -1:
        cdef int flags = O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC
        cdef int fd = openat(dir_fd, step.name, flags)
        if fd >= 0:
            return fd
        error = failure(c_errno)
        if error.errno not in (EACCES, EPERM) or self.rights is None:
            raise error
        return self.rights.open(dir_fd, step.name, flags, error, upper=step.layer.is_upper)

    cpdef int open_for_listing(self, Place place) except -1:
        """A new readable fd of the directory. Raises ``OSError``."""
        cdef int flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC, dir_fd = self.fd(place)
        cdef int fd = open_quietly(place.layer, dir_fd, b".", flags)
        if fd >= 0:
            return fd
        error = failure(c_errno)
        if error.errno not in (EACCES, EPERM) or self.rights is None:
            raise error
        return self.rights.open(dir_fd, b".", flags, error, upper=place.layer.is_upper)

    def reopen(self, Layer layer not None, int path_fd, int flags):
        """Open the object of an O_PATH fd. Raises ``OSError``."""
        try:
            return call(os.open, b"/proc/self/fd/%d" % path_fd, flags)
        except PermissionError as error:
            if self.rights is None:
                raise
            return self.rights.reopen(path_fd, flags, error, upper=layer.is_upper)

    def stat_refused(self, Place place not None, bytes name not None, refused):
        """fstatat(2) of a name in the directory, after it was ``refused``; None if missing.

        A layer's filesystem may have a shorter name limit: such a name is missing, as in namei.c,
        ovl_lookup_single. Raises ``OSError``.
        """
        if refused.errno in NOT_THERE:
            return None
        if self.rights is None:
            raise refused
        try:
            return self.rights.stat(self.fd(place), name, refused, upper=place.layer.is_upper)
        except FileNotFoundError:
            return None

    cdef object refused(self, Place place, bytes name, int code):
        """The same for an errno."""
        return self.stat_refused(place, name, failure(code))

    cpdef forget(self, Place place):
        """Close the fd of a directory that no longer exists."""
        if place.fd >= 0 and place.parent is not None:
            self.close_one(place)

    def close(self):
        """Close every fd."""
        if self.rights is not None:
            self.rights.close()
        while self.oldest is not None:
            self.close_one(self.oldest)

    cdef void close_one(self, Place place):
        self.remove(place)
        close(place.fd)
        place.fd = -1

    # -- the order of their use, as a doubly linked list -----------------------------------------------

    cdef void add(self, Place place):
        place.older = self.newest
        if self.newest is None:
            self.oldest = place
        else:
            self.newest.newer = place
        self.newest = place
        self.count += 1

    cdef void remove(self, Place place):
        if place.newer is None:
            self.newest = place.older
        else:
            place.newer.older = place.older
        if place.older is None:
            self.oldest = place.newer
        else:
            place.older.newer = place.newer
        place.newer = place.older = None
        self.count -= 1
