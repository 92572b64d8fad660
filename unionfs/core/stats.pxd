# struct stat, and what is made of it.

from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.stat cimport struct_stat as stat_t
from posix.time cimport timespec

cdef extern from "<sys/stat.h>" nogil:
    int S_IFMT
    int S_IFDIR
    int S_IFREG
    int S_IFLNK
    int S_IFCHR
    int fstatat(int fd, const char *path, stat_t *buffer, int flags)
    int fstat(int fd, stat_t *buffer)

cdef extern from "<fcntl.h>" nogil:
    int AT_SYMLINK_NOFOLLOW
    int O_PATH
    int O_DIRECTORY
    int O_NOFOLLOW
    int O_CLOEXEC
    int O_RDONLY
    int openat(int fd, const char *path, int flags, ...)

cdef struct fuse_attr:
    # include/uapi/linux/fuse.h
    uint64_t ino
    uint64_t size
    uint64_t blocks
    uint64_t atime
    uint64_t mtime
    uint64_t ctime
    uint32_t atimensec
    uint32_t mtimensec
    uint32_t ctimensec
    uint32_t mode
    uint32_t nlink
    uint32_t uid
    uint32_t gid
    uint32_t rdev
    uint32_t blksize
    uint32_t flags

cdef int64_t ctime_of(const stat_t *st) noexcept nogil
cdef int64_t seconds(int64_t time) noexcept nogil
cdef object nanoseconds_of(timespec time)
cdef timespec time_of(object nanoseconds) except *
cdef object result_of(const stat_t *st)
cdef int read_result(object result, stat_t *st) except -1
cdef object failure(int code)
cdef void fill_attr(
    fuse_attr *attr, const stat_t *st, uint64_t ino, uint32_t nlink, int64_t ctime_ns
) noexcept nogil
