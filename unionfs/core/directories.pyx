"""Reading real directories, and the listings that are being read."""

from libc.errno cimport errno as c_errno

from unionfs.core.layercalls cimport fstat
from unionfs.core.marks cimport close
from unionfs.core.memo cimport may_ask
from unionfs.core.places cimport Place
from unionfs.core.stats cimport failure, stat_t

#: A directory larger than this (bytes on its filesystem) takes long to read.
LARGE = 64 * 1024

cdef enum:
    C_LARGE = 64 * 1024


cdef class Listing:
    """The names in some real directories. It owns its fds, so any thread may read it, once."""

    # large: whether reading takes so long that it is done in a thread.
    # merged: whether the directories are merged, so that whiteouts by name count as the names they hide.

    def __init__(self, Gate gate not None, parts, *, bint merged=False):
        """Open the directories. Raises ``OSError``."""
        self.parts, self.fds, self.merged = list(parts), [], merged
        try:
            self.open(gate)
        except BaseException:
            self.close()
            raise

    cdef int open(self, Gate gate) except -1:
        cdef Place part
        cdef stat_t st
        cdef int fd
        cdef bint slow = False
        for part in self.parts:
            fd = gate.open_for_listing(part)
            self.fds.append(fd)
            if fstat(fd, &st) != 0:
                raise failure(c_errno)
            self.large = self.large or st.st_size > C_LARGE
            slow = slow or may_ask(fd)
        self.large = self.large and not slow  # that is read by the calls that `memo` puts aside
        return 0

    @property
    def hides_removed(self):
        """Whether an NFS client's names for removed files are left out of the first directory, the upper's."""
        cdef Place top
        if not self.merged or not self.parts:
            return False
        top = self.parts[0]
        return top.layer.is_upper and top.layer.links_of_removed > 0

    cpdef Entries entries(self, hashed=None):
        """Every possibly visible name in the order of its hash; closes the fds.

        For callers that look each name up anyway: names are not examined here. ``hashed``: see
        `Entries.order`. Raises ``OSError``.
        """
        cdef Entries found = Entries(self.parts)
        cdef Place part
        cdef Py_ssize_t index = 0
        cdef int fd
        cdef bint some
        try:
            for part, fd in zip(self.parts, self.fds, strict=True):
                some = found.read(
                    index, fd, whiteouts_by_name=self.merged, hides_removed=index == 0 and self.hides_removed
                )
                index += 1
                if self.merged:
                    part.knows_named(some=some)
            return found.order(hashed)
        finally:
            self.close()

    def names(self):
        """Every visible name once; closes the fds. Raises ``OSError``."""
        return self.entries().names()

    def close(self):
        """Close the fds."""
        while self.fds:
            close(self.fds.pop())


cdef class KeptListings:
    """The listings being read, by the id of their directory, limited by the number of names; the oldest are
    dropped, and made again if they are needed."""

    def __init__(self, Py_ssize_t most=200_000):
        self.by_id, self.most = {}, most

    def __len__(self):
        return len(self.by_id)

    cpdef Entries kept(self, uint64_t id_):
        """The listing, for a further request; None if there is none."""
        cdef Entries found = self.by_id.get(id_)
        if found is not None:
            found.later()
        return found

    cpdef keep(self, uint64_t id_, Entries entries):
        """Keep a listing for further requests."""
        self.drop(id_)
        self.by_id[id_] = entries
        self.names += len(entries)
        while self.names > self.most and len(self.by_id) > 1:
            self.drop(next(iter(self.by_id)))

    cpdef drop(self, uint64_t id_):
        """Drop the listing, if there is one: a reader reached the end, or it is outdated."""
        entries = self.by_id.pop(id_, None)
        if entries is not None:
            self.names -= len(entries)
