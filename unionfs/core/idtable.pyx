"""A hash table of nodes by id: a dict would need an int object and three words for each.

Open addressing with linear probing: a slot is a pointer to a node, which knows its id. The number of slots is a
power of two, and between one and two thirds of them are used, or at least an eighth after removals. A removal
closes the gap, so there are no marks of removed nodes.
"""

from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.object cimport PyTypeObject
from cpython.ref cimport Py_DECREF, Py_INCREF

cdef extern from "Python.h":
    ctypedef int (*visitproc)(PyObject *object, void *argument) noexcept
    ctypedef int (*traverseproc)(PyObject *object, visitproc visit, void *argument) noexcept
    ctypedef struct SlotsOfType "PyTypeObject":
        traverseproc tp_traverse

cdef enum:
    SMALLEST = 16

#: 2**64 divided by the golden ratio: numbers in sequence are spread over all slots.
cdef uint64_t SPREAD = 0x9E3779B97F4A7C15u


cdef class IdTable:
    """Nodes by id. The ids of the nodes in it do not change."""

    # collectable: None; without an object among its attributes the garbage collector would skip the type.

    def __cinit__(self):
        if not self.resize(SMALLEST):
            raise MemoryError

    def __dealloc__(self):
        if self.slots != NULL:
            empty(self)
            PyMem_Free(self.slots)

    def __len__(self):
        return self.count

    def __iter__(self):
        """All nodes at this moment."""
        return iter(self.nodes())

    def __contains__(self, uint64_t id_):
        return self.has(id_)

    def find(self, uint64_t id_):
        """The node with that id, or None."""
        return self.get(id_)

    def insert(self, Node node not None):
        """Add a node; its id must be free."""
        self.add(node)

    def discard(self, Node node not None):
        """Remove a node; returns whether it was there."""
        return self.remove(node)

    cdef Node get(self, uint64_t id_):
        cdef PyObject *found = self.slots[self.slot_of(id_)]
        return None if found == NULL else <Node>found

    cdef bint has(self, uint64_t id_) noexcept:
        return self.slots[self.slot_of(id_)] != NULL

    cdef int add(self, Node node) except -1:
        cdef size_t slot
        if <size_t>(self.count + 1) * 3 > (self.mask + 1) * 2 and not self.resize((self.mask + 1) * 2):
            raise MemoryError
        slot = self.slot_of(node.id)
        if self.slots[slot] != NULL:
            raise KeyError(node.id)
        Py_INCREF(node)
        self.slots[slot] = <PyObject *>node
        self.count += 1
        return 0

    cdef bint remove(self, Node node) noexcept:
        """Returns whether it was there."""
        cdef size_t slot = self.slot_of(node.id)
        if self.slots[slot] != <PyObject *>node:
            return False
        self.slots[slot] = NULL
        self.close_gap(slot)
        self.count -= 1
        if self.mask >= SMALLEST and <size_t>self.count * 8 < self.mask + 1:
            self.resize((self.mask + 1) // 2)  # without memory it stays
        Py_DECREF(node)
        return True

    cdef list nodes(self):
        cdef list found = []
        cdef size_t slot = 0
        while slot <= self.mask:
            if self.slots[slot] != NULL:
                found.append(<Node>self.slots[slot])
            slot += 1
        return found

    cdef size_t slot_of(self, uint64_t id_) noexcept:
        """The slot of the node with that id, or the free one where it belongs."""
        cdef size_t slot = home(id_, self.mask)
        while self.slots[slot] != NULL and (<Node>self.slots[slot]).id != id_:
            slot = (slot + 1) & self.mask
        return slot

    cdef void close_gap(self, size_t gap) noexcept:
        """Move up what a search from its first slot on would not find behind a free slot."""
        cdef size_t slot = gap, first
        while True:
            slot = (slot + 1) & self.mask
            if self.slots[slot] == NULL:
                return
            first = home((<Node>self.slots[slot]).id, self.mask)
            if (slot - first) & self.mask >= (slot - gap) & self.mask:
                self.slots[gap] = self.slots[slot]
                self.slots[slot] = NULL
                gap = slot

    cdef bint resize(self, size_t size) noexcept:
        """Returns False if there is not enough memory."""
        cdef PyObject **old = self.slots
        cdef PyObject **new = <PyObject **>PyMem_Calloc(size, sizeof(PyObject *))
        cdef size_t slot, slots = self.mask + 1 if old != NULL else 0
        if new == NULL:
            return False
        self.slots, self.mask = new, size - 1
        for slot in range(slots):
            if old[slot] != NULL:
                new[self.slot_of((<Node>old[slot]).id)] = old[slot]
        PyMem_Free(old)
        return True


cdef inline size_t home(uint64_t id_, size_t mask) noexcept:
    """The first slot of an id."""
    cdef uint64_t spread = id_ * SPREAD
    return <size_t>(spread ^ (spread >> 32)) & mask


cdef void empty(IdTable table) noexcept:
    """Drop all nodes."""
    cdef size_t slot
    cdef PyObject *node
    for slot in range(table.mask + 1):
        node = table.slots[slot]
        if node != NULL:
            table.slots[slot] = NULL
            table.count -= 1
            Py_DECREF(<Node>node)


# -- for the garbage collector, which cannot know that the slots are references: the nodes let go of a cycle ----


cdef int traverse(PyObject *object_, visitproc visit, void *argument) noexcept:
    cdef IdTable table = <IdTable>object_
    cdef size_t slot, slots = table.mask + 1 if table.slots != NULL else 0  # there was no memory for them
    cdef int stopped
    for slot in range(slots):
        if table.slots[slot] != NULL:
            stopped = visit(table.slots[slot], argument)
            if stopped:
                return stopped
    return 0


(<SlotsOfType *>IdTable).tp_traverse = traverse
