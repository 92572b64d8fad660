# Keeping CPUs from idle states that take long to leave.

from libc.stdint cimport int32_t, int64_t

cdef class Idling:
    cdef int fd
    cdef readonly bint held
    cdef int64_t last, not_before
    cdef int thick

    cdef void request(self, int64_t now) noexcept
    cdef bint may_hold(self, int64_t now) noexcept
    cdef bint set(self, int32_t latency) noexcept
    cdef void release(self) noexcept
