"""Names of the merged layers: the node of a name, with its attributes."""

from libc.errno cimport ENAMETOOLONG, ENOENT, ESTALE
from libc.errno cimport errno as c_errno
from libc.string cimport memset

from unionfs.core.node cimport has_lower_data
from unionfs.core.places cimport Place, new_place
from unionfs.core.state cimport MOST_PARTS
from unionfs.core.stats cimport AT_SYMLINK_NOFOLLOW, S_IFDIR, S_IFMT, S_IFREG, failure, fstatat

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
        return None if places is None else self.entered(parent, name, &st, places)

    cdef Attributes entered(self, Node parent, bytes name, const stat_t *st, list places):
        cdef Node node = self.nodes.place_object(parent, name, st, places)
        if node.is_copy_in_index() and not (<Place>places[0]).layer.is_upper:
            return self.objects.attributes(node)  # of the copy
        if self.may_lack_data(st, node):
            try:
                self.find_data(node)
            except BaseException:
                self.nodes.subtract(node, 0)  # a known node is not asked about its data again
                raise
        return node.shown(st)

    def has_again(self, parent, bytes name, kind, number, layers):
        cdef Node directory = parent
        cdef list places
        cdef stat_t st
        cdef Place part
        memset(&st, 0, sizeof(st))
        if len(directory.parts) >= self.merge.many:
            return False
        if kind == S_IFDIR:
            places = self.parts_again(directory.parts, name, layers)
            if places is None:
                return False
            st.st_mode = kind
            self.nodes.enter(directory, name, &st, places, number, False, None)
            return True
        # A copy may have been made in the upper just before the daemon died.
        places = [part for part in directory.parts if not part.layer.slow and 1 << part.layer.index <= layers]
        if not places or not layers >> (<Place>places[-1]).layer.index & 1:
            return False
        places = self.merge.find(places, name, 0, &st)
        if places is None or st.st_mode & S_IFMT != kind:
            return False
        self.entered(directory, name, &st, places)
        return True

    cdef list parts_again(self, list parts, bytes name, uint32_t layers):
        """The parts of a directory in those layers; None if they are others by now."""
        cdef Place part, place
        cdef stat_t st
        cdef bint has, slow
        cdef list found = []
        for part in parts:
            slow = part.layer.slow != 0
            has = layers >> <uint32_t>part.layer.index & 1 if part.layer.index < MOST_PARTS else False
            if not slow and (has or part.layer.is_upper):
                if fstatat(self.merge.gate.fd(part), name, &st, AT_SYMLINK_NOFOLLOW) != 0:
                    if c_errno != ENOENT and c_errno != ENAMETOOLONG:
                        return None
                    st.st_mode = 0
                if (st.st_mode & S_IFMT == S_IFDIR) != has:
                    return None
            if not has:
                continue
            place = new_place(part.layer, part, name, 0)
            found.append(place)
            layers &= ~(<uint32_t>1 << <uint32_t>part.layer.index)
            if not slow:
                place.key, place.dev, place.inode = part.layer.key_of(&st), st.st_dev, st.st_ino
                if part.layer.index != self.lowest:
                    marks = self.merge.markers.directory(self.merge.gate.fd(place))
                    place.marked(impure=marks.impure, copied=marks.copied)
        return None if layers or not found else found

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
