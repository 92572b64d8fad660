"""Entries of the upper's directories, made, removed and renamed by bundles of system calls; see `steps`.

The plain case of making: a name in a directory of the upper that is free, or a whiteout (character device 0/0).
The plain case of removing and renaming: a known non-directory without an entry in an index; of removing, also an
empty directory without lower parts. The others are those of `union.making` and its like.
"""

from libc.errno cimport EEXIST, ENODATA, EOPNOTSUPP
from libc.errno cimport errno as c_errno
from libc.stdio cimport snprintf

from unionfs.core.layercalls cimport fstat as fstat_in_layer
from unionfs.core.layercalls cimport openat as open_in_layer
from unionfs.core.marks cimport close
from unionfs.core.node cimport Attributes, has_changed, has_entry, has_links, has_lower_data
from unionfs.core.places cimport new_place
from unionfs.core.search cimport is_hiding
from unionfs.core.stats cimport (
    AT_SYMLINK_NOFOLLOW, O_CLOEXEC, O_NOFOLLOW, O_PATH, S_IFCHR, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, failure,
    fstat, fstatat, openat,
)
from unionfs.core.state cimport REMOVING, RENAMING
from unionfs.core.steps cimport passed

from unionfs.core.marks import duplicate
from unionfs.core.steps import NotPlain

