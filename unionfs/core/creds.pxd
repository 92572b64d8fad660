# Creating files as another user.

from libc.stdint cimport uint32_t

cdef struct Capabilities:
    # struct __user_cap_data_struct of capset(2), twice
    uint32_t words[6]

cdef class Creator:
    cdef readonly uint32_t uid, gid
    cdef readonly bint can_switch
    cdef Capabilities capabilities

    cdef bint is_me(self, uint32_t uid, uint32_t gid) noexcept nogil
    cdef void become(self, uint32_t uid, uint32_t gid) noexcept nogil
    cdef void be_myself(self) noexcept nogil
