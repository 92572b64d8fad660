"""Which lowers have a name, for directories that are merged from many of them.

A lookup costs a system call per layer, and most names are in few layers or none: a shell searches every
directory of PATH, Python every one of sys.path. So after a few lookups in such a directory its lowers, which
do not change, are listed once.
"""

from libc.errno cimport errno as c_errno

from unionfs.core.directories import LARGE as _LARGE
from unionfs.core.layercalls cimport fstat
from unionfs.core.marks cimport close
from unionfs.core.stats cimport failure, stat_t

MANY = 8

cdef enum:
    ASKED = 4


cdef class Lowers:
    """The lowers of one directory, and which of them have a name."""

    # given: the parts of the directory when it was looked up last.
    # names: of all lowers; None: not listed yet, or cannot be listed.


cdef class LowerNames:
    """Remembers the names in the lowers of some merged directories."""

    # kept: by the lowest real directory, which is part of only one merged directory; least recently used first.
    # count: the names in all of them.

    def __init__(
        self, Gate gate not None, *, many=MANY, asked=ASKED, names=500_000, directories=4096, large=_LARGE
    ):
        """``many``: the minimum number of lowers to list. ``asked``: lookups in a directory before its lowers
        are listed. At most so many ``names`` and ``directories`` are remembered; real directories of more than
        ``large`` bytes on their filesystem are not listed."""
        self.gate, self.kept, self.many, self.asked = gate, {}, many, asked
        self.most_names, self.most_directories, self.large = names, directories, large

    def __len__(self):
        """The number of directories."""
        return len(self.kept)

    def has_listed(self, list parts not None):
        """Whether the names in the lowers of a merged directory are known."""
        cdef Lowers found = self.kept.get(parts[-1]) if parts else None
        return found is not None and found.names is not None

    cpdef list parts(self, list parts, bytes name):
        """The parts of a merged directory that may have ``name``, topmost first."""
        cdef Py_ssize_t first = 1 if parts and (<Place>parts[0]).layer.is_upper else 0
        cdef Lowers found
        if len(parts) - first < self.many:
            return parts
        found = self.known(parts, first)
        if found.asked < self.asked:
            if found.asked + 1 == self.asked:
                self.read(found)
            found.asked += 1
        if found.names is None:
            return parts
        return parts[:first] + found.names.parts_with(name)

    cdef Lowers known(self, list parts, Py_ssize_t first):
        """What is remembered of a directory, now the most recently used one; ``first``: the topmost lower."""
        cdef Lowers found = self.newest
        cdef Place lowest
        if found is not None and found.given is parts:
            return found
        lowest = parts[-1]
        found = self.kept.get(lowest)
        if found is None or (found.given is not parts and found.lowers != parts[first:]):
            self.drop(lowest)
            found = Lowers.__new__(Lowers)
            found.lowers = parts[first:]
        else:
            del self.kept[lowest]
        found.given = parts
        self.kept[lowest] = self.newest = found
        self.limit()
        return found

    cdef int read(self, Lowers lowers) except -1:
        """List the lowers of a directory, if they are small and readable."""
        cdef Entries names = Entries(lowers.lowers)
        cdef Py_ssize_t index
        cdef Place place
        cdef stat_t st
        cdef int fd
        try:
            for index, place in enumerate(lowers.lowers):
                fd = self.gate.open_for_listing(place)
                try:
                    if fstat(fd, &st) != 0:
                        raise failure(c_errno)
                    if st.st_size > self.large:
                        return 0
                    place.knows_named(some=names.read(index, fd, whiteouts_by_name=True))
                finally:
                    close(fd)
        except OSError:  # for example a directory with search but no read permission
            return 0
        names.sort()
        lowers.names = names
        self.count += len(names)
        return self.limit()

    def forget(self, parts not None):
        """Forget the names in a merged directory: its lowers have changed."""
        if parts:
            self.drop(parts[-1])

    def clear(self):
        """Forget everything: the lowers have changed."""
        self.kept.clear()
        self.newest = None
        self.count = 0

    cdef int drop(self, Place lowest) except -1:
        cdef Lowers dropped = self.kept.pop(lowest, None)
        if dropped is None:
            return 0
        if dropped is self.newest:
            self.newest = None
        if dropped.names is not None:
            self.count -= len(dropped.names)
        return 0

    cdef int limit(self) except -1:
        """Forget the least recently used directories if there are too many names."""
        while len(self.kept) > 1 and (self.count > self.most_names or len(self.kept) > self.most_directories):
            self.drop(next(iter(self.kept)))
        return 0
