"""The answers to READDIR and READDIRPLUS.

Rules (fs/fuse/readdir.c, parse_dirfile and parse_dirplusfile): see `fuse.protocol.dirents`, whose records these
are byte for byte.

A name without attributes is not looked up where number and type of its directory entry (getdents64) are the
ones to be shown. So a reader may see a name that was removed after the listing began, as readdir(3) permits.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize, PyByteArray_Resize
from libc.errno cimport ESTALE
from libc.string cimport memchr, memcpy, memset

from unionfs.core.node cimport count_lookup
from unionfs.core.directories cimport Listing
from unionfs.core.lookup cimport Names, look_up
from unionfs.core.stats cimport S_IFDIR, failure
from unionfs.core.validity cimport fill_entry
from unionfs.core.wire cimport FUSE_READDIRPLUS, fuse_read_in

from unionfs.core.entries import FIRST_TICKET as _FIRST_TICKET
from unionfs.core.memo import Wanted


cdef uint64_t TICKETS = _FIRST_TICKET

cdef enum:
    # The largest request of the kernel (max_pages); a smaller answer is always valid.
    MOST = 1 << 20
    DIRENT = 24
    ENTRY = 128
    LONGEST = 1024
    ROOT = 1
    # Cookies of ``.`` and ``..``; see `entries.FIRST_HASH`
    DOT = 1
    DOT_DOT = 2
    # d_type (include/linux/fs_types.h)
    DT_CHR = 2
    DT_DIR = 4
    DT_REG = 8

# What is known about the entries of a part
cdef enum:
    UNSEEN
    LOOKED_UP
    PLAIN_BUT_FILES
    PLAIN


cdef class Dirents:
    """The answer to one READDIR or READDIRPLUS, growing entry by entry up to ``limit`` bytes."""

    # size: the number of bytes so far.
    # nodes: those in it, one after the other; each counts a lookup when the answer is sent.

    def __init__(self, limit):
        self.limit = min(limit, MOST)
        self.data = PyByteArray_FromStringAndSize(NULL, self.limit)
        self.nodes = []

    cdef bint fits(self, size_t length, bint plus) noexcept:
        cdef size_t before = DIRENT + ENTRY if plus else DIRENT
        return self.size + ((before + length + 7) & ~<size_t>7) <= self.limit

    cdef char *put(
        self, const char *name, size_t length, uint64_t ino, uint64_t off, uint32_t mode, bint plus
    ) noexcept:
        """Add an entry that fits, with zeros for the fuse_entry_out at its start; returns its address."""
        cdef char *record = PyByteArray_AS_STRING(self.data) + self.size
        cdef char *at = record
        cdef fuse_dirent dirent
        if plus:
            memset(at, 0, ENTRY)
            at += ENTRY
        dirent.ino, dirent.off, dirent.namelen, dirent.type = ino, off, <uint32_t>length, mode >> 12
        memcpy(at, &dirent, DIRENT)
        memcpy(at + DIRENT, name, length)
        at += DIRENT + length
        memset(at, 0, -length & 7)
        self.size += (at - record) + (-length & 7)
        return record

    cdef void put_node(self, const char *name, size_t length, uint64_t off, Attributes found):
        """Add an entry that fits, with its node."""
        cdef fuse_entry_out entry
        fill_entry(&entry, found)
        memcpy(self.put(name, length, found.ino, off, found.stat.st_mode, True), &entry, ENTRY)
        self.nodes.append(found.node)

    def add(self, bytes name not None, ino, off, uint32_t mode, *, bint plus=False):
        """Add an entry without a node, if it fits: returns whether it does. Of ``mode`` only the file type
        counts. ``plus``: for READDIRPLUS. Raises ValueError for an invalid name."""
        if not self.fits(len(name), plus):
            return False
        self.put(valid(name), len(name), ino, off, mode, plus)
        return True

    def add_node(self, bytes name not None, off, Attributes found not None):
        """Add an entry of READDIRPLUS with its node, in the same way."""
        if not self.fits(len(name), True):
            return False
        self.put_node(valid(name), len(name), off, found)
        return True

    cpdef add_dots(self, Node directory, uint64_t off, bint plus):
        """Add ``.`` and ``..`` unless the offset is behind them."""
        cdef Node above = directory if directory.parent is None else directory.parent
        if off < DOT and self.fits(1, plus):
            self.put(b".", 1, directory.ino, DOT, S_IFDIR, plus)
        if off < DOT_DOT and self.fits(2, plus):
            self.put(b"..", 2, above.ino, DOT_DOT, S_IFDIR, plus)

    cdef char *start(self) noexcept:
        """Where the data of the answer is."""
        return PyByteArray_AS_STRING(self.data)

    def packed(self):
        """The data of the answer; it ends the use of this object."""
        PyByteArray_Resize(self.data, self.size)
        self.limit = self.size
        return self.data

    cpdef sent(self, uint64_t unique=0):
        """Count the lookups of the nodes; ``unique``: the number of the request."""
        cdef Node node
        for node in self.nodes:
            count_lookup(node, unique)


cdef const char *valid(bytes name) except NULL:
    if not 0 < len(name) <= LONGEST or memchr(<const char *>name, c'/', len(name)) != NULL:
        raise ValueError(f"{name!r} cannot be the name of a directory entry.")
    return name


cdef class Lister:
    """Adds the names of directories to answers."""

    def __init__(self, NodeTable nodes not None, Search merge not None, unreachable):
        """``unreachable``: number and type of a name whose lookup fails; see `Union.number_of_unreachable`."""
        self.nodes, self.merge, self.unreachable = nodes, merge, unreachable
        self.merged = nodes.root.territory

    cpdef add(self, Node directory, Entries entries, Py_ssize_t first, Dirents answer, bint plus):
        """Add names from the index ``first`` while they fit, with their attributes if ``plus``.

        After an exception the answer cannot be sent.
        """
        if not plus:
            self.add_names(directory, entries, first, answer)
            return
        try:
            self.add_nodes(directory, entries, first, answer)
        except BaseException:
            for node in answer.nodes:
                self.nodes.subtract(node, 0)
            raise

    # -- without attributes ---------------------------------------------------------------------------

    cpdef Py_ssize_t add_names(self, Node directory, Entries entries, Py_ssize_t first, Dirents answer) except -1:
        """Add names from the index ``first`` while they fit; returns the index of the next one."""
        cdef Py_ssize_t index = max(first, 0), count = <Py_ssize_t>entries.count
        cdef const Item *item
        cdef bint merged = directory.territory is self.merged
        cdef Node known
        cdef dict children = directory.children
        cdef bytearray parts = bytearray(len(entries.parts))
        cdef uint64_t ino
        cdef uint32_t mode
        cdef bint wants = False
        while index < count:
            item = &entries.items[index]
            if not answer.fits(item.length, False):
                break
            known = children.get(entries.name_of(index)) if merged and children else None
            if known is not None:
                ino, mode = known.ino, known.kind
            elif merged and self.is_plain(entries, item, parts):
                ino, mode = item.ino, <uint32_t>item.kind << 12
            else:
                try:
                    found = self.number(directory, entries.name_of(index))
                except Wanted:
                    found, wants = (1, 0), True
                ino, mode = (0, 0) if found is None else found
            if ino:
                answer.put(entries.text_of(index), item.length, ino, entries.cookie_of(index), mode, False)
            index += 1
        if wants:
            raise Wanted
        return index

    cdef object number(self, Node directory, bytes name):
        """Number and file type of a name; None: it is not listed."""
        try:
            found = directory.territory.number(directory, name)
        except OSError:
            return self.unreachable(directory, name)
        return directory.territory.number_of_bare_whiteout(directory, name) if found is None else found

    cdef bint is_plain(self, Entries entries, const Item *item, bytearray parts) except -1:
        """Whether a name has number and type of its directory entry; see `NodeTable.number_of`."""
        cdef Place part
        cdef uint8_t state = parts[item.part]
        if item.kind == 0 or item.kind == DT_CHR or item.kind == DT_DIR:
            return False  # unknown, or possibly a whiteout, or possibly merged
        if state == UNSEEN:
            state = parts[item.part] = self.state_of(entries, item.part)
        if state == LOOKED_UP or (state == PLAIN_BUT_FILES and item.kind == DT_REG):
            return False
        if not ROOT < item.ino < self.nodes.plain_limit or self.nodes.by_id.has(item.ino):
            return False
        if not self.nodes.unstored and not self.nodes.by_inode:
            return True
        key = self.nodes.plain_device, item.ino
        return key not in self.nodes.unstored and key not in self.nodes.by_inode

    cdef int state_of(self, Entries entries, Py_ssize_t index) except -1:
        cdef Place part = entries.parts[index]
        cdef bint hides = False
        if part.impure or part.layer.permissions is not None or not part.layer.keeps_numbers:
            return LOOKED_UP
        if entries.devices[index] != self.nodes.plain_device:
            return LOOKED_UP
        if part.layer.is_upper or len(entries.parts) > 1:
            try:
                hides = self.merge.hides_xattr_whiteouts(entries.parts, part, self.merge.gate.fd(part))
            except OSError:
                return LOOKED_UP
        return PLAIN_BUT_FILES if hides else PLAIN

    # -- with attributes ------------------------------------------------------------------------------

    cpdef Py_ssize_t add_nodes(self, Node directory, Entries entries, Py_ssize_t first, Dirents answer) except -1:
        """Look up names from the index ``first`` and add them while they fit; returns the index of the next
        one. Calls on slow layers are wanted for all of them at once."""
        cdef bint wants = False
        cdef Py_ssize_t index = max(first, 0), count = <Py_ssize_t>entries.count
        cdef const Item *item
        cdef bytes name
        cdef Attributes found
        while index < count:
            item = &entries.items[index]
            if not answer.fits(item.length, True):
                break
            name = entries.name_of(index)
            unknown = None
            try:
                try:
                    found = look_up(directory, name, item.part if entries.is_new else 0)
                except OSError:
                    found, unknown = None, self.unreachable(directory, name)
                else:
                    if found is None:
                        unknown = directory.territory.number_of_bare_whiteout(directory, name)
            except Wanted:
                answer.put(name, item.length, 0, 0, 0, True)
                wants, index = True, index + 1
                continue
            if found is not None:
                answer.put_node(name, item.length, entries.cookie_of(index), found)
            elif unknown is not None:
                # It counts no lookup; the next request for it reports the error.
                answer.put(name, item.length, unknown[0], entries.cookie_of(index), unknown[1], True)
            index += 1
        if wants:
            raise Wanted
        return index


cdef class ListingRequests:
    """Answers READDIR and READDIRPLUS of merged directories that are quickly read; others are left to Python."""

    def __init__(self, NodeTable nodes not None, Lister lister not None, KeptListings kept not None):
        self.nodes, self.lister, self.kept = nodes, lister, kept

    cdef Dirents answer(self, const fuse_in_header *header, const char *body, size_t size):
        """The answer, whose nodes count their lookups when it is sent; None: Python must answer. Raises
        ``OSError``."""
        cdef const fuse_read_in *given = <const fuse_read_in *>body
        cdef bint plus = header.opcode == FUSE_READDIRPLUS
        cdef Node node = self.nodes.found(header.nodeid)
        cdef Entries entries
        cdef Dirents answer
        cdef Py_ssize_t first
        if size < sizeof(fuse_read_in) or given.offset >= TICKETS:
            return None
        if node is None:
            raise failure(ESTALE)
        if node.children is None or not isinstance(node.territory, Names):
            return None
        answer = Dirents(given.size)
        if node.unlinked:
            return answer
        entries = self.entries(node, given.offset)
        if entries is None:
            return None
        answer.add_dots(node, given.offset, plus)
        first = entries.first_after(given.offset)
        self.lister.add(node, entries, first, answer, plus)
        if first == <Py_ssize_t>entries.count or not answer.size:
            self.kept.drop(node.id)
        return answer

    cdef Entries entries(self, Node node, uint64_t offset):
        """The names of a directory, made anew for the first request of a reader; None: Python must read them."""
        cdef Entries entries = None if offset == 0 else self.kept.kept(node.id)
        cdef Listing listing
        if entries is not None:
            return entries
        listing = Listing(self.lister.merge.gate, node.parts, merged=True)
        if listing.large:
            listing.close()
            return None
        entries = listing.entries()
        if entries.same():
            return None  # they get tickets
        self.kept.keep(node.id, entries)
        return entries
