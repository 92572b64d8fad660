"""The merge of names over the layers.

Merge rules (Documentation/filesystems/overlayfs.rst): from the top layer down, the first object of a name
wins; a directory merges with directories of the same name below it until a non-directory, a whiteout or an
opaque directory ends the search; a redirect sets the name for the layers below.
"""

from libc.errno cimport EACCES, ENAMETOOLONG, ENODATA, ENOENT, ENOSYS, EOPNOTSUPP, EPERM
from libc.errno cimport errno as c_errno
from libc.stdio cimport snprintf
from libc.string cimport memcmp

from unionfs.core.layercalls cimport fstatat, lgetxattr, xattr_of
from unionfs.core.memo cimport may_ask
from unionfs.core.places cimport new_place, require_some
from unionfs.core.stats cimport (
    AT_SYMLINK_NOFOLLOW, S_IFCHR, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, failure, read_result, result_of,
)

cdef extern from * nogil:
    """
    #include <stdint.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #ifndef __NR_getxattrat
    #define __NR_getxattrat 464  /* include/uapi/asm-generic/unistd.h; not on Alpha */
    #endif
    struct xattr_args_at { uint64_t value; uint32_t size, flags; };  /* include/uapi/linux/xattr.h */
    /* The size of an xattr of a name in a directory; -1 with errno, ENOSYS before Linux 6.13. */
    static long xattr_size_at(int dir_fd, const char *path, const char *name) {
        struct xattr_args_at args = {0, 0, 0};
        return syscall(__NR_getxattrat, dir_fd, path, 0x100 /* AT_SYMLINK_NOFOLLOW */, name, &args, sizeof(args));
    }
    /* Its xattrs, in the same way. */
    static long xattr_names_at(int dir_fd, const char *path, char *names, size_t size) {
        return syscall(__NR_getxattrat + 1, dir_fd, path, 0x100, names, size);
    }
    """
    long xattr_size_at(int dir_fd, const char *path, const char *name)
    long xattr_names_at(int dir_fd, const char *path, char *names, size_t size)

cdef extern from "<string.h>" nogil:
    void *memmem(const void *text, size_t size, const void *part, size_t length)

cdef const char *OPAQUE_BY_NAME = b".wh..wh..opq"

#: The names that hide others, and are never shown; see `named`.
PREFIX = b".wh."

cdef enum:
    # Of a name in a directory: /proc/self/fd/, a number, a slash, NAME_MAX bytes, a null byte
    PATH_SIZE = 300
    NAMES_SIZE = 1024


cdef bint is_hiding(bytes name) noexcept:
    """Whether a name hides another one; see `named`."""
    return len(name) >= 4 and memcmp(<const char *>name, b".wh.", 4) == 0


cdef int stat_at(Gate gate, Place place, int dir_fd, bytes name, stat_t *st) except -1:
    """fstatat(2) of a name; returns 1 if it is missing. Raises ``OSError``."""
    if fstatat(dir_fd, name, st, AT_SYMLINK_NOFOLLOW) == 0:
        return 0
    if c_errno == ENOENT or c_errno == ENAMETOOLONG:
        return 1
    again = gate.refused(place, name, c_errno)
    if again is None:
        return 1
    read_result(again, st)
    return 0


cdef bint may_be_marked(int dir_fd, bytes name) except -1:
    """Whether the directory ``name`` may have one of overlayfs's or fuse-overlayfs's xattrs, which are all called
    ``overlay`` or ``fuseoverlayfs``."""
    cdef char names[NAMES_SIZE]
    cdef long size
    if may_ask(dir_fd):
        size = xattr_of(dir_fd, name, NULL, False, names, NAMES_SIZE)
    else:
        size = xattr_names_at(dir_fd, name, names, NAMES_SIZE)
    if size < 0:
        return c_errno != EOPNOTSUPP
    return memmem(names, size, b"overlay", 7) != NULL


