"""What the bundles of system calls share: names in the work directory, and the seam between their steps.

A bundle makes one change of the upper by several system calls without Python in between: `copyup`, `setting`,
`making`. Its function is the list of its steps, in their order. A bundle does the plain case alone: it returns
None, after undoing what it did, where a system call fails before the change is visible, so that the Python
object that decides may do it in its own way, or report the error.
"""

from libc.stdio cimport snprintf


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

    def __init__(self, int fd):
        self.fd = fd

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
