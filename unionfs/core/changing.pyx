"""Entries of the upper's directories, made, removed and renamed by bundles of system calls; see `steps`.

The plain case of making: a name in a directory of the upper that is free, or a whiteout (character device 0/0).
The plain case of removing and renaming: a known non-directory without an entry in an index; of removing, also an
empty directory without lower parts. The others are those of `union.making` and its like.
"""

from libc.errno cimport EEXIST, ENODATA, EOPNOTSUPP
from libc.errno cimport errno as c_errno
from libc.stdio cimport snprintf
from posix.unistd cimport close

from unionfs.core.node cimport Attributes, has_changed, has_entry, has_links, has_lower_data
from unionfs.core.places cimport new_place
from unionfs.core.search cimport is_hiding
from unionfs.core.stats cimport (
    AT_SYMLINK_NOFOLLOW, O_CLOEXEC, O_NOFOLLOW, O_PATH, S_IFCHR, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, failure,
    fstat, fstatat, openat,
)
from unionfs.core.steps cimport passed

from unionfs.core.steps import NotPlain

cdef extern from "<fcntl.h>" nogil:
    int O_RDWR
    int O_CREAT
    int O_EXCL
    int AT_REMOVEDIR
    int F_DUPFD_CLOEXEC
    int unlinkat(int fd, const char *path, int flags)
    int fcntl(int fd, int command, ...)

cdef extern from "<stdio.h>" nogil:
    int renameat(int old_fd, const char *old, int new_fd, const char *new)
    int renameat2(int old_fd, const char *old, int new_fd, const char *new, unsigned int flags)
    unsigned int RENAME_EXCHANGE, RENAME_WHITEOUT

cdef extern from "<sys/stat.h>" nogil:
    int S_ISGID
    int mkdirat(int fd, const char *path, unsigned int mode)
    int mknodat(int fd, const char *path, unsigned int mode, unsigned long rdev)

cdef extern from "<unistd.h>" nogil:
    int symlinkat(const char *target, int fd, const char *path)

cdef extern from "<sys/xattr.h>" nogil:
    ssize_t lgetxattr(const char *path, const char *name, void *value, size_t size)
    int lsetxattr(const char *path, const char *name, const void *value, size_t size, int flags)

cdef enum:
    # Of a name in a directory, as in `search`
    PATH_SIZE = 300
    PERMISSIONS = 0o7777
    # FS_IMMUTABLE_FL, of `Node.flags`, include/uapi/linux/fs.h
    IMMUTABLE = 0x10


cdef int make_object(New *new, int dir_fd, const char *name) noexcept nogil:
    """Make the object at a name. Returns an fd of it, if it is to be opened, else 0; -1 with errno."""
    cdef uint32_t kind = new.mode & S_IFMT, mode = new.mode & PERMISSIONS
    if new.opens:
        return openat(dir_fd, name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode)
    if kind == S_IFDIR:
        return mkdirat(dir_fd, name, mode)
    if kind == S_IFLNK:
        return symlinkat(new.target, dir_fd, name)
    return mknodat(dir_fd, name, kind | mode, new.rdev)


cdef bint is_whiteout(int dir_fd, const char *name) noexcept nogil:
    cdef stat_t st
    if fstatat(dir_fd, name, &st, AT_SYMLINK_NOFOLLOW) != 0:
        return False
    return st.st_mode & S_IFMT == S_IFCHR and st.st_rdev == 0


