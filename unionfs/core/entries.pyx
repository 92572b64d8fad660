"""The names of a directory, in the order of their hashes, read with getdents64(2).

The names stay C structures and one block of text: 24 bytes, the name and a NUL each. The records come from a
layer, which may be served by another user's process: a record is used only after its length is checked.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EINTR, EIO, ENOENT, ENOMEM
from libc.errno cimport errno as c_errno
from libc.stdint cimport UINT32_MAX
from libc.stdlib cimport free, realloc
from libc.string cimport memchr, memcmp, memcpy

from unionfs.core.layercalls cimport entries_of, fstat
from unionfs.core.memo cimport may_ask
from unionfs.core.stats cimport failure, stat_t

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_getdents64

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef extern from "<stdlib.h>" nogil:
    ctypedef int (*compare_t)(const void *one, const void *other, void *text)
    void qsort_r(void *base, size_t count, size_t size, compare_t compare, void *text)

#: The first cookie of a name: those below are of the start, ``.`` and ``..``.
FIRST_HASH = 3
#: Cookies from here on are tickets, not hashes; see `union.tickets`.
FIRST_TICKET = (1 << 31) - (1 << 24)
#: The longest name in bytes: with a longer one the kernel fails the whole listing (FUSE_NAME_MAX).
NAME_MAX = 1024

cdef enum:
    C_FIRST_HASH = 3
    HASHES = 0x7F000000 - 3
    C_NAME_MAX = 1024
    # struct linux_dirent64 (fs/readdir.c): d_ino, d_off, d_reclen, d_type, then d_name with its NUL
    RECLEN_AT = 16
    TYPE_AT = 18
    NAME_AT = 19
    BUFFER = 32 * 1024
    # `.nfs`, an inode number in 16 digits and a count in 8; see `union.listing`
    NFS_REMOVED = 28
    # Rules of a directory
    WHITEOUTS_BY_NAME = 1
    HIDES_REMOVED = 2
    # Results of `parse`: an error is a negative errno.
    SOME_BY_NAME = 1
    # d_type (include/linux/fs_types.h)
    DT_SOCK = 12


cdef uint32_t hash_of(const char *name, size_t length) noexcept nogil:
    """A cookie: FNV-1a, and the last mixing of MurmurHash3, because FNV's high bits are weak."""
    cdef uint64_t value = 0xCBF29CE484222325u
    cdef size_t index
    for index in range(length):
        value = (value ^ <uint8_t>name[index]) * 0x100000001B3u
    value = (value ^ (value >> 33)) * 0xFF51AFD7ED558CCDu
    value = (value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53u
    value ^= value >> 33
    return <uint32_t>(value % HASHES) + C_FIRST_HASH


cdef int compare_names(const Item *one, const Item *other, const char *text) noexcept nogil:
    """As bytes are ordered in Python."""
    cdef int found = memcmp(text + one.at, text + other.at, min(one.length, other.length))
    return found if found else <int>one.length - <int>other.length


cdef int compare(const void *one_, const void *other_, void *text) noexcept nogil:
    """The order of the listing; the topmost part of one name comes first, and of a part what is looked up."""
    cdef const Item *one = <const Item *>one_
    cdef const Item *other = <const Item *>other_
    if one.hash != other.hash:
        return 1 if one.hash > other.hash else -1
    cdef int found = compare_names(one, other, <const char *>text)
    if found:
        return found
    if one.part != other.part:
        return 1 if one.part > other.part else -1
    return <int>one.kind - <int>other.kind


cdef bint is_removed(const char *name, size_t length) noexcept nogil:
    """Whether it is an NFS client's name for a removed file with an open fd."""
    cdef size_t index
    if length != NFS_REMOVED or memcmp(name, b".nfs", 4) != 0:
        return False
    for index in range(4, length):
        if memchr(b"0123456789abcdef", name[index], 16) == NULL:
            return False
    return True


cdef bint is_dot(const char *name, size_t length) noexcept nogil:
    return name[0] == c'.' and (length == 1 or (length == 2 and name[1] == c'.'))


cdef class Entries:
    """The possibly visible names of one directory. Readers look each name up: some may not exist."""

    # parts: the real directories that it is merged from, topmost first, as they were when it was read.
    # is_new: whether it was made for the current request, so that the part of a name is the topmost one still.

    def __init__(self, list parts not None):
        self.parts = parts
        self.is_new = True
        self.tickets = {}
        self.devices = <uint64_t *>realloc(NULL, (len(parts) + 1) * sizeof(uint64_t))
        if self.devices == NULL or len(parts) > 0xFFFF:
            raise MemoryError

    def __dealloc__(self):
        free(self.items)
        free(self.text)
        free(self.devices)

    def __len__(self):
        return <Py_ssize_t>self.count

    cpdef later(self):
        """Record that other requests were served since it was made."""
        self.is_new = False

    # -- reading --------------------------------------------------------------------------------------

    def read(self, Py_ssize_t part, int fd, *, bint whiteouts_by_name=False, bint hides_removed=False):
        """Add the names in the part with that index, a real directory open as ``fd``. Returns whether it has
        whiteouts by name, which count as the names they hide.

        ``hides_removed``: leave out an NFS client's names for removed files. Raises ``OSError``, EIO for an
        invalid record.
        """
        cdef stat_t st
        cdef char buffer[BUFFER]
        cdef long size = 1
        cdef int found = 0, some = 0, rules = WHITEOUTS_BY_NAME if whiteouts_by_name else 0
        rules |= HIDES_REMOVED if hides_removed else 0
        if not 0 <= part < len(self.parts):
            raise IndexError(part)
        if fstat(fd, &st) != 0:
            raise failure(c_errno)
        self.devices[part] = st.st_dev
        if may_ask(fd):
            for piece in entries_of(fd):
                found = self.parse(piece, <size_t>len(piece), <uint16_t>part, rules)
                if found < 0:
                    raise failure(-found)
                some |= found
            return some > 0
        with nogil:
            while size > 0 and found >= 0:
                size = syscall(SYS_getdents64, fd, <char *>buffer, <size_t>BUFFER)
                if size < 0 and c_errno == EINTR:
                    size = 1
                elif size < 0 and c_errno != ENOENT:  # a removed directory has no names
                    found = -c_errno
                elif size > 0:
                    found = self.parse(buffer, <size_t>min(size, <long>BUFFER), <uint16_t>part, rules)
                    some |= found
        if found < 0:
            raise failure(-found)
        return some > 0

    def add_records(self, Py_ssize_t part, bytes records not None, *, bint whiteouts_by_name=False):
        """Like :meth:`read`, with the bytes of the records, for tests."""
        cdef int found
        if not 0 <= part < len(self.parts):
            raise IndexError(part)
        found = self.parse(records, len(records), <uint16_t>part, WHITEOUTS_BY_NAME if whiteouts_by_name else 0)
        if found < 0:
            raise failure(-found)
        return found > 0

    cdef int parse(self, const char *buffer, size_t size, uint16_t part, int rules) noexcept nogil:
        """Add the names of struct linux_dirent64 records."""
        cdef size_t at = 0, length
        cdef uint16_t record
        cdef uint64_t ino
        cdef const char *name
        cdef const char *end
        cdef uint8_t kind
        cdef int failed, some = 0
        while at < size:
            if size - at <= NAME_AT:
                return -EIO
            memcpy(&record, buffer + at + RECLEN_AT, sizeof(record))
            if record <= NAME_AT or record > size - at:
                return -EIO
            name = buffer + at + NAME_AT
            end = <const char *>memchr(name, 0, record - NAME_AT)
            if end == NULL or end == name or end - name > C_NAME_MAX or memchr(name, c'/', end - name) != NULL:
                return -EIO
            length = end - name
            memcpy(&ino, buffer + at, sizeof(ino))
            kind = <uint8_t>buffer[at + TYPE_AT]
            at += record
            if is_dot(name, length) or (rules & HIDES_REMOVED and is_removed(name, length)):
                continue
            if rules & WHITEOUTS_BY_NAME and length >= 4 and memcmp(name, b".wh.", 4) == 0:
                some = SOME_BY_NAME
                name, length = name + 4, length - 4
                if length == 0 or is_dot(name, length) or (length >= 4 and memcmp(name, b".wh.", 4) == 0):
                    continue
                failed = self.add(name, length, 0, 0, part)
            else:
                failed = self.add(name, length, ino, kind if kind <= DT_SOCK else 0, part)
            if failed:
                return -failed
        return some

    cdef int add(
        self, const char *name, size_t length, uint64_t ino, uint8_t kind, uint16_t part
    ) noexcept nogil:
        """Returns an errno."""
        cdef size_t room
        cdef void *larger
        if self.count == self.room:
            room = self.room * 2 if self.room else 32
            larger = realloc(self.items, room * sizeof(Item))
            if larger == NULL:
                return ENOMEM
            self.items, self.room = <Item *>larger, room
        if self.text_room - self.used <= length:
            room = (self.text_room + length) * 2 if self.text_room else 1024 + length
            if room > UINT32_MAX:
                return ENOMEM
            larger = realloc(self.text, room)
            if larger == NULL:
                return ENOMEM
            self.text, self.text_room = <char *>larger, room
        memcpy(self.text + self.used, name, length)
        self.text[self.used + length] = 0
        cdef Item *item = &self.items[self.count]
        item.ino, item.kind, item.part = ino, kind, part
        item.hash = hash_of(name, length)
        item.at, item.length = <uint32_t>self.used, <uint16_t>length
        self.used += length + 1
        self.count += 1
        return 0

    def order(self, hashed=None):
        """Bring the names, all of which were read, into order, each one once.

        ``hashed``: another hash of names, for tests.
        """
        cdef Py_ssize_t index
        if hashed is not None:
            for index in range(<Py_ssize_t>self.count):
                self.items[index].hash = hashed(self.name_of(index)) % HASHES + C_FIRST_HASH
        if self.count:
            with nogil:
                self.sort()
                self.drop_doubles()
        return self

    cdef void sort(self) noexcept nogil:
        """Bring the names into order; a name that several parts have stays with each of them."""
        if self.count:
            qsort_r(self.items, self.count, sizeof(Item), compare, self.text)

    cdef list parts_with(self, bytes name):
        """The parts that have a name, topmost first, after :meth:`sort`."""
        cdef list found = []
        cdef uint32_t hash_ = hash_of(name, len(name))
        cdef size_t index = self.first_after(<uint64_t>hash_ - 1)
        cdef const Item *item
        cdef Py_ssize_t last = -1
        while index < self.count and self.items[index].hash == hash_:
            item = &self.items[index]
            # A part may have a whiteout by name beside the object.
            if item.part != last and item.length == len(name) and (
                memcmp(self.text + item.at, <const char *>name, item.length) == 0
            ):
                last = item.part
                found.append(self.parts[last])
            index += 1
        return found

    cdef void drop_doubles(self) noexcept nogil:
        """Of a name keep the first, and return unused memory."""
        cdef size_t kept = 0, index
        cdef void *smaller
        for index in range(1, self.count):
            if (
                self.items[index].hash == self.items[kept].hash
                and compare_names(&self.items[index], &self.items[kept], self.text) == 0
            ):
                continue
            kept += 1
            self.items[kept] = self.items[index]
        self.count = kept + 1
        smaller = realloc(self.items, self.count * sizeof(Item))
        if smaller != NULL:
            self.items, self.room = <Item *>smaller, self.count
        smaller = realloc(self.text, self.used)
        if smaller != NULL:
            self.text, self.text_room = <char *>smaller, self.used

    # -- positions ------------------------------------------------------------------------------------

    cpdef list same(self):
        """The indices of the names with the hash of the next name, which need tickets."""
        cdef Py_ssize_t index, last = <Py_ssize_t>self.count - 1
        return [index for index in range(last) if self.items[index].hash == self.items[index + 1].hash]

    def has_ticket(self, Py_ssize_t index, ticket):
        """Set the cookie of a name that shares its hash."""
        self.tickets[index] = ticket

    cpdef Py_ssize_t first_after(self, uint64_t hash_, bytes name=None) except -1:
        """The index of the first name after all names with that hash; or, with ``name``, after that one of
        them, whether it exists or not."""
        cdef Py_ssize_t low = 0, high = <Py_ssize_t>self.count, middle
        cdef const Item *item
        cdef bint behind
        while low < high:
            middle = (low + high) // 2
            item = &self.items[middle]
            if item.hash != hash_ or name is None:
                behind = item.hash > hash_
            else:
                behind = self.name_of(middle) > name
            if behind:
                high = middle
            else:
                low = middle + 1
        return low

    cdef const char *text_of(self, Py_ssize_t index) noexcept:
        return self.text + self.items[index].at

    cdef bytes name_of(self, Py_ssize_t index):
        return PyBytes_FromStringAndSize(self.text + self.items[index].at, self.items[index].length)

    cdef uint64_t cookie_of(self, Py_ssize_t index) except 0:
        if self.tickets:
            ticket = self.tickets.get(index)
            if ticket is not None:
                return ticket
        return self.items[index].hash

    cdef Py_ssize_t checked(self, Py_ssize_t index) except -1:
        if not 0 <= index < <Py_ssize_t>self.count:
            raise IndexError(index)
        return index

    def name(self, Py_ssize_t index):
        """A name."""
        return self.name_of(self.checked(index))

    def hash(self, Py_ssize_t index):
        """The hash of a name."""
        return self.items[self.checked(index)].hash

    def cookie(self, Py_ssize_t index):
        """The offset at which to continue after a name."""
        return self.cookie_of(self.checked(index))

    def part(self, Py_ssize_t index):
        """The index of the topmost part that has a name."""
        return self.items[self.checked(index)].part

    def names(self):
        """All names in order."""
        cdef Py_ssize_t index
        return [self.name_of(index) for index in range(<Py_ssize_t>self.count)]