cdef extern from "<fcntl.h>" nogil:
    int O_RDWR
    int O_CREAT
    int O_EXCL
    int AT_REMOVEDIR
    int unlinkat(int fd, const char *path, int flags)

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
    # What a `Step` does with a name: remove it, make a whiteout there, or put one over it, or rename it.
    REMOVE = 1
    HIDE = 2
    COVER = 3
    RENAME = 4


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
        cdef Attributes found
        new.opens = opens
        new.uid, new.gid, new.mode, new.rdev, new.target = uid, gid, mode, rdev, target
        found = self.made(&new, parent, name, umask)
        return None if found is None else (found.node, found, new.fd)

    cdef Attributes made(self, New *new, Node parent, bytes name, uint32_t umask):
        """The attributes of the object, whose ``fd`` belongs to the caller."""
        cdef Place place = self.place_to_change(parent)
        cdef const char *at = name
        cdef Creator identity = self.identity
        cdef Workplace work = self.work
        cdef Attributes found = None
        cdef int dir_fd
        cdef bint made
        new.fd, new.made, new.opaque = -1, False, self.opaque
        if place is None or self.flags.of(parent) & IMMUTABLE or is_hiding(name):
            return None
        if not identity.is_me(new.uid, new.gid) and not identity.can_switch:
            return None
        if umask:
            if place.default_acl is None:
                return None
            if not place.default_acl:
                new.mode &= ~umask
        new.replaces = place.default_acl is not None and not place.default_acl
        dir_fd = self.gate.fd(place)
        if place.asked_named >= 0 and self.merge.hides(place, name, dir_fd):
            return None
        place.empty = False
        has_changed(parent)
        try:
            with nogil:
                made = self.make_entry(new, dir_fd, at, identity, work)
            if made:
                found = self.node_of(parent, name, place, &new.st).shown(&new.st)
            return found
        except NotPlain:
            return None
        finally:
            if new.made and unlinkat(work.fd, new.name, 0) != 0:
                work.discard(<bytes>new.name)
            if found is None and new.fd >= 0:
                close(new.fd)

    cdef bint make_entry(
        self, New *new, int dir_fd, const char *name, Creator identity, Workplace work
    ) except -1 nogil:
        """Make the object. Returns whether it is made."""
        cdef int fd, code
        cdef bint replaced, as_other = not identity.is_me(new.uid, new.gid)
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
        replaced = new.made
        if replaced:
            if not self.replace(new, work.fd, dir_fd, name):
                return False
            passed("appear")
        if (fstat(fd, &new.st) if new.opens else fstatat(dir_fd, name, &new.st, AT_SYMLINK_NOFOLLOW)) != 0:
            code = c_errno
            self.unmake(new, dir_fd, name, work, replaced)
            with gil:
                raise failure(code)
        return True

    cdef void unmake(self, New *new, int dir_fd, const char *name, Workplace work, bint replaced) noexcept nogil:
        """Remove the new object, since its attributes cannot be read; with the whiteout that it ``replaced``."""
        cdef bint is_directory = new.mode & S_IFMT == S_IFDIR
        if not replaced:
            unlinkat(dir_fd, name, AT_REMOVEDIR if is_directory else 0)
            return
        work.next(new.name)
        if work.whiteout(work.fd, new.name) == 0:
            new.made = renameat2(work.fd, new.name, dir_fd, name, RENAME_EXCHANGE if is_directory else 0) != 0
            new.made = new.made or is_directory

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

    cpdef bint unlink(self, Node parent, bytes name) except -1:
        """Remove a name of a non-directory from the disk and from the table.

        Returns False if the case is not plain; then nothing has changed. Raises ``OSError``.
        """
        cdef Place place = self.place_to_change(parent)
        cdef Node node = None if place is None else parent.children.get(name)
        cdef Step step
        if node is None or not self.may_move(node, parent):
            return False
        step.kind, step.flags, step.name = HIDE, 0, name
        if node.is_changed_in_place():
            step.kind = COVER if self.merge.is_visible_below(parent.parts, name) else REMOVE
        return self.remove(&step, place, node, parent, name)

    cpdef bint rmdir(self, Node parent, bytes name) except -1:
        """Remove a directory that only the upper has, if it is empty, from the disk and from the table.

        Returns False if the case is not plain; then nothing has changed. Raises ``OSError``.
        """
        cdef Place place = self.place_to_change(parent), removed
        cdef Node node = None if place is None else parent.children.get(name)
        cdef Step step
        if node is None or node.kind != S_IFDIR or self.has_flags(node, parent):
            return False
        if len(node.parts) != 1 or node.held >= 0 or not node.is_changed_in_place():
            return False
        if self.merge.is_visible_below(parent.parts, name):
            return False
        removed = node.parts[0]
        step.kind, step.flags, step.name = REMOVE, AT_REMOVEDIR, name
        if not self.remove(&step, place, node, parent, name):
            return False
        self.gate.forget(removed)
        return True

    cdef bint remove(self, Step *step, Place place, Node node, Node parent, bytes name) except -1:
        place.empty = False
        has_changed(parent)
        self.nodes.begin(REMOVING, parent, name, None, None, None, node, -1)
        try:
            if not self.carry_out(step, place, None, node, parent, name):
                return False
            passed("remove")
            return True
        finally:
            self.nodes.done()

    cdef bint has_flags(self, Node node, Node parent) except -1:
        """Whether a name is protected, or in use as a mount point of the union."""
        return node.territory is not parent.territory or self.flags.of(node) | self.flags.of(parent) != 0

    cdef bint carry_out(
        self, Step *step, Place place, Place new_place, Node lost, Node parent, bytes name
    ) except -1:
        """Make the change of a name in a real directory, or a rename to ``new_place``. The object ``lost``, if any,
        loses its name in ``parent`` by it, and is held by an fd if that was the last one.

        Returns False if the case is not plain; then nothing has changed. Raises ``OSError``.
        """
        cdef Workplace work = self.work
        cdef bint done
        step.held, step.made = -1, False
        try:
            if lost is not None:
                self.hold(lost, step)
            passed("hold")
            step.new_fd = -1 if new_place is None else self.gate.fd(new_place)
            step.dir_fd = self.gate.fd(place)
            if new_place is not None and new_place.fd != step.new_fd:
                return False  # it was closed to open the other one
            self.nodes.holds(step.held)
            with nogil:
                done = self.change_entry(step, work)
            if done and lost is not None:
                self.lose(lost, parent, name, step)
            return done
        except NotPlain:
            return False
        finally:
            if step.made and unlinkat(work.fd, step.whiteout, 0) != 0:
                work.discard(<bytes>step.whiteout)
            if step.held >= 0:
                self.nodes.holds(-1)  # first: a daemon that takes over must not take another file's fd for it
                close(step.held)

    cdef int hold(self, Node node, Step *step) except -1:
        """An fd of an object that loses its last known name, by which the node outlives it."""
        cdef stat_t st
        # Another daemon does not know other names.
        if node.held >= 0 or (has_links(node) and self.nodes.state is None):
            return 0
        if node.kind == S_IFDIR:
            step.held = duplicate(self.gate.fd(node.parts[0]))
        else:
            step.held = open_in_layer(self.gate.fd(node.place), node.name, O_PATH | O_NOFOLLOW | O_CLOEXEC)
        if step.held < 0:
            raise NotPlain
        self.gate.keeps(step.held)
        step.links = 1
        if node.kind != S_IFDIR:
            if fstat_in_layer(step.held, &st) != 0:
                raise failure(c_errno)
            node.check_stat(&st)
            step.links = st.st_nlink
        return 0

    cdef bint change_entry(self, Step *step, Workplace work) except -1 nogil:
        """Returns whether it is done."""
        if step.kind == REMOVE:
            return unlinkat(step.dir_fd, step.name, step.flags) == 0
        if step.kind == RENAME:
            return renameat2(step.dir_fd, step.name, step.new_fd, step.new_name, step.flags) == 0
        if step.kind == HIDE:
            return work.whiteout(step.dir_fd, step.name) == 0
        work.next(step.whiteout)
        if work.whiteout(work.fd, step.whiteout) != 0:
            return False
        step.made = True
        passed("make")
        step.made = renameat(work.fd, step.whiteout, step.dir_fd, step.name) != 0
        return not step.made

    cdef int lose(self, Node node, Node parent, bytes name, Step *step) except -1:
        """Record that a name is removed, and keep the object of a node that has lost its last one."""
        cdef bint holds
        node.lose_name(parent, name)
        holds = step.held >= 0 and node.unlinked and node.held < 0
        if holds:
            node.held, step.held = step.held, -1
        self.nodes.record_name(node)
        self.nodes.release(parent)
        if holds and step.links > 1 and node.is_changed_in_place():  # it has names that are not known
            node.territory.lost_name(node)
        return 0

    # -- renaming -------------------------------------------------------------------------------------

    cpdef bint rename(self, Node parent, bytes name, Node new_parent, bytes new_name) except -1:
        """Rename a non-directory, on the disk and in the table, over another one if there is one.

        Returns False if the case is not plain; then nothing has changed. Raises ``OSError``.
        """
        cdef Place place = self.place_to_change(parent), new_place = self.place_to_change(new_parent)
        cdef Node node, target
        cdef Step step
        cdef stat_t st
        if place is None or new_place is None:
            return False
        node, target = parent.children.get(name), new_parent.children.get(new_name)
        if node is None or node is target or not self.may_move(node, parent):
            return False
        if not node.is_changed_in_place() or not self.has_data(node) or is_hiding(new_name):
            return False
        if target is None:
            if self.flags.of(new_parent) & IMMUTABLE:
                return False
            if self.merge.find(new_parent.parts, new_name, 0, &st) is not None:
                return False
        elif not self.may_move(target, new_parent):
            return False
        step.kind, step.name, step.new_name = RENAME, name, new_name
        step.flags = RENAME_WHITEOUT if self.merge.is_visible_below(parent.parts, name) else 0
        step.new_fd = self.gate.fd(new_place)
        if new_place.asked_named >= 0 and self.merge.hides(new_place, new_name, step.new_fd):
            return False
        if node.from_origin:
            self.origins.becomes_impure(new_place, self.gate.fd(new_place))
        place.empty = new_place.empty = False
        has_changed(parent)
        has_changed(new_parent)
        self.nodes.begin(RENAMING, parent, name, new_parent, new_name, node, target, -1)
        try:
            if not self.carry_out(&step, place, new_place, target, new_parent, new_name):
                return False
            self.nodes.move(node, parent, name, new_parent, new_name)
            passed("rename")
            return True
        finally:
            self.nodes.done()

    cdef bint may_move(self, Node node, Node parent) except -1:
        """Whether a name of a known non-directory can be removed."""
        return node.kind != S_IFDIR and not has_entry(node) and not self.has_flags(node, parent)

    cdef bint has_data(self, Node node) except -1:
        """Whether a file of the upper is not metacopy, which finds its data by its name."""
        cdef char path[PATH_SIZE]
        if node.kind != S_IFREG:
            return True
        if node.held >= 0 or has_lower_data(node):
            return False
        snprintf(path, PATH_SIZE, "/proc/self/fd/%d/%s", self.gate.fd(node.place), <const char *>node.name)
        return lgetxattr(path, self.metacopy, NULL, 0) < 0 and (c_errno == ENODATA or c_errno == EOPNOTSUPP)
