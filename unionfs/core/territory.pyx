"""The territories of a union's tree, to which its nodes belong."""

from libc.errno cimport EROFS

from unionfs.core.stats cimport failure


cdef class Territory:
    """A part of the tree with its own rules: the merged layers, or storage bound at one place.

    Renames and links from one territory to another are EXDEV, as between filesystems.
    """

    def __init__(self, *, bint lasting, bint has_markers, bint read_only, owners=None):
        #: Whether only this daemon changes it, so that cached answers stay valid until it does.
        self.lasting = lasting
        #: Whether a character device 0/0 is a whiteout, and making one is refused.
        self.has_markers = has_markers
        #: Whether it is read-only.
        self.read_only = read_only
        #: How owners are shown; None: as they are stored.
        self.owners = owners

    @property
    def durable(self):
        """Whether fsync must reach a disk."""
        raise NotImplementedError

    def lookup(self, parent, bytes name, first=0):
        """The node ``name`` in ``parent`` with its attributes, or None.

        ``first``: the index of the topmost part of the parent that may have the name, if known.
        """
        raise NotImplementedError

    def has_again(self, parent, bytes name, kind, number, layers):
        """Make the node of a name that a former daemon knew, if that is possible without a call into slow layers;
        returns whether. ``layers``: a bit for each layer in which the object was, or that of its parts."""
        return False

    def number(self, parent, bytes name):
        """``st_ino`` and file type (S_IFMT bits) of a name, without creating a node."""
        raise NotImplementedError

    def number_of_bare_whiteout(self, parent, bytes name):
        """The same for a name without an object that overlayfs lists."""
        return None

    def listing(self, directory):
        """The names of a directory. Raises ``OSError``."""
        raise NotImplementedError

    def is_empty(self, directory):
        """Whether a directory has no visible name."""
        return not self.listing(directory).names()

    def add(self, parent, bytes name, st, place):
        """The node of a new object in the real directory ``place``, without lower parts."""
        raise NotImplementedError

    def unnamed(self, parent, held):
        """A node for a new file without a name (O_TMPFILE); ``held`` is an O_PATH fd of it."""
        raise NotImplementedError

    def lost_name(self, node):
        """The last known name of a node was removed; its object is held."""
        raise NotImplementedError

    def opened(self, node, file):
        """Record facts about the object of a node, just opened. Returns where its data lies if not in it (see
        `Node.lower_data`). Raises ``OSError`` for a file that cannot be served."""
        raise NotImplementedError

    def stored_name(self, bytes name):
        """The name on disk of the user's xattr ``name``."""
        return name

    def shown_names(self, list stored):
        """Convert names of xattrs on disk to the names that users see."""
        return stored

    def require_writable(self):
        """Raises EROFS if the territory is read-only."""
        if self.read_only:
            raise failure(EROFS)
