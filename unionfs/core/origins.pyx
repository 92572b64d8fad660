"""The format of the origin of a copy: overlayfs's (fs/overlayfs/overlayfs.h, struct ovl_fb).

Version, magic, length, flags, handle type, the filesystem's uuid, and the object's file handle. See
`union.origin` for what it is good for.
"""

from libc.errno cimport errno as c_errno
from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

from unionfs.core.stats cimport failure

cdef extern from "<fcntl.h>" nogil:
    int AT_EMPTY_PATH
    cdef struct file_handle:
        unsigned int handle_bytes
        int handle_type
        unsigned char f_handle[0]
    int name_to_handle_at(int fd, const char *path, file_handle *handle, int *mount_id, int flags)

cdef extern from *:
    """
    #include <stdint.h>
    #define UNIONFS_BIG_ENDIAN (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__)
    """
    bint UNIONFS_BIG_ENDIAN

cdef enum:
    # struct ovl_fb: version, magic, len, flags, type, uuid; then the handle
    HEAD = 21
    UUID_AT = 5
    UUID_SIZE = 16
    VERSION = 0
    MAGIC = 0xFB
    BIG_ENDIAN = 1
    ANY_ENDIAN = 2
    PATH_UPPER = 4
    KNOWN_FLAGS = 7
    # include/linux/exportfs.h: MAX_HANDLE_SZ
    MAX_HANDLE = 128
    # include/linux/exportfs.h: FILEID_INO32_GEN, FILEID_BTRFS_WITHOUT_PARENT; fs/xfs/xfs_export.h: the
    # former with XFS_FILEID_TYPE_64FLAG, struct xfs_fid64
    INO32 = 0x01
    BTRFS = 0x4D
    XFS64 = 0x81
    # include/uapi/linux/magic.h
    EXT_MAGIC = 0xEF53
    XFS_MAGIC = 0x58465342
    BTRFS_MAGIC = 0x9123683E
    F2FS_MAGIC = 0xF2F52010
    SQUASHFS_MAGIC = 0x73717368
    TMPFS_MAGIC = 0x01021994

cdef struct Handle:
    unsigned int size
    int kind
    unsigned char bytes[MAX_HANDLE]


cdef inline uint64_t word(const unsigned char *at, int size) noexcept nogil:
    """An integer of 4 or 8 bytes."""
    cdef uint64_t large = 0
    cdef uint32_t small = 0
    if size == 8:
        memcpy(&large, at, 8)
        return large
    memcpy(&small, at, 4)
    return small


cdef int handle_of(int dir_fd, const char *name, Handle *handle) noexcept nogil:
    """name_to_handle_at(2)."""
    cdef int mount
    handle.size = MAX_HANDLE
    return name_to_handle_at(dir_fd, name, <file_handle *>handle, &mount, 0 if name[0] else AT_EMPTY_PATH)


def handle_at(int dir_fd, bytes name=b""):
    """The type and the bytes of an object's file handle; without ``name`` of ``dir_fd`` itself (O_PATH too).

    Does not follow a symlink. Raises OSError, EOPNOTSUPP if the filesystem has none.
    """
    cdef Handle handle
    if handle_of(dir_fd, name, &handle) != 0:
        raise failure(c_errno)
    return handle.kind, (<char *>handle.bytes)[:handle.size]


def handle_in(bytes origin not None):
    """The type and the bytes of the file handle in an origin. Raises IndexError if it is none."""
    return origin[4], origin[HEAD:origin[2]]


cdef uint64_t subvolume_of(int kind, const unsigned char *handle, Py_ssize_t size) noexcept nogil:
    """fs/btrfs/export.h, struct btrfs_fid: objectid, root_objectid, gen."""
    return word(handle + 8, 8) if kind == BTRFS and size >= 16 else 0


def subvolume(int kind, bytes handle not None):
    """The subvolume in the file handle of a btrfs, else 0."""
    return subvolume_of(kind, handle, len(handle))


cdef bint inode_of(
    unsigned long magic, int kind, const unsigned char *handle, Py_ssize_t size, uint64_t *inode
) noexcept nogil:
    """The inode number in a file handle. Returns whether the format is known."""
    if kind == INO32 and magic == TMPFS_MAGIC and size == 12:  # mm/shmem.c, shmem_encode_fh
        inode[0] = word(handle + 4, 4) | word(handle + 8, 4) << 32
    elif (
        kind == INO32 and size == 8
        and (magic == EXT_MAGIC or magic == XFS_MAGIC or magic == F2FS_MAGIC or magic == SQUASHFS_MAGIC)
    ):  # struct fid, i32
        inode[0] = word(handle, 4)
    elif (
        (kind == XFS64 and magic == XFS_MAGIC and size == 12)
        or (kind == BTRFS and magic == BTRFS_MAGIC and size == 20)
    ):
        inode[0] = word(handle, 8)
    else:
        return False
    return True


