# Names of the merged layers.

from libc.stdint cimport uint32_t, uint64_t

from unionfs.core.node cimport Attributes, Node
from unionfs.core.territory cimport Territory
from unionfs.core.nodes cimport NodeTable
from unionfs.core.objects cimport Objects
from unionfs.core.search cimport Search
from unionfs.core.stats cimport stat_t

cdef class Names(Territory):
    cdef readonly Objects objects
    cdef readonly NodeTable nodes
    cdef readonly Search merge
    cdef Py_ssize_t lowest

    cdef Attributes find(self, Node parent, bytes name, Py_ssize_t first)
    cdef Attributes entered(self, Node parent, bytes name, const stat_t *st, list places)
    cdef list parts_again(self, list parts, bytes name, uint32_t layers)
    cdef bint may_lack_data(self, const stat_t *st, Node node) noexcept

cdef Attributes look_up(Node parent, bytes name, Py_ssize_t first)
