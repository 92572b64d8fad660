# Which fds belong to slow layers.

from libc.stdint cimport uint32_t, uint64_t

cdef extern from "<fcntl.h>" nogil:
    int AT_EMPTY_PATH

cdef extern from "<sys/stat.h>" nogil:
    cdef struct statx_t "statx":
        uint64_t stx_attributes
        uint64_t stx_ino
        uint32_t stx_dev_major, stx_dev_minor
        unsigned short stx_mode
    int statx(int fd, const char *path, int flags, unsigned int mask, statx_t *found)

cdef enum:
    # Fds beyond have no marks.
    MOST_FDS = 1 << 20

cdef struct Mark:
    # id: of the object that was opened, 0: the fd is not one of a slow layer; ino, major, minor: what it must still be
    # layer: the number of the slow layer; flushes: whether close(2) waits for the server
    # bare: whether the layer has no xattrs: its root says so, while a file may say EIO (rclone)
    uint64_t id
    uint64_t ino
    uint32_t major
    uint32_t minor
    uint32_t layer
    bint flushes
    bint bare

cdef Mark *marks

cdef bint is_slow(int fd) noexcept nogil
cdef int mark_as(int fd, const Mark *mark) noexcept nogil
cdef Mark new_mark(int fd, const Mark *of, bint opened) noexcept nogil
cdef int xattr_error(int fd, int code) noexcept nogil
cdef int mark_root(int fd, uint32_t layer, bint bare) except -1
cdef int mark_held(int fd, int root) noexcept nogil
cdef int marked_copy(int fd, const Mark *mark) noexcept nogil
cdef int marked_child(int fd, int opened, int flags) noexcept nogil
cdef int close(int fd) noexcept nogil