cdef class OriginFormat:
    """Origins of the objects of some filesystems, and the numbers of those objects."""

    def __init__(self, filesystems, numbers):
        """``filesystems``: of each its device, f_type of statfs(2), uuid, subvolume of a btrfs (else 0), and
        whether origins that name it are known. ``numbers``: see `union.numbers`."""
        cdef Filesystem *one
        self.numbers = numbers
        self.plain_device, self.plain_limit = numbers.plain
        self.filesystems = <Filesystem *>calloc(max(len(filesystems), 1), sizeof(Filesystem))
        if self.filesystems is NULL:
            raise MemoryError
        for device, magic, uuid, subvolume, known in filesystems:
            if len(uuid) != UUID_SIZE:
                raise ValueError("a uuid has 16 bytes")
            one = &self.filesystems[self.count]
            one.device, one.magic, one.subvolume, one.known = device, magic, subvolume, known
            memcpy(one.uuid, <const char *>uuid, UUID_SIZE)
            self.count += 1

    def __dealloc__(self):
        free(self.filesystems)

    cdef int encode(
        self, int dir_fd, const char *name, uint64_t device, unsigned char flags, unsigned char *origin
    ) noexcept nogil:
        """Fill ``origin``, ORIGIN_SIZE bytes. Returns its length, -1 with errno."""
        cdef Handle handle
        cdef Py_ssize_t index
        for index in range(self.count):
            if self.filesystems[index].device == device:
                break
        else:
            return 0
        if handle_of(dir_fd, name, &handle) != 0:
            return -1
        if not 0 <= handle.kind <= 0xFF:
            return 0
        origin[0], origin[1], origin[2] = VERSION, MAGIC, <unsigned char>(HEAD + handle.size)
        origin[3] = flags | (BIG_ENDIAN if UNIONFS_BIG_ENDIAN else 0)
        origin[4] = <unsigned char>handle.kind
        memcpy(origin + UUID_AT, self.filesystems[index].uuid, UUID_SIZE)
        memcpy(origin + HEAD, handle.bytes, handle.size)
        return HEAD + <int>handle.size

    def encoded(self, int dir_fd, bytes name not None, device, *, bint of_upper=False):
        """The origin that names an object; b"" if its filesystem has no handles or its uuid is unknown.

        Without ``name``, that of ``dir_fd`` itself. Raises ``OSError``.
        """
        cdef unsigned char origin[ORIGIN_SIZE]
        cdef int size = self.encode(dir_fd, name, device, PATH_UPPER if of_upper else 0, origin)
        if size < 0:
            raise failure(c_errno)
        return (<char *>origin)[:size]

    cdef bint decode(
        self, const unsigned char *origin, Py_ssize_t size, uint64_t *device, uint64_t *inode
    ) noexcept nogil:
        """Device and inode number of the object that an origin names. Returns whether they are known."""
        cdef Filesystem *one
        cdef Py_ssize_t index, length
        cdef uint64_t subvolume
        cdef unsigned char flags
        if size < HEAD:
            return False
        length, flags = origin[2], origin[3]
        if origin[1] != MAGIC or origin[0] > VERSION or not HEAD <= length <= size:
            return False
        if flags & ~KNOWN_FLAGS:
            return False
        if not flags & ANY_ENDIAN and flags & BIG_ENDIAN != (BIG_ENDIAN if UNIONFS_BIG_ENDIAN else 0):
            return False
        subvolume = subvolume_of(origin[4], origin + HEAD, length - HEAD)
        for index in range(self.count):
            one = &self.filesystems[index]
            if (
                one.known and one.subvolume == subvolume
                and memcmp(one.uuid, origin + UUID_AT, UUID_SIZE) == 0
            ):
                device[0] = one.device
                return inode_of(one.magic, origin[4], origin + HEAD, length - HEAD, inode)
        return False

    cdef uint64_t number(self, uint64_t device, uint64_t inode) except? 0:
        """The number of an object."""
        if device == self.plain_device and 1 < inode < self.plain_limit:
            return inode
        return self.numbers.of(device, inode)

    def number_of(self, bytes origin not None):
        """The number of the object that an origin names; None if it is unknown or broken."""
        cdef uint64_t device, inode
        if not self.decode(<const unsigned char *><const char *>origin, len(origin), &device, &inode):
            return None
        return self.number(device, inode)
