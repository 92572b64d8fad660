# System calls on layers.

from libc.stdint cimport int64_t, uint64_t

from unionfs.core.stats cimport stat_t

cdef int fstatat(int fd, const char *name, stat_t *st, int flags) except? -2 nogil
cdef int fstat(int fd, stat_t *st) except? -2 nogil
cdef int openat(int fd, const char *name, int flags) except? -2 nogil
cdef ssize_t readlinkat(int fd, const char *name, char *buffer, size_t size) except? -2 nogil
cdef ssize_t getxattr(const char *path, const char *name, void *value, size_t size) except? -2 nogil
cdef ssize_t lgetxattr(const char *path, const char *name, void *value, size_t size) except? -2 nogil
cdef ssize_t listxattr(const char *path, char *names, size_t size) except? -2 nogil
cdef ssize_t flistxattr(int fd, char *names, size_t size) except? -2 nogil
cdef ssize_t xattr_of(
    int fd, const char *name, const char *xattr, bint follow, void *value, size_t size
) except? -2 with gil
cdef int get_flags(int fd, int *flags) except? -2 nogil
cdef int attributes_of(int fd, const char *name, int flags, uint64_t *attributes) except? -2 nogil
cdef ssize_t pread(int fd, void *buffer, size_t size, int64_t offset) except? -2 nogil
cdef list entries_of(int fd)
