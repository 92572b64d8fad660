"""Requests that change names, in the plain case: UNLINK, RMDIR, RENAME, MKDIR, CREATE.

What is plain, `changing` decides; other requests are left to Python, with nothing changed.
"""

from libc.stdint cimport uint64_t
from libc.string cimport memchr, memset
from posix.fcntl cimport O_ACCMODE, O_RDWR

from unionfs.core.files cimport Handle, OpenFile, new_file
from unionfs.core.node cimport count_lookup
from unionfs.core.stats cimport S_IFDIR, S_IFREG
from unionfs.core.validity cimport fill_entry
from unionfs.core.wire cimport (
    FUSE_CREATE, FUSE_MKDIR, FUSE_RENAME, FUSE_RENAME2, FUSE_RMDIR, FUSE_UNLINK, create_answer, entry_answer,
    fuse_create_in, fuse_mkdir_in, fuse_out_header, fuse_rename2_in,
)

cdef enum:
    PERMISSIONS = 0o7777
    RENAME_IN = 8


cdef bytes name_in(const char *body, size_t size):
    """The one name that the rest of a message is, ended by a null byte; None if it is not one."""
    if size < 2 or memchr(body, 0, size) != body + size - 1 or memchr(body, b"/", size) != NULL:
        return None
    return body[:size - 1]


cdef class NameRequests:
    """Changes names for the requests of one mount."""

    def __init__(
        self, NodeTable nodes not None, EntryChanges changes not None, Handles handles not None, IoModes modes, *,
        bint masks
    ):
        """``modes``: None if the kernel sends no OPEN, so CREATE is left to Python. ``masks``: whether the daemon
        applies the caller's umask."""
        self.nodes, self.changes, self.handles, self.modes, self.masks = nodes, changes, handles, modes, masks

    cdef size_t answer(self, const fuse_in_header *header, const char *body, size_t size, void *out) except? 0:
        """The size of the answer, or 0 if Python must answer. Raises ``OSError``."""
        cdef fuse_out_header *answer = <fuse_out_header *>out
        cdef bint done
        if header.opcode == FUSE_CREATE:
            return self.created(header, body, size, out)
        if header.opcode == FUSE_MKDIR:
            return self.made(header, body, size, out)
        if header.opcode == FUSE_RENAME or header.opcode == FUSE_RENAME2:
            done = self.renamed(header, body, size)
        else:
            parent, name = self.directory(header.nodeid), name_in(body, size)
            if parent is None or name is None:
                return 0
            if header.opcode == FUSE_UNLINK:
                done = self.changes.unlink(parent, name)
            else:
                done = self.changes.rmdir(parent, name)
        answer.length, answer.error = sizeof(fuse_out_header), 0
        return sizeof(fuse_out_header) if done else 0

    cdef Node directory(self, id_):
        """An existing directory, or None."""
        cdef Node node = self.nodes.found(id_)
        return None if node is None or node.children is None or node.unlinked else node

    cdef Attributes make(
        self, New *new, const fuse_in_header *header, const char *body, size_t size, uint32_t umask
    ):
        """Make an object of which ``body`` is the name; see `EntryChanges.made`."""
        cdef Node parent = self.directory(header.nodeid)
        cdef bytes name = name_in(body, size)
        if parent is None or name is None:
            return None
        new.uid, new.gid, new.rdev, new.target = header.uid, header.gid, 0, NULL
        return self.changes.made(new, parent, name, umask if self.masks else 0)

    cdef size_t made(self, const fuse_in_header *header, const char *body, size_t size, void *out) except? 0:
        """MKDIR."""
        cdef const fuse_mkdir_in *given = <const fuse_mkdir_in *>body
        cdef entry_answer *answer = <entry_answer *>out
        cdef Attributes found
        cdef New new
        if size < sizeof(fuse_mkdir_in):
            return 0
        new.mode, new.opens = S_IFDIR | (given.mode & PERMISSIONS), False
        found = self.make(
            &new, header, body + sizeof(fuse_mkdir_in), size - sizeof(fuse_mkdir_in), given.umask
        )
        if found is None:
            return 0
        count_lookup(found.node, header.unique)
        fill_entry(&answer.body, found)
        answer.header.length, answer.header.error = sizeof(entry_answer), 0
        return sizeof(entry_answer)

    cdef size_t created(self, const fuse_in_header *header, const char *body, size_t size, void *out) except? 0:
        """CREATE."""
        cdef const fuse_create_in *given = <const fuse_create_in *>body
        cdef create_answer *answer = <create_answer *>out
        cdef Attributes found
        cdef OpenFile file
        cdef New new
        cdef Node node
        cdef uint64_t number
        if size < sizeof(fuse_create_in) or self.modes is None:
            return 0
        self.handles.may_hold(header.uid)
        new.mode, new.opens = S_IFREG | (given.mode & PERMISSIONS), True
        found = self.make(
            &new, header, body + sizeof(fuse_create_in), size - sizeof(fuse_create_in), given.umask
        )
        if found is None:
            return 0
        node = found.node
        file = new_file(new.fd, not node.place.layer.memory, None)
        node.in_use().file = file
        number = self.handles.add(
            node, file, None, header.uid, given.flags & O_ACCMODE != 0, given.flags & O_ACCMODE == O_RDWR,
            header.unique,
        )
        try:
            self.modes.open_in_place(self.handles.by_number[number], &answer.open)
        except BaseException:
            self.handles.remove(number)
            raise
        count_lookup(node, header.unique)
        fill_entry(&answer.entry, found)
        answer.open.fh = number
        answer.header.length, answer.header.error = sizeof(create_answer), 0
        return sizeof(create_answer)

    cdef bint renamed(self, const fuse_in_header *header, const char *body, size_t size) except -1:
        """RENAME and RENAME2 without flags: returns whether it is done."""
        cdef const fuse_rename2_in *given = <const fuse_rename2_in *>body
        cdef size_t start = RENAME_IN if header.opcode == FUSE_RENAME else sizeof(fuse_rename2_in), length
        cdef const char *end
        if size < start or (header.opcode == FUSE_RENAME2 and given.flags):
            return False
        end = <const char *>memchr(body + start, 0, size - start)
        if end == NULL:
            return False
        length = end - body - start + 1
        name = name_in(body + start, length)
        new_name = name_in(body + start + length, size - start - length)
        parent, new_parent = self.directory(header.nodeid), self.directory(given.newdir)
        if name is None or new_name is None or parent is None or new_parent is None:
            return False
        return self.changes.rename(parent, name, new_parent, new_name)
