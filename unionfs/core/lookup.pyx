"""Names of the merged layers: the node of a name, with its attributes."""

from libc.errno cimport ENAMETOOLONG, ESTALE

from unionfs.core.node cimport has_lower_data
from unionfs.core.places cimport Place
from unionfs.core.stats cimport S_IFMT, S_IFREG, failure

cdef enum:
    NAME_MAX = 255
    # The blocks of a file without data: those of xattrs that do not fit into the inode.
    BLOCKS_OF_XATTRS = 8


cdef Attributes look_up(Node parent, bytes name, Py_ssize_t first):
    """The object ``name`` in ``parent``, of any territory; None if there is none. Raises ``OSError``."""
    cdef Attributes found
    if isinstance(parent.territory, Names):
        return (<Names>parent.territory).find(parent, name, first)
    pair = parent.territory.lookup(parent, name, first)
    if pair is None:
        return None
    found = pair[1]
    found.node = pair[0]
    return found


cdef class Names(Territory):
    """The territory of the merged layers, as far as names are looked up."""

    def __init__(
        self, Objects objects not None, NodeTable nodes not None, Search merge not None, lowest, *,
        bint read_only, owners
    ):
        """``lowest``: the index of the lowest layer."""
        super().__init__(lasting=True, has_markers=True, read_only=read_only, owners=owners)
        self.objects, self.nodes, self.merge, self.lowest = objects, nodes, merge, lowest

    def lookup(self, Node parent not None, bytes name not None, Py_ssize_t first=0):
        """The node ``name`` in ``parent`` with its attributes, or None; see `Territory.lookup`."""
        found = self.find(parent, name, first)
        return None if found is None else (found.node, found)

    cdef Attributes find(self, Node parent, bytes name, Py_ssize_t first):
        cdef stat_t st
        cdef Node node = parent.children.get(name)
        cdef list places
        if node is not None:
            try:
                return self.objects.attributes(node)
            except OSError as error:
                if error.errno != ESTALE:
                    raise
            self.nodes.lose(node, parent, name)  # the name now belongs to another object
        if len(name) > NAME_MAX:
            raise failure(ENAMETOOLONG)
        places = self.merge.find(parent.parts, name, first, &st)
        if places is None:
            return None
        node = self.nodes.place_object(parent, name, &st, places)
        if node.is_copy_in_index() and not (<Place>places[0]).layer.is_upper:
            return self.objects.attributes(node)  # of the copy
        if self.may_lack_data(&st, node):
            try:
                self.find_data(node)
            except BaseException:
                self.nodes.subtract(node, 0)  # a known node is not asked about its data again
                raise
        return node.shown(&st)

    cdef bint may_lack_data(self, const stat_t *st, Node node) noexcept:
        """Whether a regular file has too few blocks for its size, so that it may be metacopy."""
        if st.st_size <= st.st_blocks * 512 or st.st_blocks > BLOCKS_OF_XATTRS:
            return False
        return (
            st.st_mode & S_IFMT == S_IFREG and not has_lower_data(node) and node.place.layer.index != self.lowest
        )

    def find_data(self, Node node):
        """Record where the data of a file lies that may be metacopy. Ignores errors: an open reports them."""
        raise NotImplementedError
