"""READ of files whose data is there at once.

The data goes from the file straight behind the header of the answer. Python answers where a read may wait for a
disk, large ones, which are spliced, and the first one of a file that is not open and not a lower's plain one.
"""

from libc.stdlib cimport free, malloc

from unionfs.core.node cimport Node
from unionfs.core.opening cimport is_plain
from unionfs.core.wire cimport fuse_read_in

#: The minimum size of a read to splice, in bytes.
SPLICED = 128 * 1024

cdef enum:
    C_SPLICED = 128 * 1024


cdef class Reads:
    """Reads files for the requests of one mount."""

    # buffer: an answer.

    def __cinit__(self):
        self.buffer = <char *>malloc(sizeof(fuse_out_header) + C_SPLICED)
        if self.buffer == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.buffer)

    def __init__(
        self, NodeTable nodes not None, Handles handles not None, Opener opener not None, KeptFiles kept not None
    ):
        """``kept``: the files to read for requests without a file handle."""
        self.nodes, self.handles, self.opener, self.kept = nodes, handles, opener, kept

    cdef fuse_out_header *answer(self, const fuse_in_header *header, const char *body, size_t size) except? NULL:
        """The answer, valid until the next one; NULL: Python must answer. Raises ``OSError``."""
        cdef const fuse_read_in *given = <const fuse_read_in *>body
        cdef fuse_out_header *answer = <fuse_out_header *>self.buffer
        cdef OpenFile file
        cdef ssize_t count
        if size < sizeof(fuse_read_in) or given.size >= C_SPLICED:
            return NULL
        file = self.file(header.nodeid, given.fh)
        if file is None:
            return NULL
        count = file.read_now(self.buffer + sizeof(fuse_out_header), given.size, given.offset)
        if count < 0:
            return NULL
        self.handles.bytes_read += count
        answer.length, answer.error, answer.unique = sizeof(fuse_out_header) + count, 0, header.unique
        return answer

    cdef OpenFile file(self, uint64_t id_, uint64_t number):
        """The file to read, or None. Raises ``OSError``."""
        cdef OpenFile file
        cdef Node node
        if number:
            handle = self.handles.found(number)
            return None if handle is None else handle.file
        node = self.nodes.found(id_)
        if node is None:
            return None
        file = self.kept.find(node, False)
        if file is None and is_plain(node):
            file = self.opener.lend(node, node.in_use())
            if file is not None:
                self.kept.keep(node, file)
        return file
