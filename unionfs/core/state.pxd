# What another daemon needs to take a mount over.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    # Of `Record.flags`
    FIXED = 1  # its number is stored, and its object is the one under its name
    UNLINKED = 2
    SUPERSEDED = 4  # the parent is the node that took over
    WRITTEN = 8  # as in `Use`
    MAPPED = 16
    PARTS = 32  # of a directory with a name: `layer` has a bit for each layer of its parts, which have that name in the
    # parts of its parent
    # Of `HandleRecord.flags`
    WRITES = 1
    MAPS = 2
    COUNTED = 4  # its I/O mode is known
    THROUGH = 8
    OF_UPPER = 16
    BACKING_ALONE = 32  # no open file, but a backing file that is kept
    # `Change.kind`
    NO_CHANGE = 0
    REMOVING = 1
    RENAMING = 2
    EXCHANGING = 3
    HERE = 18
    IN_MORE = 52
    NAME_SIZE = 256
    DEATHS = 16
    MOST_PARTS = 16

cdef struct Record:  # 64 bytes
    uint64_t id, parent
    int64_t lookups
    uint32_t unique, generation, more
    int32_t held
    uint16_t size, layer
    uint8_t kind, flags
    char here[HERE]

cdef struct More:  # as large
    uint64_t none  # where a record has its id
    uint32_t more
    char text[IN_MORE]

cdef struct HandleRecord:
    uint64_t number, node, unique
    uint32_t flags
    int32_t backing_id

cdef struct Change:
    uint32_t kind
    int32_t held
    uint64_t parent, new_parent, node, target
    uint16_t size, new_size
    char name[NAME_SIZE]
    char new_name[NAME_SIZE]

cdef struct Head:
    char magic[8]
    uint32_t version
    # How many have been used: higher ones are empty.
    uint32_t slots, handles
    uint32_t full
    uint64_t last_handle
    # For the holder: the pid of the one in charge, 0 for none; the fd of the device; whether the daemon has ended on
    # purpose; its command, a list of strings each ended by a null byte, in bytes; and when daemons died, in milliseconds.
    int32_t holder, device, ended
    uint32_t arguments, variables, limit
    int64_t deaths[DEATHS]
    int64_t died
    uint32_t count, failed, exchanged
    uint32_t text
    # The last change of an xattr: its request, and whether the xattr existed before.
    uint64_t xattr_of
    uint32_t xattr_existed
    # The last exchange of names: its request, and whether it is done.
    uint32_t exchange_done
    uint64_t exchange_of
    Change change

cdef class State:
    cdef readonly int fd
    cdef char *base
    cdef Head *head
    cdef Record *slots
    cdef HandleRecord *handles
    cdef uint32_t free_slot, free_handle

    cdef uint32_t take_slot(self) noexcept
    cdef void give_back(self, uint32_t slot) noexcept
    cdef Record *add(
        self, uint64_t id_, uint64_t parent, uint32_t generation, uint32_t kind, uint32_t flags, uint64_t ino,
        bytes name
    ) noexcept
    cdef void write(self, Record *record, uint64_t parent, uint64_t ino, bytes name) noexcept
    cdef bytes read(self, const Record *record)
    cdef bytes name_of(self, const Record *record)
    cdef uint64_t number_of(self, const Record *record) noexcept
    cdef void drop(self, Record *record) noexcept
    cdef void drop_more(self, uint32_t slot) noexcept
    cdef void begin(
        self, uint32_t kind, uint64_t parent, bytes name, uint64_t new_parent, bytes new_name, uint64_t node,
        uint64_t target, int held
    ) noexcept
    cdef void done(self) noexcept
    cdef HandleRecord *add_handle(self, uint64_t number, uint64_t node, uint64_t unique, uint32_t flags) noexcept
    cdef uint32_t add_kept(self, uint64_t node, int32_t backing_id) noexcept
    cdef void drop_kept(self, uint32_t place) noexcept
    cdef void drop_handle(self, HandleRecord *record) noexcept

cdef inline uint32_t layer_of(const Record *record) noexcept:
    """The layer of the object, or of its topmost part."""
    cdef uint32_t layer = 0
    if not record.flags & PARTS:
        return record.layer
    while layer < MOST_PARTS and not record.layer >> layer & 1:
        layer += 1
    return layer

cdef inline uint32_t short_unique(uint64_t unique) noexcept:
    """What a record has of the number of a request, without the mark of one that is sent again. It is never 0, and
    differs for requests that are in flight together."""
    return <uint32_t>(unique >> 1) | 0x80000000u

cdef inline bint is_resent(uint64_t unique) noexcept:
    """Whether a request was sent before; FUSE_UNIQUE_RESEND, include/uapi/linux/fuse.h."""
    return (unique >> 63) != 0
