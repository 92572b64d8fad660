"""struct stat, and what is made of it: os.stat_result for Python, fuse_attr for the kernel.

`os.stat_result` is a struct sequence; the order of its fields is that of Modules/posixmodule.c,
stat_result_fields, which a test compares with os.stat(2).
"""

import os

from cpython.object cimport PyTypeObject
from cpython.ref cimport Py_INCREF
from libc.string cimport memset, strerror

cdef extern from "Python.h":
    object PyStructSequence_New(PyTypeObject *type)
    void PyStructSequence_SET_ITEM(object sequence, Py_ssize_t index, object value)

cdef enum:
    NS = 1_000_000_000

#: So many seconds fit 64 bits as nanoseconds.
cdef int64_t MOST_SECONDS = 9_000_000_000
cdef object RESULT = os.stat_result


cdef int64_t ctime_of(const stat_t *st) noexcept nogil:
    return <int64_t>st.st_ctim.tv_sec * NS + st.st_ctim.tv_nsec


cdef inline void put(object result, Py_ssize_t index, object value):
    Py_INCREF(value)
    PyStructSequence_SET_ITEM(result, index, value)


cdef object nanoseconds_of(timespec time):
    """Since 1970. An object, because a file may have a time after 2262, when 64 bits end."""
    if -MOST_SECONDS < time.tv_sec < MOST_SECONDS:
        return <int64_t>time.tv_sec * NS + time.tv_nsec
    return <object>time.tv_sec * <object>NS + time.tv_nsec


cdef timespec time_of(object nanoseconds) except *:
    """The inverse of :func:`nanoseconds_of`, rounded down, as times before 1970 are stored."""
    cdef timespec time
    time.tv_sec = nanoseconds // <object>NS
    time.tv_nsec = nanoseconds % <object>NS
    return time


cdef void put_time(object result, Py_ssize_t index, timespec time):
    """The three forms of a time: seconds, a float of seconds, nanoseconds."""
    put(result, 7 + index, time.tv_sec)
    put(result, 10 + index, time.tv_sec + 1e-9 * time.tv_nsec)
    put(result, 13 + index, nanoseconds_of(time))


cdef object result_of(const stat_t *st):
    """The os.stat_result of a struct stat."""
    result = PyStructSequence_New(<PyTypeObject *>RESULT)
    put(result, 0, st.st_mode)
    put(result, 1, st.st_ino)
    put(result, 2, st.st_dev)
    put(result, 3, st.st_nlink)
    put(result, 4, st.st_uid)
    put(result, 5, st.st_gid)
    put(result, 6, st.st_size)
    put_time(result, 0, st.st_atim)
    put_time(result, 1, st.st_mtim)
    put_time(result, 2, st.st_ctim)
    put(result, 16, st.st_blksize)
    put(result, 17, st.st_blocks)
    put(result, 18, st.st_rdev)
    return result


cdef int read_result(object result, stat_t *st) except -1:
    """Fill a struct stat from an os.stat_result."""
    memset(st, 0, sizeof(stat_t))
    st.st_mode, st.st_ino, st.st_dev = result.st_mode, result.st_ino, result.st_dev
    st.st_nlink, st.st_uid, st.st_gid = result.st_nlink, result.st_uid, result.st_gid
    st.st_size, st.st_blksize, st.st_blocks = result.st_size, result.st_blksize, result.st_blocks
    st.st_rdev = result.st_rdev
    st.st_atim = time_of(result.st_atime_ns)
    st.st_mtim = time_of(result.st_mtime_ns)
    st.st_ctim = time_of(result.st_ctime_ns)
    return 0


cdef int64_t seconds(int64_t time) noexcept nogil:
    """Nanoseconds in whole seconds, rounded down, as times before 1970 are stored."""
    return time // NS if time >= 0 else -((-time + NS - 1) // NS)


cdef object failure(int code):
    """The OSError of an errno."""
    return OSError(code, strerror(code).decode())


cdef void fill_attr(
    fuse_attr *attr, const stat_t *st, uint64_t ino, uint32_t nlink, int64_t ctime_ns
) noexcept nogil:
    """fuse_attr from a struct stat, with another inode number, link count and ctime."""
    attr.ino = ino
    attr.size = st.st_size
    attr.blocks = st.st_blocks
    attr.atime = st.st_atim.tv_sec
    attr.atimensec = st.st_atim.tv_nsec
    attr.mtime = st.st_mtim.tv_sec
    attr.mtimensec = st.st_mtim.tv_nsec
    attr.ctime = seconds(ctime_ns)
    attr.ctimensec = <uint32_t>(ctime_ns - seconds(ctime_ns) * NS)
    attr.mode = st.st_mode
    attr.nlink = nlink
    attr.uid = st.st_uid
    attr.gid = st.st_gid
    attr.rdev = <uint32_t>st.st_rdev
    attr.blksize = <uint32_t>st.st_blksize
    attr.flags = 0
