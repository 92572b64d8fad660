# Structures of the hot requests; include/uapi/linux/fuse.h, protocol 7.45. `fuse.protocol.structs` has all of
# them, and a test compares the two.

from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t

from unionfs.core.stats cimport fuse_attr

cdef enum opcode:
    FUSE_LOOKUP = 1
    FUSE_FORGET = 2
    FUSE_GETATTR = 3
    FUSE_SETATTR = 4
    FUSE_READLINK = 5
    FUSE_MKDIR = 9
    FUSE_UNLINK = 10
    FUSE_RMDIR = 11
    FUSE_RENAME = 12
    FUSE_OPEN = 14
    FUSE_READ = 15
    FUSE_STATFS = 17
    FUSE_RELEASE = 18
    FUSE_GETXATTR = 22
    FUSE_LISTXATTR = 23
    FUSE_READDIR = 28
    FUSE_CREATE = 35
    FUSE_BATCH_FORGET = 42
    FUSE_READDIRPLUS = 44
    FUSE_RENAME2 = 45

cdef enum:
    OPCODES = 64
    FUSE_NOTIFY_INVAL_INODE = 2
    FUSE_NOTIFY_STORE = 4
    # The largest file in bytes that the kernel receives with its first open.
    SMALL_FILE = 65536

cdef struct fuse_in_header:
    uint32_t length
    uint32_t opcode
    uint64_t unique
    uint64_t nodeid
    uint32_t uid
    uint32_t gid
    uint32_t pid
    uint16_t total_extlen
    uint16_t padding

cdef struct fuse_out_header:
    uint32_t length
    int32_t error
    uint64_t unique

cdef struct fuse_entry_out:
    uint64_t nodeid
    uint64_t generation
    uint64_t entry_valid
    uint64_t attr_valid
    uint32_t entry_valid_nsec
    uint32_t attr_valid_nsec
    fuse_attr attr

cdef struct fuse_attr_out:
    uint64_t attr_valid
    uint32_t attr_valid_nsec
    uint32_t dummy
    fuse_attr attr

cdef struct fuse_forget_one:
    uint64_t nodeid
    uint64_t nlookup

cdef struct fuse_batch_forget_in:
    uint32_t count
    uint32_t dummy

cdef struct entry_answer:
    fuse_out_header header
    fuse_entry_out body

cdef struct attr_answer:
    fuse_out_header header
    fuse_attr_out body

cdef struct fuse_open_out:
    uint64_t fh
    uint32_t open_flags
    int32_t backing_id

cdef struct open_answer:
    fuse_out_header header
    fuse_open_out body

cdef struct create_answer:
    fuse_out_header header
    fuse_entry_out entry
    fuse_open_out open

cdef struct fuse_read_in:
    uint64_t fh
    uint64_t offset
    uint32_t size
    uint32_t read_flags
    uint64_t lock_owner
    uint32_t flags
    uint32_t padding

cdef struct fuse_kstatfs:
    uint64_t blocks
    uint64_t bfree
    uint64_t bavail
    uint64_t files
    uint64_t ffree
    uint32_t bsize
    uint32_t namelen
    uint32_t frsize
    uint32_t padding
    uint32_t spare[6]

cdef struct statfs_answer:
    fuse_out_header header
    fuse_kstatfs body

cdef struct fuse_mkdir_in:
    uint32_t mode
    uint32_t umask

cdef struct fuse_create_in:
    uint32_t flags
    uint32_t mode
    uint32_t umask
    uint32_t open_flags

cdef struct fuse_setattr_in:
    uint32_t valid
    uint32_t padding
    uint64_t fh
    uint64_t size
    uint64_t lock_owner
    int64_t atime
    int64_t mtime
    uint64_t ctime
    uint32_t atimensec
    uint32_t mtimensec
    uint32_t ctimensec
    uint32_t mode
    uint32_t unused4
    uint32_t uid
    uint32_t gid
    uint32_t unused5

cdef struct fuse_rename2_in:
    uint64_t newdir
    uint32_t flags
    uint32_t padding

cdef struct fuse_notify_inval_inode_out:
    uint64_t ino
    int64_t offset  # negative: attributes alone
    int64_t length

cdef struct inval_inode_notice:
    fuse_out_header header
    fuse_notify_inval_inode_out body

cdef struct fuse_notify_store_out:
    uint64_t nodeid
    uint64_t offset
    uint32_t size
    uint32_t padding

cdef struct store_notice:
    fuse_out_header header
    fuse_notify_store_out body
    char data[SMALL_FILE]

cdef struct validity:
    uint64_t seconds
    uint32_t nanoseconds
