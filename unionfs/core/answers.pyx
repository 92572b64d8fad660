"""Requests that need no decision: answered from the bytes of the request to those of the answer.

    LOOKUP, GETATTR, READLINK     by the tables of nodes and the merge
    READDIR, READDIRPLUS          of directories that are quickly read; see `listings`
    READ                          of what need not wait for a disk; see `reads`
    STATFS                        of the topmost layer
    FORGET, BATCH_FORGET          no answer
    UNLINK, RMDIR, RENAME,        in the plain case; see `namerequests`
    MKDIR, CREATE
    SETATTR                       in the plain case; see `setrequests`
    OPEN, RELEASE                 of files of lowers that are only read, and of files of the upper; see `opens`
    GETXATTR                      of ACLs and security.* as they are stored: the kernel's permission checks, and
                                  security.capability and security.ima of every file that a container engine packs
    LISTXATTR                     of objects without xattrs, which most are

All other requests are handled by Python; see `fuse.direct`. A message that does not have the form that the
protocol prescribes is left to Python too, which reports it.
"""

import logging

from libc.errno cimport EINVAL, EIO, ENODATA, ENOENT, EOPNOTSUPP, ERANGE, ESTALE
from libc.errno cimport errno as c_errno
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memcmp, memset, strcmp, strlen

from unionfs.core.listings cimport Dirents
from unionfs.core.lookup cimport look_up
from unionfs.core.memo cimport Memo, may_ask
from unionfs.core.namerequests cimport name_in
from unionfs.core.node cimport Attributes, Node, count_lookup
from unionfs.core.state cimport is_resent
from unionfs.core.stats cimport failure
from unionfs.core.validity cimport entry_valid, fill_answer, fill_entry
from unionfs.core.wire cimport (
    FUSE_BATCH_FORGET, FUSE_CREATE, FUSE_FORGET, FUSE_GETATTR, FUSE_GETXATTR, FUSE_LISTXATTR, FUSE_LOOKUP,
    FUSE_MKDIR, FUSE_OPEN, FUSE_READ, FUSE_READDIR, FUSE_READDIRPLUS, FUSE_READLINK, FUSE_RELEASE, FUSE_RENAME,
    FUSE_RENAME2, FUSE_RMDIR, FUSE_SETATTR, FUSE_STATFS, FUSE_UNLINK,
    attr_answer, create_answer, entry_answer, fuse_batch_forget_in, fuse_forget_one,
    fuse_out_header, open_answer, statfs_answer,
)

from unionfs.core.memo import Wanted

log = logging.getLogger(__name__)

cdef extern from "<sys/statvfs.h>" nogil:
    cdef struct statvfs_t "statvfs":
        unsigned long f_bsize, f_frsize, f_namemax
        uint64_t f_blocks, f_bfree, f_bavail, f_files, f_ffree
    int fstatvfs(int fd, statvfs_t *st)

cdef extern from "<errno.h>" nogil:
    int ENODEV, ENOTCONN, ECONNABORTED

cdef enum:
    GETATTR_IN = 16
    GETXATTR_IN = 8
    MAX_ERRNO = 511
    # Python answers with a larger value.
    VALUE_SIZE = 4096

cdef struct xattr_answer:
    fuse_out_header header
    char value[VALUE_SIZE]

cdef const char *CAPABILITY = b"security.capability"
cdef const char *ACL = b"system.posix_acl_"
cdef const char *SECURITY = b"security."


cpdef int missing_xattr(Node node, const char *name, bint acl) noexcept:
    """The errno of GETXATTR for a name that is known to be missing, else 0. ``acl``: whether the layers have
    POSIX ACLs."""
    if not acl and begins_with(name, ACL):
        return EOPNOTSUPP
    if node.no_capability and strcmp(name, CAPABILITY) == 0:
        return ENODATA
    return 0


cdef bint begins_with(const char *name, const char *prefix) noexcept:
    return strlen(name) >= strlen(prefix) and memcmp(name, prefix, strlen(prefix)) == 0


cdef bint may_have_happened(uint32_t opcode) noexcept:
    """Whether Python must find out whether a request was carried out before, when it was sent first."""
    return opcode in (
        FUSE_CREATE, FUSE_MKDIR, FUSE_OPEN, FUSE_RENAME, FUSE_RENAME2, FUSE_RMDIR, FUSE_UNLINK
    )


