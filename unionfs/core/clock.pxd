# The time since some point in the past, in nanoseconds. It passes also while the machine is suspended: so the device is
# not read any further afterwards without a look at what may have changed meanwhile (`loop`).

from libc.stdint cimport int64_t
from posix.time cimport clock_gettime, timespec

cdef extern from "<time.h>" nogil:
    int CLOCK_BOOTTIME

cdef inline int64_t now_ns() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_BOOTTIME, &time)
    return <int64_t>time.tv_sec * 1_000_000_000 + time.tv_nsec
