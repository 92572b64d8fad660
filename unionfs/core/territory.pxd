# The territories of a union's tree.

cdef class Territory:
    cdef readonly bint lasting, has_markers, read_only
    cdef readonly object owners