cdef class Answers:
    """Answers requests of one mount."""

    def __init__(
        self, int fd, NodeTable nodes not None, Objects objects not None, Opens opens not None,
        NameRequests names not None, SetRequests sets not None, ListingRequests listings not None,
        Reads reads not None, *, bint acl, enosys, refused
    ):
        """``fd``: the device. ``enosys``: opcodes that the kernel is not to use. ``refused`` is called with the
        bytes of an answer that the kernel did not accept, and the errno."""
        self.fd, self.nodes, self.objects, self.opens, self.names = fd, nodes, objects, opens, names
        self.sets, self.listings, self.reads = sets, listings, reads
        self.acl, self.refused = acl, refused
        self.memo = None
        for number in enosys:
            self.left[number] = True

    def counts(self):
        """The number of requests answered here, by opcode."""
        cdef Py_ssize_t number
        return {number: self.counted[number] for number in range(OPCODES) if self.counted[number]}

    def take(self, const unsigned char[::1] message not None):
        """Answer the request in ``message``; returns False if Python must. For tests and measurements."""
        return bool(self.answer(<const char *>&message[0], message.shape[0])) if message.shape[0] else False

    def puts_aside(self):
        """From now on a request that needs a call on a slow layer is not answered; see
        :meth:`memo_of_last`."""
        self.memo = Memo()

    def memo_of_last(self):
        """The memo of the last request, which was not answered; None where no layer is slow."""
        return self.memo

    def renew_memo(self):
        """The last request keeps its memo, since it is answered later."""
        self.memo = Memo()

    def again(self, const unsigned char[::1] message not None, Memo memo not None):
        """Answer a request that was put aside; returns False if Python must, or if more calls are wanted."""
        own, self.memo, self.repeats = self.memo, memo, True
        try:
            return bool(self.answer(<const char *>&message[0], message.shape[0]))
        finally:
            self.memo, self.repeats = own, False

    cdef int answer(self, const char *message, size_t size) except -1:
        """1: answered, 0: Python must, or it is put aside. Raises no ``Exception``: one request must not end the
        mount."""
        if self.memo is None:
            return self.answer_now(message, size)
        if self.memo.used and not self.repeats:
            self.memo = Memo()
        with self.memo:
            return self.answer_now(message, size)

    cdef int answer_now(self, const char *message, size_t size) except -1:
        cdef const fuse_in_header *header = <const fuse_in_header *>message
        if size < sizeof(fuse_in_header) or header.length != size:
            return 0
        if header.opcode >= OPCODES or self.left[header.opcode]:
            return 0
        if is_resent(header.unique) and may_have_happened(header.opcode):
            return 0
        try:
            return self.begin(header, message + sizeof(fuse_in_header), size - sizeof(fuse_in_header))
        except OSError as error:
            self.fail(header, error.errno or EIO)
        except Wanted:
            return 0
        except Exception:
            log.exception("request %d of node %d failed", header.opcode, header.nodeid)
            self.fail(header, EIO)
        self.counted[header.opcode] += 1
        return 1

    cdef int begin(self, const fuse_in_header *header, const char *body, size_t size) except -1:
        cdef uint32_t number = header.opcode
        cdef int done
        if number == FUSE_LOOKUP:
            done = self.lookup(header, body, size)
        elif number == FUSE_GETATTR:
            done = self.getattr(header, size)
        elif number == FUSE_SETATTR:
            done = self.setattr(header, body, size)
        elif number == FUSE_OPEN or number == FUSE_RELEASE:
            done = self.open_or_release(header, body, size)
        elif number in (FUSE_CREATE, FUSE_MKDIR, FUSE_UNLINK, FUSE_RMDIR, FUSE_RENAME, FUSE_RENAME2):
            done = self.change(header, body, size)
        elif number == FUSE_GETXATTR:
            done = self.getxattr(header, body, size)
        elif number == FUSE_LISTXATTR:
            done = self.listxattr(header, body, size)
        elif number == FUSE_READ:
            done = self.read(header, body, size)
        elif number == FUSE_READDIR or number == FUSE_READDIRPLUS:
            done = self.readdir(header, body, size)
        elif number == FUSE_STATFS:
            done = self.statfs(header)
        elif number == FUSE_READLINK:
            done = self.readlink(header)
        elif number == FUSE_FORGET or number == FUSE_BATCH_FORGET:
            self.forget(header, body, size)
            done = 1
        else:
            return 0
        self.counted[number] += done
        return done

    cdef int lookup(self, const fuse_in_header *header, const char *body, size_t size) except -1:
        cdef entry_answer out
        cdef Attributes found
        cdef Node parent
        cdef bytes name = name_in(body, size)
        if name is None:
            return 0
        parent = self.nodes.found(header.nodeid)
        if parent is None or parent.children is None:
            raise failure(ESTALE)
        if parent.unlinked:
            raise failure(ENOENT)
        found = look_up(parent, name, 0)
        if found is None:
            memset(&out, 0, sizeof(out))
            out.body.entry_valid = entry_valid(parent.territory)
        else:
            count_lookup(found.node, header.unique)
            fill_entry(&out.body, found)
        out.header.length, out.header.error, out.header.unique = sizeof(out), 0, header.unique
        self.send(&out, sizeof(out))
        return 1

    cdef int getattr(self, const fuse_in_header *header, size_t size) except -1:
        cdef attr_answer out
        cdef Attributes found
        cdef Node node
        if size < GETATTR_IN:
            return 0
        node = self.nodes.found(header.nodeid)
        if node is None:
            raise failure(ESTALE)
        found = self.objects.attributes(node)
        fill_answer(&out, found, header.nodeid)
        out.header.unique = header.unique
        self.send(&out, sizeof(out))
        return 1

    cdef int setattr(self, const fuse_in_header *header, const char *body, size_t size) except -1:
        cdef attr_answer out
        cdef size_t length
        try:
            length = self.sets.answer(header, body, size, &out)
            if length:
                out.header.unique = header.unique
                self.send(&out, length)
        finally:
            self.sets.answered()
        return length != 0

    cdef int open_or_release(self, const fuse_in_header *header, const char *body, size_t size) except -1:
        cdef open_answer out
        cdef int length
        if header.opcode == FUSE_OPEN:
            length = self.opens.open(header, body, size, &out)
        else:
            length = self.opens.release(header, body, size, &out)
        if length:
            out.header.unique = header.unique
            self.send(&out, length)
        return length != 0

    cdef int change(self, const fuse_in_header *header, const char *body, size_t size) except -1:
        cdef create_answer out
        cdef size_t length = self.names.answer(header, body, size, &out)
        if length:
            out.header.unique = header.unique
            self.send(&out, length)
        return length != 0

    cdef int read(self, const fuse_in_header *header, const char *body, size_t size) except -1:
        cdef fuse_out_header *answer = self.reads.answer(header, body, size)
        if answer == NULL:
            return 0
        self.send(answer, answer.length)
        return 1

    cdef int readdir(self, const fuse_in_header *header, const char *body, size_t size) except -1:
        cdef Dirents answer = self.listings.answer(header, body, size)
        cdef fuse_out_header out
        cdef iovec parts[2]
        if answer is None:
            return 0
        answer.sent(header.unique)
        out.length, out.error, out.unique = <uint32_t>(sizeof(out) + answer.size), 0, header.unique
        parts[0].iov_base, parts[0].iov_len = &out, sizeof(out)
        parts[1].iov_base, parts[1].iov_len = answer.start(), answer.size
        self.send_parts(parts, 2)
        return 1

    cdef int statfs(self, const fuse_in_header *header) except -1:
        cdef statfs_answer out
        cdef statvfs_t st
        cdef int fd = self.nodes.root.top_layer().root.fd, failed
        if may_ask(fd):
            return 0
        with nogil:
            failed = fstatvfs(fd, &st)
        if failed:
            raise failure(c_errno)
        memset(&out, 0, sizeof(out))
        out.body.blocks, out.body.bfree, out.body.bavail = st.f_blocks, st.f_bfree, st.f_bavail
        out.body.files, out.body.ffree = st.f_files, st.f_ffree
        out.body.bsize, out.body.frsize = <uint32_t>st.f_bsize, <uint32_t>st.f_frsize
        out.body.namelen = <uint32_t>st.f_namemax
        out.header.length, out.header.unique = sizeof(out), header.unique
        self.send(&out, sizeof(out))
        return 1

    cdef int readlink(self, const fuse_in_header *header) except -1:
        cdef Node node = self.nodes.found(header.nodeid)
        cdef fuse_out_header out
        if node is None:
            raise failure(ESTALE)
        if node.place is None and node.held < 0:
            raise failure(EINVAL)
        target = self.objects.readlink(node)
        out.length, out.error, out.unique = sizeof(out) + len(target), 0, header.unique
        answer = (<char *>&out)[:sizeof(out)] + target
        self.send(<char *>answer, len(answer))
        return 1

    cdef int getxattr(self, const fuse_in_header *header, const char *body, size_t size) except -1:
        cdef Node node
        cdef int code
        if size < GETXATTR_IN + 2 or body[size - 1] or strlen(body + GETXATTR_IN) != size - GETXATTR_IN - 1:
            return 0
        node = self.nodes.found(header.nodeid)
        if node is None:
            return 0
        code = missing_xattr(node, body + GETXATTR_IN, self.acl)
        if not code:
            return self.stored_xattr(header, node, body + GETXATTR_IN, (<const uint32_t *>body)[0])
        self.fail(header, code)
        return 1

    cdef int stored_xattr(
        self, const fuse_in_header *header, Node node, const char *name, size_t wanted
    ) except -1:
        """An xattr that every layer stores under its own name, and with its own value."""
        cdef xattr_answer out
        cdef uint32_t *sizes = <uint32_t *>out.value
        cdef ssize_t size
        if not begins_with(name, ACL) and not begins_with(name, SECURITY):
            return 0
        if node.territory.owners is not None or node.top_layer().permissions is not None:
            return 0
        size = self.objects.xattr(node, name, out.value, sizeof(out.value))
        if size < 0:
            if size != -ENODATA and size != -EOPNOTSUPP:
                return 0
            self.fail(header, <int>-size)
            return 1
        if wanted and <size_t>size > wanted:
            raise failure(ERANGE)
        if not wanted:  # struct fuse_getxattr_out
            sizes[0], sizes[1], size = <uint32_t>size, 0, 2 * sizeof(uint32_t)
        out.header.length, out.header.error, out.header.unique = sizeof(fuse_out_header) + size, 0, header.unique
        self.send(&out, out.header.length)
        return 1

    cdef int listxattr(self, const fuse_in_header *header, const char *body, size_t size) except -1:
        cdef xattr_answer out
        cdef Node node
        cdef ssize_t found
        if size < GETXATTR_IN:
            return 0
        node = self.nodes.found(header.nodeid)
        if node is None or node.top_layer().permissions is not None:
            return 0
        found = self.objects.xattr(node, NULL, NULL, 0)
        if found != 0 and found != -EOPNOTSUPP:
            return 0
        memset(out.value, 0, sizeof(uint64_t))
        out.header.length, out.header.error, out.header.unique = sizeof(fuse_out_header), 0, header.unique
        if (<const uint32_t *>body)[0] == 0:  # struct fuse_getxattr_out
            out.header.length += sizeof(uint64_t)
        self.send(&out, out.header.length)
        return 1

    cdef void forget(self, const fuse_in_header *header, const char *body, size_t size):
        cdef const fuse_forget_one *one
        cdef size_t index, count = 1
        if header.opcode == FUSE_FORGET:
            if size >= sizeof(uint64_t):
                self.nodes.forget_id(header.nodeid, (<const int64_t *>body)[0])
            return
        if size < sizeof(fuse_batch_forget_in):
            return
        count = (<const fuse_batch_forget_in *>body).count
        one = <const fuse_forget_one *>(body + sizeof(fuse_batch_forget_in))
        for index in range(min(count, (size - sizeof(fuse_batch_forget_in)) // sizeof(fuse_forget_one))):
            self.nodes.forget_id(one[index].nodeid, <int64_t>one[index].nlookup)

    # -- answers --------------------------------------------------------------------------------------

    cdef void fail(self, const fuse_in_header *header, int code):
        """An error; one that the kernel would refuse becomes EIO. FORGET gets no answer."""
        cdef fuse_out_header out
        if header.opcode == FUSE_FORGET or header.opcode == FUSE_BATCH_FORGET:
            return
        out.length, out.unique = sizeof(out), header.unique
        out.error = -code if 0 < code <= MAX_ERRNO else -EIO
        self.send(&out, sizeof(out))

    cdef void send(self, void *answer, size_t size):
        cdef iovec part
        part.iov_base, part.iov_len = answer, size
        self.send_parts(&part, 1)

    cdef void send_parts(self, iovec *parts, int count):
        """Send an answer; drops it if the caller is gone."""
        cdef int index
        if writev(self.fd, parts, count) < 0 and c_errno not in (ENOENT, ENODEV, ENOTCONN, ECONNABORTED):
            code = c_errno
            self.refused(b"".join(
                [(<char *>parts[index].iov_base)[:parts[index].iov_len] for index in range(count)]
            ), code)
