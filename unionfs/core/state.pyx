"""What another daemon needs to take a mount over: nodes, open files, and the change in progress.

It is kept in memory that outlives this process (memfd_create(2)): a head, a text (JSON, and the command that
starts a daemon), a table of open files, and one of nodes. A node's record has its id, its parent's, its name, and
how often it was looked up; what its object is, the layers tell. Nothing is read by this process but when it takes
over, and a record changes by a few stores; a process that is killed has made those before and none after.

- A record is written before its id, and its id is cleared first.
- A name that changes is written while `Change` describes the change, which is repeated by the next daemon.
- A text that does not fit a record continues in other slots.
- Free slots and handles are linked by `more` and `backing_id`, for this process alone.

The file is sparse: it takes the memory of the slots that were used.
"""

import os

from libc.string cimport memcmp, memcpy, memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap as map_file, munmap

cdef extern from *:
    """
    #define STORED(place, value) __atomic_store_n(&(place), (value), __ATOMIC_SEQ_CST)
    """
    void STORED(uint64_t place, uint64_t value) noexcept nogil
    void STORED_KIND "STORED" (uint32_t place, uint32_t value) noexcept nogil
    void STORED_PID "STORED" (int32_t place, int32_t value) noexcept nogil

cdef extern from "<sys/mman.h>" nogil:
    int MAP_NORESERVE

VERSION = 4
"""Of the layout and the meaning of the records; a daemon takes over only its own."""

RESTRICTIONS = ("ro", "nosuid", "nodev", "noexec")
"""Options of a mount that may have come with a remount, and stay when it is mounted anew."""

cdef enum:
    C_VERSION = 4
    TEXT = 8192
    HANDLES = 16 << 20
    MOST_HANDLES = 1 << 20
    SLOTS = HANDLES + MOST_HANDLES * 32
    MOST_SLOTS = 1 << 26
    # Of `Head.device` without an fd; the holder knows them as negative
    ANEW = -1
    OFF = -2  # less one bit for each of RESTRICTIONS

cdef uint64_t LOW = (<uint64_t>1 << 63) - 1
cdef size_t SIZE = SLOTS + <size_t>MOST_SLOTS * 64
cdef const char *MAGIC = b"unionfs"


class StateError(Exception):
    """It cannot be used; the text is a clause."""


