"""What the bundles of system calls share: names in the work directory, and the seam between their steps.

A bundle makes one change of the upper by several system calls without Python in between: `copyup`, `setting`,
`changing`. Its function is the list of its steps, in their order. A bundle does the plain case alone: it returns
None, after undoing what it did, where a system call fails before the change is visible, so that the Python
object that decides may do it in its own way, or report the error.
"""

import os

from libc.errno cimport EACCES, EEXIST, EINVAL, ENOENT, ENOSYS, EOPNOTSUPP, EPERM
from libc.errno cimport errno as c_errno
from libc.stdio cimport snprintf
from posix.unistd cimport close

from unionfs.core.stats cimport O_CLOEXEC, O_NOFOLLOW, O_PATH, S_IFCHR, failure, openat

cdef extern from "<fcntl.h>" nogil:
    int AT_FDCWD
    int AT_EMPTY_PATH
    int AT_SYMLINK_FOLLOW

cdef extern from "<sys/stat.h>" nogil:
    int mknodat(int fd, const char *path, unsigned int mode, unsigned long rdev)

cdef extern from "<unistd.h>" nogil:
    int linkat(int old_fd, const char *old, int new_fd, const char *new, int flags)

cdef enum:
    # /proc/self/fd/, a number, a null byte
    PATH_SIZE = 32


class NotPlain(Exception):
    """A case turns out not to be plain. A bundle undoes what it did, and returns None."""


hooked = False
cdef object hook = None


def set_hook(new):
    """Call ``new`` with the name of each step of a bundle as soon as it is done; None: no longer. For tests,
    which observe changes or let them fail there by an exception; :class:`NotPlain` before the change is
    visible."""
    global hook, hooked
    hook, hooked = new, new is not None


cdef int call_hook(const char *step) except -1 with gil:
    hook(step.decode())
    return 0


cdef class Workplace:
    """The work directory ``fd`` of one union, and the names in it."""

    # last_whiteout: an O_PATH fd of one; links: whether it can get other names, by_path: by /proc/self/fd.

    def __cinit__(self):
        self.last_whiteout, self.links = -1, True

    def __dealloc__(self):
        if self.last_whiteout >= 0:
            close(self.last_whiteout)

    def __init__(self, int fd):
        self.fd = fd
        # Another host may work in the same directory before this one finds that its lease was lost, and what
        # this one then still removes or renames must be its own.
        self.number = int.from_bytes(os.urandom(6))

    def close(self):
        """Close what it has opened."""
        if self.last_whiteout >= 0:
            close(self.last_whiteout)
            self.last_whiteout = -1

    cdef void next(self, char *name) noexcept nogil:
        snprintf(name, NAME_SIZE, "#%lx", <unsigned long>self.number)
        self.number += 1

    def next_name(self):
        """A name that nothing in it has."""
        cdef char name[NAME_SIZE]
        self.next(name)
        return <bytes>name

    def discard(self, bytes name):
        """Remove that name and everything below it. Ignores errors and a missing name."""
        raise NotImplementedError

    def make_whiteout(self, int dir_fd, bytes name not None):
        """Make a whiteout, a character device 0/0, in a directory of the upper or in work. Returns False where
        that is refused. Raises ``OSError``."""
        try:
            passed("begin")
        except NotPlain:
            return False
        if self.whiteout(dir_fd, name) == 0:
            return True
        if c_errno == EPERM or c_errno == EACCES:
            return False
        raise failure(c_errno)

    cdef int whiteout(self, int dir_fd, const char *name) noexcept nogil:
        """The same. Returns -1 with errno.

        It is another name of the last one, as in overlayfs (dir.c, ovl_whiteout), which takes no inode.
        """
        if self.links and self.last_whiteout >= 0:
            if self.link_whiteout(dir_fd, name) == 0:
                return 0
            if c_errno == EEXIST:
                return -1
            # all its names are gone, or it has too many
            self.links = c_errno not in (EPERM, EINVAL, ENOSYS, EOPNOTSUPP)
            close(self.last_whiteout)
            self.last_whiteout = -1
        if mknodat(dir_fd, name, S_IFCHR, 0) != 0:
            return -1
        if self.links:
            self.last_whiteout = openat(dir_fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC)
        return 0

    cdef int link_whiteout(self, int dir_fd, const char *name) noexcept nogil:
        cdef char path[PATH_SIZE]
        if not self.by_path:
            if linkat(self.last_whiteout, "", dir_fd, name, AT_EMPTY_PATH) == 0:
                return 0
            if c_errno != ENOENT:  # or without CAP_DAC_READ_SEARCH
                return -1
        snprintf(path, PATH_SIZE, "/proc/self/fd/%d", self.last_whiteout)
        if linkat(AT_FDCWD, path, dir_fd, name, AT_SYMLINK_FOLLOW) != 0:
            return -1
        self.by_path = True
        return 0