cdef class EntryChanges:
    """Makes and removes entries in the merged layers of one union."""

    def __init__(self, union, Creator identity not None, *, bint remembers):
        """``remembers``: whether a node remembers that it has no capabilities."""
        self.gate, self.merge, self.nodes = union.gate, union.merge, union.nodes
        self.origins, self.work, self.identity, self.flags = union.origins, union.work, identity, union.flags
        self.remembers = remembers
        self.metacopy, self.opaque = union.markers.metacopy, union.markers.opaque

    cdef Place place_to_change(self, Node directory):
        """The upper's directory of a node, about to be changed; None if it is not a plain one."""
        cdef Place place
        if directory.children is None or directory.unlinked or not directory.is_changed_in_place():
            return None
        if not directory.territory.has_markers or directory.territory.read_only:
            return None
        place = directory.parts[0]
        if directory.territory.owners is not None or place.layer.permissions is not None:
            return None
        return place

    # -- making ---------------------------------------------------------------------------------------

    def make(
        self, Node parent not None, bytes name not None, mode, uid, gid, umask, *, bint opens=False, rdev=0,
        bytes target=b"",
    ):
        """Make an object with that type and mode, which belongs to ``uid`` and ``gid``. Returns its node, its
        attributes, and an fd of it (O_RDWR), if it ``opens``, else -1.

        None if the case is not plain; then nothing has changed. ``umask``: for a directory without default
        ACL. ``target``: of a symlink.
        """
        cdef New new
        cdef Place place = self.place_to_change(parent)
        cdef const char *at = name
        cdef Creator identity = self.identity
        cdef Workplace work = self.work
        cdef Node node
        cdef int dir_fd
        cdef bint made
        if place is None or self.flags.of(parent) & IMMUTABLE:
            return None
        if is_hiding(name):
            return None
        new.fd, new.made, new.opens = -1, False, opens
        new.uid, new.gid, new.mode, new.rdev, new.target = uid, gid, mode, rdev, target
        if not identity.is_me(new.uid, new.gid) and not identity.can_switch:
            return None
        if umask:
            if place.default_acl is None:
                return None
            if not place.default_acl:
                new.mode &= ~<uint32_t>umask
        new.replaces = place.default_acl is not None and not place.default_acl
        new.opaque = self.opaque
        dir_fd = self.gate.fd(place)
        if place.asked_named >= 0 and self.merge.hides(place, name, dir_fd):
            return None
        place.empty = False
        has_changed(parent)
        try:
            with nogil:
                made = self.make_entry(&new, dir_fd, at, identity, work)
            if not made:
                return None
            node = self.node_of(parent, name, place, &new.st)
            attributes = node.shown(&new.st)
            opened, new.fd = new.fd, -1
            return node, attributes, opened
        except NotPlain:
            return None
        finally:
            if new.made and unlinkat(work.fd, new.name, 0) != 0:
                work.discard(<bytes>new.name)
            if new.fd >= 0:
                close(new.fd)

    cdef bint make_entry(
        self, New *new, int dir_fd, const char *name, Creator identity, Workplace work
    ) except -1 nogil:
        """Make the object. Returns whether it is made."""
        cdef int fd
        cdef bint as_other = not identity.is_me(new.uid, new.gid)
        passed("begin")
        if as_other:
            identity.become(new.uid, new.gid)
        fd = make_object(new, dir_fd, name)
        if fd < 0 and c_errno == EEXIST and new.replaces and is_whiteout(dir_fd, name):
            if fstat(dir_fd, &new.st) == 0 and not new.st.st_mode & S_ISGID:  # in work nothing is inherited
                work.next(new.name)
                fd = make_object(new, work.fd, new.name)
                new.made = fd >= 0
        if as_other:
            identity.be_myself()
        if fd < 0:
            return False
        if new.opens:
            new.fd = fd
        passed("make")
        if new.made:
            if not self.replace(new, work.fd, dir_fd, name):
                return False
            passed("appear")
        if (fstat(fd, &new.st) if new.opens else fstatat(dir_fd, name, &new.st, AT_SYMLINK_NOFOLLOW)) != 0:
            with gil:
                raise failure(c_errno)
        return True

    cdef bint replace(self, New *new, int work, int dir_fd, const char *name) except -1 nogil:
        """Put an object from work in place of a whiteout; a directory becomes opaque. Returns whether it is."""
        cdef char path[PATH_SIZE]
        if new.mode & S_IFMT != S_IFDIR:
            new.made = renameat(work, new.name, dir_fd, name) != 0
            return not new.made
        snprintf(path, PATH_SIZE, "/proc/self/fd/%d/%s", work, new.name)
        if lsetxattr(path, new.opaque, b"y", 1, 0) != 0:
            return False
        passed("opaque")
        if renameat2(work, new.name, dir_fd, name, RENAME_EXCHANGE) != 0:
            return False
        new.made = unlinkat(work, new.name, 0) != 0  # the whiteout
        return True

    cdef Node node_of(self, Node parent, bytes name, Place place, const stat_t *st):
        """The node of a new object."""
        cdef Node node
        cdef Place new
        if st.st_mode & S_IFMT == S_IFDIR:
            new = new_place(place.layer, place, name, place.layer.key_of(st))
            new.asked_named = -1
            node = self.nodes.place_object(parent, name, st, [new])
        else:  # it has no origin
            node = self.nodes.enter(
                parent, name, st, [place], self.origins.number(st.st_dev, st.st_ino), False, None
            )
        node.no_capability = self.remembers and parent.territory.lasting
        node.flags = 0
        return node

    # -- removing -------------------------------------------------------------------------------------

    def unlink(self, Node parent not None, bytes name not None):
        """Remove a name of a non-directory from the disk and from the table.

        Returns False if the case is not plain; then nothing has changed. Raises ``OSError``.
        """
        cdef Place place = self.place_to_change(parent)
        cdef Node node = parent.children.get(name)
        cdef const char *at = name
        cdef Workplace work = self.work
        cdef New whiteout
        cdef int dir_fd, held = -1
        cdef bint done, in_place, below
        if place is None or not self.may_move(node, parent):
            return False
        whiteout.made = False
        in_place = node.is_changed_in_place()
        below = in_place and self.merge.is_visible_below(parent.parts, name)
        try:
            held = self.hold(node)
            passed("hold")
            place.empty = False
            has_changed(parent)
            dir_fd = self.gate.fd(place)
            with nogil:
                done = self.unlink_entry(&whiteout, dir_fd, at, in_place, below, work)
            if done:
                self.lose(node, parent, name, held)
                held = -1
                passed("remove")
            return done
        except NotPlain:
            return False
        finally:
            if whiteout.made and unlinkat(work.fd, whiteout.name, 0) != 0:
                work.discard(<bytes>whiteout.name)
            if held >= 0:
                close(held)

    def rmdir(self, Node parent not None, bytes name not None):
        """Remove a directory that only the upper has, if it is empty, from the disk and from the table.

        Returns False if the case is not plain; then nothing has changed. Raises ``OSError``.
        """
        cdef Place place = self.place_to_change(parent), removed
        cdef Node node = parent.children.get(name)
        cdef const char *at = name
        cdef int dir_fd, held, code
        if place is None or node is None or node.kind != S_IFDIR or self.has_flags(node, parent):
            return False
        if len(node.parts) != 1 or node.held >= 0 or not node.is_changed_in_place():
            return False
        if self.merge.is_visible_below(parent.parts, name):
            return False
        removed = node.parts[0]
        held = fcntl(self.gate.fd(removed), F_DUPFD_CLOEXEC, 0)
        if held < 0:
            raise failure(c_errno)
        try:
            passed("hold")
            place.empty = False
            has_changed(parent)
            dir_fd = self.gate.fd(place)
            with nogil:
                code = unlinkat(dir_fd, at, AT_REMOVEDIR)
            if code != 0:
                return False
            self.gate.forget(removed)
            self.lose(node, parent, name, held)
            held = -1
            passed("remove")
            return True
        except NotPlain:
            return False
        finally:
            if held >= 0:
                close(held)

    cdef bint has_flags(self, Node node, Node parent) except -1:
        """Whether a name is protected, or in use as a mount point of the union."""
        return node.territory is not parent.territory or self.flags.of(node) | self.flags.of(parent) != 0

    cdef int hold(self, Node node) except -2:
        """An fd of an object that loses its last known name, by which the node outlives it; else -1."""
        cdef stat_t st
        cdef int fd
        if node.held >= 0 or has_links(node):
            return -1
        fd = openat(self.gate.fd(node.place), node.name, O_PATH | O_NOFOLLOW | O_CLOEXEC)
        if fd < 0:
            raise NotPlain
        try:
            if fstat(fd, &st) != 0:
                raise failure(c_errno)
            node.check_stat(&st)
        except BaseException:
            close(fd)
            raise
        return fd

    cdef bint unlink_entry(
        self, New *whiteout, int dir_fd, const char *name, bint in_place, bint below, Workplace work
    ) except -1 nogil:
        """Remove an object, or hide the one ``below`` it. Returns whether that is done."""
        if not in_place:
            if work.whiteout(dir_fd, name) != 0:
                return False
        elif below:
            work.next(whiteout.name)
            if work.whiteout(work.fd, whiteout.name) != 0:
                return False
            whiteout.made = True
            passed("make")
            if renameat(work.fd, whiteout.name, dir_fd, name) != 0:
                return False
            whiteout.made = False
        elif unlinkat(dir_fd, name, 0) != 0:
            return False
        return True

    cdef int lose(self, Node node, Node parent, bytes name, int held) except -1:
        """Record that a name is removed, and keep the object of a node that has lost its last one."""
        cdef stat_t st
        node.lose_name(parent, name)
        self.nodes.release(parent)
        if held < 0:
            return 0
        if not node.unlinked or node.held >= 0:
            close(held)
            return 0
        node.held = held
        if node.kind != S_IFDIR and node.is_changed_in_place() and fstat(held, &st) == 0:
            if <Py_ssize_t>st.st_nlink > node.place.layer.links_of_removed:
                node.territory.lost_name(node)
        return 0

    # -- renaming -------------------------------------------------------------------------------------

    def rename(
        self, Node parent not None, bytes name not None, Node new_parent not None, bytes new_name not None
    ):
        """Rename a non-directory, on the disk and in the table, over another one if there is one.

        Returns False if the case is not plain; then nothing has changed. Raises ``OSError``.
        """
        cdef Place place = self.place_to_change(parent), new_place = self.place_to_change(new_parent)
        cdef Node node = parent.children.get(name), target = new_parent.children.get(new_name)
        cdef const char *at = name
        cdef const char *new_at = new_name
        cdef int dir_fd, new_fd, held = -1, code
        cdef unsigned int flags
        cdef stat_t st
        if place is None or new_place is None or node is target or not self.may_move(node, parent):
            return False
        if not node.is_changed_in_place() or not self.has_data(node):
            return False
        if is_hiding(new_name):
            return False
        if target is None:
            if self.flags.of(new_parent) & IMMUTABLE:
                return False
            if self.merge.find(new_parent.parts, new_name, 0, &st) is not None:
                return False
        elif not self.may_move(target, new_parent):
            return False
        flags = RENAME_WHITEOUT if self.merge.is_visible_below(parent.parts, name) else 0
        new_fd = self.gate.fd(new_place)
        if new_place.asked_named >= 0 and self.merge.hides(new_place, new_name, new_fd):
            return False
        try:
            if target is not None:
                held = self.hold(target)
            passed("hold")
            if node.from_origin:
                self.origins.becomes_impure(new_place, new_fd)
            new_fd, dir_fd = self.gate.fd(new_place), self.gate.fd(place)
            if new_place.fd != new_fd:
                return False  # it was closed to open the other one
            place.empty = new_place.empty = False
            has_changed(parent)
            has_changed(new_parent)
            with nogil:
                code = renameat2(dir_fd, at, new_fd, new_at, flags)
            if code != 0:
                return False
            if target is not None:
                self.lose(target, new_parent, new_name, held)
                held = -1
            self.nodes.move(node, parent, name, new_parent, new_name)
            passed("rename")
            return True
        except NotPlain:
            return False
        finally:
            if held >= 0:
                close(held)

    cdef bint may_move(self, Node node, Node parent) except -1:
        """Whether a name of a known non-directory can be removed."""
        if node is None or node.kind == S_IFDIR or has_entry(node):
            return False
        return not self.has_flags(node, parent)

    cdef bint has_data(self, Node node) except -1:
        """Whether a file of the upper is not metacopy, which finds its data by its name."""
        cdef char path[PATH_SIZE]
        if node.kind != S_IFREG:
            return True
        if node.held >= 0 or has_lower_data(node):
            return False
        snprintf(path, PATH_SIZE, "/proc/self/fd/%d/%s", self.gate.fd(node.place), <const char *>node.name)
        return lgetxattr(path, self.metacopy, NULL, 0) < 0 and (c_errno == ENODATA or c_errno == EOPNOTSUPP)
