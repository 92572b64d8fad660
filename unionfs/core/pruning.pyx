"""Which nodes the kernel is asked to give back, when there are more than a limit.

The kernel keeps what it has looked up until it needs the memory itself, and the daemon has a node for each. It gives
back only what no program uses (fs/fuse/inode.c, fuse_try_prune_one_inode), so this may name any node; it leaves out
those that are certainly in use, since they would cost a notice in vain.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint64_t

from unionfs.core.node cimport Node
from unionfs.core.nodes cimport NodeTable

cdef enum:
    ROOT = 1


cdef class Pruner:
    """Goes round a node table, so that each node gets its turn."""

    cdef NodeTable nodes
    cdef size_t hand

    def __init__(self, NodeTable nodes not None):
        self.nodes, self.hand = nodes, 0

    @property
    def known(self):
        """The number of nodes in the table."""
        return self.nodes.by_id.count

    def take(self, Py_ssize_t count):
        """The ids of up to ``count`` nodes that have no name below them and are not open, as 64-bit numbers."""
        cdef bytes found = PyBytes_FromStringAndSize(NULL, count * sizeof(uint64_t))
        cdef uint64_t *ids = <uint64_t *>PyBytes_AS_STRING(found)
        cdef Py_ssize_t used = 0
        cdef size_t left = self.nodes.by_id.mask + 1
        cdef Node node
        while left and used < count:
            left -= 1
            self.hand = (self.hand + 1) & self.nodes.by_id.mask
            if self.nodes.by_id.slots[self.hand] == NULL:
                continue
            node = <Node>self.nodes.by_id.slots[self.hand]
            if node.id == ROOT or node.children or (node.use is not None and node.use.handles):
                continue
            ids[used] = node.id
            used += 1
        return found[: used * sizeof(uint64_t)]
