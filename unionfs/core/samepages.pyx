"""Pages of memory that daemons forked from one process have in common become one.

A forked process has its own copy of each page that it or its parent writes to, if only a reference count that is
restored afterwards. Most of these pages have the same content in all daemons once their mounts are usable, because all
of them have done the same. So the first daemon writes its pages to a *pattern*, a file in memory that the parent has
created, and seals it against changes. Each daemon maps the pattern's page in place of its own page, privately, if both
have the same content. The next write to it copies it again.

The pattern is not trusted: a page of it counts only where its content, which nobody can change any more, is that of
the own page. Its offsets are addresses. Sources: Documentation/admin-guide/mm/pagemap.rst, memfd_create(2).
"""

import fcntl
import os

from libc.errno cimport errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memcmp
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport pread, pwrite

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    enum: SIG_SETMASK
    int sigfillset(sigset_t *signals)

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    pthread_t pthread_self()
    int pthread_sigmask(int how, const sigset_t *new, sigset_t *old)

cdef enum:
    PAGE = 4096
    # Entries of pagemap that are read at once.
    BATCH = 512
    PRESENT = 63
    OF_A_FILE = 61  # or of shared memory
    EXCLUSIVE = 56  # mapped once
    # What the kernel and libc write to at any time (errno, rseq) lies around the thread pointer.
    OWN = 64 * 1024

# Larger mappings do not belong to an interpreter, but are the shadow memory of a sanitizer.
_LARGEST = 1 << 30
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
# Above all addresses.
_SIZE = 1 << 47


cdef class _Area:
    # An interval of addresses without holes; writable, private memory.

    cdef uintptr_t start, end

    def __cinit__(self, start, end):
        self.start, self.end = start, end


def _memory():
    """The memory that this process may have written to, but not its stack."""
    found, own = [], <uintptr_t>pthread_self()
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            place, rights, *_ = words = line.split()
            if rights != b"rw-p" or words[-1].startswith(b"[") and words[-1] != b"[heap]":
                continue
            start, end = (int(word, 16) for word in place.split(b"-"))
            if end - start <= _LARGEST:
                found += [(start, min(end, own - OWN)), (max(start, own + OWN), end)]
    # Whole pages.
    found = [(start & -PAGE, end & -PAGE) for start, end in found]
    return [_Area(start, end) for start, end in found if start < end]


cdef class SamePages:
    """The pattern of the daemons that are forked from this process from now on."""

    cdef readonly int fd
    cdef list areas

    def __init__(self):
        """Raises ``OSError``, also where pages are not 4 KiB."""
        if os.sysconf("SC_PAGE_SIZE") != PAGE:
            raise OSError("the pages of this machine have another size")
        self.areas = _memory()
        self.fd = os.memfd_create("unionfs-pages", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, _SIZE)

    def close(self):
        os.close(self.fd)

    def begin(self):
        """Write the pattern if there is none. Returns whether there is one. Raises ``OSError``.

        Call it in a daemon whose memory the others' will resemble.
        """
        cdef _Area area
        if not self._sealed():
            # Of a daemon that was killed meanwhile, parts may be there.
            try:
                fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if not self._sealed():
                os.ftruncate(self.fd, 0)
                os.ftruncate(self.fd, _SIZE)
                with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
                    for area in self.areas:
                        write(self.fd, pagemap.fileno(), area.start, area.end)
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        return True

    cdef bint _sealed(self):
        return fcntl.fcntl(self.fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS

    def adopt(self):
        """Yield after each part of the memory: the number of pages that have become the pattern's.

        Raises ``OSError``. While it runs, no other thread may exist, which could write to a page meanwhile.
        """
        cdef _Area area
        cdef void *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)
        if page == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
                fd = pagemap.fileno()
                for area in self.areas:
                    start = area.start
                    while start < area.end:
                        end = min(start + BATCH * PAGE, area.end)
                        yield adopt(self.fd, fd, start, end, page)
                        start = end
        finally:
            munmap(page, PAGE)


cdef bint own(uint64_t entry) noexcept nogil:
    """Whether a page is there for this process alone."""
    return entry >> PRESENT and not entry >> OF_A_FILE & 1 and entry >> EXCLUSIVE & 1


cdef int write(int fd, int pagemap, uintptr_t start, uintptr_t end) except -1:
    """Write the own pages between two addresses to the pattern."""
    cdef uint64_t entries[BATCH]
    cdef ssize_t size, number
    while start < end:
        size = pread(pagemap, entries, min(<uintptr_t>BATCH, (end - start) // PAGE) * sizeof(uint64_t), start // PAGE * 8)
        if size <= 0:
            raise OSError(errno, os.strerror(errno))
        for number in range(size // 8):
            if own(entries[number]) and pwrite(fd, <void *>start, PAGE, start) != PAGE:
                raise OSError(errno, os.strerror(errno))
            start += PAGE
    return 0


cdef long adopt(int fd, int pagemap, uintptr_t start, uintptr_t end, void *page) except -1:
    """Map the pattern's pages between two addresses, at most BATCH, over own ones with the same content.

    ``page``: shared memory, for one page. Nothing but that and the stack may be written between the comparison of a
    page and the mapping.
    """
    cdef uint64_t entries[BATCH]
    cdef sigset_t all, before
    cdef uintptr_t address, first = 0, last = 0
    cdef long found = 0
    cdef int failed = 0
    cdef ssize_t number, size = pread(pagemap, entries, (end - start) // PAGE * sizeof(uint64_t), start // PAGE * 8)
    if size < 0:
        raise OSError(errno, os.strerror(errno))
    with nogil:
        sigfillset(&all)
        pthread_sigmask(SIG_SETMASK, &all, &before)
        for number in range(size // 8 + 1):
            address = start + number * PAGE
            if (
                number < size // 8 and own(entries[number]) and pread(fd, page, PAGE, address) == PAGE
                and memcmp(page, <void *>address, PAGE) == 0
            ):
                if first == 0:
                    first = address
                last = address + PAGE
            elif first != 0:
                if mmap(
                    <void *>first, last - first, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, first
                ) == MAP_FAILED:
                    failed = errno
                    break
                found += (last - first) // PAGE
                first = 0
        pthread_sigmask(SIG_SETMASK, &before, NULL)
    if failed:
        raise OSError(failed, os.strerror(failed))
    return found
