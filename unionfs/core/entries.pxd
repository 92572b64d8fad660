# The names of a directory, in the order of their hashes.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef struct Item:
    uint64_t ino
    uint32_t hash
    uint32_t at
    uint16_t length
    uint16_t part
    uint8_t kind

cdef class Entries:
    cdef readonly list parts
    cdef readonly bint is_new
    cdef Item *items
    cdef char *text
    cdef uint64_t *devices
    cdef size_t count, room, used, text_room
    cdef dict tickets

    cdef const char *text_of(self, Py_ssize_t index) noexcept
    cdef bytes name_of(self, Py_ssize_t index)
    cdef uint64_t cookie_of(self, Py_ssize_t index) except 0
    cdef int parse(self, const char *buffer, size_t size, uint16_t part, int rules) noexcept nogil
    cdef int add(
        self, const char *name, size_t length, uint64_t ino, uint8_t kind, uint16_t part
    ) noexcept nogil
    cdef void sort(self) noexcept nogil
    cdef list parts_with(self, bytes name)
    cdef void drop_doubles(self) noexcept nogil
    cpdef later(self)
    cpdef list same(self)
    cpdef Py_ssize_t first_after(self, uint64_t hash_, bytes name=*) except -1
    cdef Py_ssize_t checked(self, Py_ssize_t index) except -1