cdef class Search:
    """Finds names in merged directories."""

    # lacks_at: whether the kernel is known to have no getxattrat(2).

    def __init__(
        self, Gate gate not None, markers, named, LowerNames lower_names not None, directories, *, lowest
    ):
        """``markers``: the disk format. ``named``: whiteouts by name. ``lower_names``: which of many parts
        have a name. ``directories``: finds the parts of a directory. ``lowest``: the index of the lowest
        layer."""
        self.gate, self.markers, self.named = gate, markers, named
        self.lower_names, self.directories, self.lowest = lower_names, directories, lowest
        self.whiteout = markers.whiteout
        self.many = lower_names.many

    def search(self, list parts not None, bytes name not None, Py_ssize_t first=0):
        """The object ``name`` in the directory merged from ``parts``: its attributes and its real
        directories; or None. Raises ``OSError``.

        ``first``: the index of the topmost part that may have the name, if known.
        """
        cdef stat_t st
        places = self.find(parts, name, first, &st)
        return None if places is None else (result_of(&st), places)

    cdef list find(self, list parts, bytes name, Py_ssize_t first, stat_t *st):
        """Fills ``st``; returns the real directories: for a directory those merged into it, topmost first;
        else the one that contains it. None if there is no such object."""
        cdef list searched = parts, having
        cdef Place part
        cdef Py_ssize_t index, count
        cdef int dir_fd
        cdef unsigned int kind
        cdef bint many = len(parts) >= self.many, known = first > 0
        if is_hiding(name):
            return None
        if many and not known:
            searched = self.lower_names.parts(parts, name)
        count = len(searched)
        if first == 0 and count and (<Place>searched[0]).empty:
            first = 1
        for index in range(max(first, 0), count):
            part = searched[index]
            dir_fd = self.gate.fd(part)
            if stat_at(self.gate, part, dir_fd, name, st):
                if index < count - 1 and part.asked_named >= 0 and self.hides(part, name, dir_fd):
                    return None
                continue
            kind = st.st_mode & S_IFMT
            if kind == S_IFDIR:
                if many and known:
                    having = self.lower_names.parts(parts, name)
                    if part in having:
                        searched, index = having, having.index(part)
                return self.merged(parts, searched, index, name, st)
            # Most names belong to objects that cannot be markers.
            if kind != S_IFLNK and (kind != S_IFREG or st.st_size == 0) and self.whiteout_at(st, dir_fd, name):
                return None
            if part.layer.permissions is not None:
                read_result(part.layer.permissions.show_at(result_of(st), dir_fd, name), st)
            return [part]
        return None

    cdef list merged(self, list parts, list searched, Py_ssize_t index, bytes name, stat_t *st):
        """The parts of a directory found in one of the parts searched."""
        cdef Place part = searched[index]
        cdef list places = self.plain_parts(searched, index, name, st)
        if places is None:
            places = self.directories.parts(parts, part, name, result_of(st), searched[index + 1 :])
            require_some(places)
        if part.layer.permissions is not None:
            read_result(part.layer.permissions.show_at(result_of(st), self.gate.fd(part), name), st)
        return places

    cdef list plain_parts(self, list searched, Py_ssize_t index, bytes name, const stat_t *top):
        """The same without markers: None if there may be some, or after an error; then `directories` finds the
        parts. ``top``: the attributes of the topmost one, at ``index``."""
        cdef Place part = searched[index], above = part, place = new_place(part.layer, part, name, 0)
        cdef Py_ssize_t count = len(searched)
        cdef list found = [place]
        cdef stat_t st, hiding
        cdef int dir_fd
        place.key = part.layer.key_of(top)
        while place.layer.index != self.lowest:
            if self.lacks_at or may_be_marked(self.gate.fd(above), name):
                return None
            while True:
                index += 1
                if index == count:
                    return found
                part = searched[index]
                dir_fd = self.gate.fd(part)
                if fstatat(dir_fd, name, &st, AT_SYMLINK_NOFOLLOW) == 0:
                    break
                if c_errno != ENOENT and c_errno != ENAMETOOLONG:
                    return None
                if part.layer.index != self.lowest and part.asked_named >= 0 and self.hides(part, name, dir_fd):
                    return found
            if st.st_mode & S_IFMT != S_IFDIR:
                return found
            if above.asked_named >= 0 and self.hides(above, name, self.gate.fd(above)):
                return found
            if fstatat(self.gate.fd(place), OPAQUE_BY_NAME, &hiding, AT_SYMLINK_NOFOLLOW) == 0:
                return found
            if c_errno != ENOENT and c_errno != ENAMETOOLONG:
                return None
            place = new_place(part.layer, part, name, part.layer.key_of(&st))
            place.dev, place.inode = st.st_dev, st.st_ino
            found.append(place)
            above = part
        return found

    cpdef bint is_visible_below(self, list parts, bytes name) except -1:
        """Whether a lower has ``name``, so that removing it from the upper requires a whiteout."""
        cdef list searched = self.lower_names.parts(parts, name) if len(parts) >= self.many else parts
        cdef Place part
        cdef stat_t st
        cdef int dir_fd
        cdef unsigned int kind
        for part in searched:
            if part.layer.is_upper:
                continue
            dir_fd = self.gate.fd(part)
            if stat_at(self.gate, part, dir_fd, name, &st):
                if part is not searched[-1] and part.asked_named >= 0 and self.hides(part, name, dir_fd):
                    return False
                continue
            kind = st.st_mode & S_IFMT
            return kind == S_IFDIR or kind == S_IFLNK or not self.whiteout_at(&st, dir_fd, name)
        return False

    cdef bint hides(self, Place part, bytes name, int dir_fd) except -1:
        return self.named.hides(part, dir_fd, name)

    cdef int whiteout_at(self, const stat_t *st, int dir_fd, bytes name) except -1:
        """Whether the entry ``name`` of ``dir_fd`` is a whiteout; see `markers`."""
        cdef char path[PATH_SIZE]
        cdef unsigned int kind = st.st_mode & S_IFMT
        if kind == S_IFCHR:
            return st.st_rdev == 0
        if kind != S_IFREG or st.st_size:
            return False
        if not self.lacks_at and not may_ask(dir_fd):
            if xattr_size_at(dir_fd, name, self.whiteout) >= 0:
                return True
            if c_errno == ENODATA or c_errno == EOPNOTSUPP:
                return False
            self.lacks_at = c_errno == ENOSYS  # a container's seccomp filter may report EPERM instead
        if snprintf(path, PATH_SIZE, "/proc/self/fd/%d/%s", dir_fd, <const char *>name) >= PATH_SIZE:
            return False
        if lgetxattr(path, self.whiteout, NULL, 0) >= 0:
            return True
        if c_errno in (ENODATA, EOPNOTSUPP, EPERM, EACCES):
            return False
        raise OSError(c_errno, "an xattr of a layer cannot be read")