cdef class State:
    """The records of one mount."""

    def __init__(self, fd=None):
        """``fd``: of an existing one, which is taken over. Raises ``StateError``, ``OSError``."""
        if sizeof(Record) != 64 or sizeof(More) != 64 or sizeof(HandleRecord) != 32 or sizeof(Head) > TEXT:
            raise StateError("its records have another size on this machine")
        new = fd is None
        self.fd = os.memfd_create("unionfs-state", os.MFD_CLOEXEC) if new else fd
        if new:
            os.ftruncate(self.fd, SIZE)
        elif os.fstat(self.fd).st_size != <Py_ssize_t>SIZE:
            raise StateError("it has another size")
        cdef void *mapped = map_file(
            NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, self.fd, 0
        )
        if mapped == MAP_FAILED:
            raise MemoryError
        self.base = <char *>mapped
        self.head = <Head *>self.base
        self.handles = <HandleRecord *>(self.base + HANDLES)
        self.slots = <Record *>(self.base + SLOTS)
        if new:
            memcpy(self.head.magic, MAGIC, 8)
            # Slot 0 and handle 0 are none.
            self.head.version, self.head.slots, self.head.handles = C_VERSION, 1, 1
        elif memcmp(self.head.magic, MAGIC, 8) != 0 or self.head.version != C_VERSION:
            raise StateError(f"it has version {self.head.version}, and this is {VERSION}")
        else:
            self.find_free()

    def __dealloc__(self):
        if self.base != NULL:
            munmap(self.base, SIZE)

    def close(self):
        """Close the fd; what is mapped stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # -- for the daemon and the holder ----------------------------------------------------------------

    @property
    def address(self):
        """Where it is mapped."""
        return <size_t>self.base

    @property
    def text(self):
        """A text that the daemon keeps in it."""
        return (self.base + TEXT)[:self.head.text]

    def keep(self, bytes text not None, command, variables, limit):
        """Set the text, and the command and the environment (bytes) that start a daemon, at most ``limit`` times a
        minute. Raises ``StateError``."""
        cdef bytes words = b"".join([word + b"\0" for word in command])
        cdef bytes more = b"".join([word + b"\0" for word in variables])
        cdef bytes whole = text + words + more
        if len(whole) > HANDLES - TEXT:
            raise StateError("the settings are too long")
        self.head.text = <uint32_t>len(text)
        self.head.arguments, self.head.variables = <uint32_t>len(words), <uint32_t>len(more)
        self.head.limit = min(max(limit, 1), DEATHS) if limit else 0
        memcpy(self.base + TEXT, <const char *>whole, len(whole))

    def has_holder(self, holder, device):
        """That holder, a pid, is in charge from now on; ``device``: the fd of /dev/fuse; -1: the next daemon mounts
        anew."""
        self.head.device = device
        STORED_PID(self.head.holder, holder)

    @property
    def holder(self):
        """The pid of the holder in charge; 0: none."""
        return self.head.holder

    def takes_off(self, options):
        """The mount of a dead daemon, which is to be mounted anew, is about to be unmounted; ``options``: what it was
        mounted with, of which `RESTRICTIONS` are kept."""
        if self.head.device == ANEW:
            self.head.device = OFF - sum(1 << bit for bit, name in enumerate(RESTRICTIONS) if name in options)

    @property
    def is_off(self):
        """Whether a mount that is to be mounted anew was unmounted for that."""
        return self.head.device <= OFF

    @property
    def restrictions(self):
        """Which of `RESTRICTIONS` it had then."""
        cdef int bits = OFF - self.head.device if self.is_off else 0
        return tuple([name for bit, name in enumerate(RESTRICTIONS) if bits >> bit & 1])

    def end(self):
        """The daemon ends on purpose, so the holder must not start another one."""
        self.head.ended = 1

    def exchange(self):
        """The daemon ends on purpose for another one."""
        self.head.exchanged = 1

    def exchanges(self, uint64_t unique):
        """A request is about to exchange two names."""
        self.head.exchange_done = 0
        self.head.exchange_of = unique & LOW

    def has_exchanged(self, uint64_t unique):
        """Whether a request, which is sent again, has exchanged them."""
        return self.head.exchange_done != 0 and self.head.exchange_of == unique & LOW

    def changes_xattr(self, uint64_t unique, bint existed):
        """A request is about to add or remove an xattr, which ``existed`` before or not."""
        self.head.xattr_of = 0
        self.head.xattr_existed = existed
        STORED(self.head.xattr_of, unique & LOW)

    def xattr_existed(self, uint64_t unique):
        """Whether it existed before a request, which is sent again, was to add or remove it; None: that had not
        begun."""
        known = is_resent(unique) and self.head.xattr_of == unique & LOW
        return bool(self.head.xattr_existed) if known else None

    @property
    def is_full(self):
        """Whether there was no room for a record, so that no other daemon can take over."""
        return self.head.full != 0

    @property
    def died(self):
        """How many daemons died, and whether the last of them did too often."""
        return self.head.died, bool(self.head.failed)

    @property
    def memory(self):
        """The memory that it takes."""
        return os.fstat(self.fd).st_blocks * 512

    def files(self):
        """The fds of objects without a name."""
        cdef uint32_t slot
        found = {self.head.change.held} if self.head.change.kind else set()
        for slot in range(1, self.head.slots):
            if self.slots[slot].id and self.slots[slot].flags & UNLINKED:
                found.add(self.slots[slot].held)
        found.discard(-1)
        return found

    def __len__(self):
        """The number of nodes."""
        cdef uint32_t slot
        return sum([1 for slot in range(1, self.head.slots) if self.slots[slot].id])

    # -- slots ----------------------------------------------------------------------------------------

    cdef uint32_t take_slot(self) noexcept:
        cdef uint32_t slot = self.free_slot
        if slot:
            self.free_slot = self.slots[slot].more
            return slot
        if self.head.slots == MOST_SLOTS:
            self.head.full = 1
            return 0
        slot = self.head.slots
        self.head.slots += 1
        return slot

    cdef void give_back(self, uint32_t slot) noexcept:
        memset(&self.slots[slot], 0, sizeof(Record))
        self.slots[slot].more = self.free_slot
        self.free_slot = slot

    def find_free(self):
        """Find the free slots and handles: those that no record uses."""
        cdef uint32_t slot, more, number
        cdef bytearray used = bytearray(self.head.slots)
        for slot in range(1, self.head.slots):
            if not self.slots[slot].id:
                continue
            used[slot] = 1
            more = self.slots[slot].more
            while more and more < self.head.slots and not used[more]:
                used[more] = 1
                more = (<More *>&self.slots[more]).more
        self.free_slot = 0
        for slot in range(self.head.slots - 1, 0, -1):
            if not used[slot]:
                self.give_back(slot)
        self.free_handle = 0
        for number in range(self.head.handles - 1, 0, -1):
            if not self.handles[number].number:
                self.handles[number].backing_id, self.free_handle = <int32_t>self.free_handle, number

    # -- nodes ----------------------------------------------------------------------------------------

    cdef Record *add(
        self, uint64_t id_, uint64_t parent, uint32_t generation, uint32_t kind, uint32_t flags, uint64_t ino,
        bytes name
    ) noexcept:
        """A new record; NULL without room."""
        cdef uint32_t slot = self.take_slot()
        cdef Record *record
        if not slot:
            return NULL
        record = &self.slots[slot]
        memset(record, 0, sizeof(Record))
        record.generation, record.kind, record.flags, record.held = generation, <uint8_t>(kind >> 12), flags, -1
        self.write(record, parent, ino, name)
        STORED(record.id, id_)
        return record

    cdef void write(self, Record *record, uint64_t parent, uint64_t ino, bytes name) noexcept:
        """Set parent, name, and the number if that is stored."""
        cdef char text[8 + NAME_SIZE]
        cdef size_t size = 0, at, piece
        cdef uint32_t first = 0, slot, old = record.more
        cdef More *last = NULL
        record.flags &= ~PARTS  # of the former name
        if record.flags & FIXED:
            memcpy(text, &ino, 8)
            size = 8
        memcpy(text + size, <const char *>name, len(name))
        size += len(name)
        at = HERE
        while at < size:
            slot = self.take_slot()
            if not slot:
                break
            memset(&self.slots[slot], 0, sizeof(Record))
            piece = min(<size_t>IN_MORE, size - at)
            memcpy((<More *>&self.slots[slot]).text, text + at, piece)
            if last == NULL:
                first = slot
            else:
                last.more = slot
            last = <More *>&self.slots[slot]
            at += piece
        record.parent, record.more, record.size = parent, first, <uint16_t>size
        memcpy(record.here, text, min(size, <size_t>HERE))
        self.drop_more(old)

    cdef bytes read(self, const Record *record):
        """Number and name as they are stored."""
        cdef bytes text = record.here[:min(<size_t>record.size, <size_t>HERE)]
        cdef uint32_t slot = record.more
        cdef const More *more
        while slot and slot < self.head.slots and <size_t>len(text) < record.size:
            more = <const More *>&self.slots[slot]
            text += more.text[:min(<size_t>IN_MORE, record.size - <size_t>len(text))]
            slot = more.more
        return text

    cdef bytes name_of(self, const Record *record):
        """The name."""
        return self.read(record)[8 if record.flags & FIXED else 0:]

    cdef uint64_t number_of(self, const Record *record) noexcept:
        """The inode number."""
        cdef uint64_t ino = record.id
        if record.flags & FIXED:
            memcpy(&ino, record.here, 8)
        return ino

    cdef void drop(self, Record *record) noexcept:
        STORED(record.id, 0)
        self.drop_more(record.more)
        self.give_back(<uint32_t>(record - self.slots))

    cdef void drop_more(self, uint32_t slot) noexcept:
        cdef uint32_t following
        while slot:
            following = (<More *>&self.slots[slot]).more
            self.give_back(slot)
            slot = following

    # -- open files -----------------------------------------------------------------------------------

    cdef HandleRecord *add_handle(self, uint64_t number, uint64_t node, uint64_t unique, uint32_t flags) noexcept:
        """A new record; NULL without room."""
        cdef uint32_t place = self.free_handle
        cdef HandleRecord *record
        if place:
            self.free_handle = <uint32_t>self.handles[place].backing_id
        elif self.head.handles == MOST_HANDLES:
            self.head.full = 1
            return NULL
        else:
            place = self.head.handles
            self.head.handles += 1
        record = &self.handles[place]
        record.node, record.unique, record.flags, record.backing_id = node, unique & LOW, flags, 0
        if not flags & BACKING_ALONE:
            self.head.last_handle = number
        STORED(record.number, number)
        return record

    cdef uint32_t add_kept(self, uint64_t node, int32_t backing_id) noexcept:
        """Record a backing file that stays registered without an open file; returns its place, 0 without room."""
        cdef HandleRecord *record = self.add_handle(self.head.last_handle + 1, node, 0, BACKING_ALONE)
        if record == NULL:
            return 0
        record.backing_id = backing_id
        return <uint32_t>(record - self.handles)

    cdef void drop_kept(self, uint32_t place) noexcept:
        if place:
            self.drop_handle(&self.handles[place])

    cdef void drop_handle(self, HandleRecord *record) noexcept:
        STORED(record.number, 0)
        record.backing_id, self.free_handle = <int32_t>self.free_handle, <uint32_t>(record - self.handles)

    # -- changes --------------------------------------------------------------------------------------

    cdef void begin(
        self, uint32_t kind, uint64_t parent, bytes name, uint64_t new_parent, bytes new_name, uint64_t node,
        uint64_t target, int held
    ) noexcept:
        """The names of nodes are about to change; ``held``: an fd of the object that loses its name."""
        cdef Change *change = &self.head.change
        change.held, change.parent, change.new_parent = held, parent, new_parent
        change.node, change.target = node, target
        change.size, change.new_size = <uint16_t>len(name), <uint16_t>len(new_name)
        memcpy(change.name, <const char *>name, len(name))
        memcpy(change.new_name, <const char *>new_name, len(new_name))
        STORED_KIND(change.kind, kind)

    cdef void done(self) noexcept:
        """The change is recorded, or was not made."""
        STORED_KIND(self.head.change.kind, NO_CHANGE)
