"""The requests of the kernel as typed values: one class for each supported opcode.

Rules:
- For the creation of a class, and the check of its fields against the ABI, see request.py.
- Names are bytes without the final NUL, never empty, never with a slash (except b"/" in TMPFILE).
- `data` (WRITE, IOCTL, Unknown) is a view on the receive buffer, not a copy: consume it before the next read
  into the buffer. Everything else is copied and may be kept.
- Offsets and sizes are bytes, times seconds and nanoseconds since 1970, `rdev` is the result of `os.makedev`
  (fs/fuse/dir.c sends new_encode_dev(), which is the same 32 bits for majors below 4096).
- A request without a handler has no class: it arrives as `Unknown`, and the answer is ENOSYS.

Source: include/uapi/linux/fuse.h 7.45; for the order of arguments, fs/fuse/dir.c, file.c, xattr.c, ioctl.c
of Linux 6.18. A number like 7.40 in a docstring is the protocol version of the request (flags.LINUX maps it
to a release); those without one are older than 7.23, Linux 3.15.
"""

from __future__ import annotations

from unionfs.fuse.protocol.flags import Opcode
from unionfs.fuse.protocol.request import Request

# -- the connection -------------------------------------------------------------------------------------


class InitRequest(Request, opcode=Opcode.INIT):
    """The kernel's version and offer. `flags` has all 64 bits, the upper half with INIT_EXT (7.36)."""

    __slots__ = ()
    major: int
    minor: int
    max_readahead: int
    flags: int


class Interrupt(
    Request, opcode=Opcode.INTERRUPT, body="fuse_interrupt_in", renamed={"unique": "interrupted"}
):
    """The caller of request `interrupted` got a signal. May arrive before or after that request is done."""

    __slots__ = ()
    interrupted: int


# -- names, attributes ----------------------------------------------------------------------------------


class Lookup(Request, opcode=Opcode.LOOKUP):
    """Look `name` up in directory `nodeid`. An entry as answer counts one lookup, released by FORGET."""

    __slots__ = ()
    name: bytes


class Forget(Request, opcode=Opcode.FORGET, body="fuse_forget_in"):
    """Release `nlookup` lookups of `nodeid`. No answer."""

    __slots__ = ()
    nlookup: int


class BatchForget(
    Request, opcode=Opcode.BATCH_FORGET, body="fuse_batch_forget_in", renamed={"count": "entries"}
):
    """Many FORGETs: `forgets` are `entries` pairs (nodeid, nlookup). No answer."""

    __slots__ = ()
    entries: int
    forgets: tuple[tuple[int, int], ...]


class Getattr(Request, opcode=Opcode.GETATTR, body="fuse_getattr_in"):
    """`fh` counts only with GETATTR_FH in `getattr_flags`."""

    __slots__ = ()
    getattr_flags: int
    fh: int


class Statx(Request, opcode=Opcode.STATX, body="fuse_statx_in"):
    """7.39. Sent for attributes missing in GETATTR (btime); `sx_flags`, `sx_mask` as in statx(2)."""

    __slots__ = ()
    getattr_flags: int
    fh: int
    sx_flags: int
    sx_mask: int


class Setattr(
    Request, opcode=Opcode.SETATTR, body="fuse_setattr_in", renamed={"uid": "new_uid", "gid": "new_gid"}
):
    """Change the attributes in `valid` (FATTR_*); ignore other fields. Times may be before 1970."""

    __slots__ = ()
    valid: int
    fh: int
    size: int
    lock_owner: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    new_uid: int
    new_gid: int


class Readlink(Request, opcode=Opcode.READLINK):
    """The target of the symlink `nodeid`."""

    __slots__ = ()


class Statfs(Request, opcode=Opcode.STATFS):
    """statfs(2) of the filesystem."""

    __slots__ = ()


class Syncfs(Request, opcode=Opcode.SYNCFS, body="fuse_syncfs_in"):
    """7.34. syncfs(2). The kernel sends it for virtiofs only, up to 6.18."""

    __slots__ = ()


# -- creation, removal, renaming ------------------------------------------------------------------------


class Symlink(Request, opcode=Opcode.SYMLINK):
    """Create `name` in directory `nodeid`, pointing to `target`."""

    __slots__ = ()
    name: bytes
    target: bytes


class Mknod(Request, opcode=Opcode.MKNOD, body="fuse_mknod_in"):
    """`mode` includes the type and, without DONT_MASK, is already masked; `umask` is the caller's."""

    __slots__ = ()
    mode: int
    rdev: int
    umask: int
    name: bytes


class Mkdir(Request, opcode=Opcode.MKDIR, body="fuse_mkdir_in"):
    """Like MKNOD, for a directory."""

    __slots__ = ()
    mode: int
    umask: int
    name: bytes


class Create(Request, opcode=Opcode.CREATE, body="fuse_create_in"):
    """Create and open a file; `flags` as in open(2), `open_flags` FUSE's own (OPEN_KILL_SUIDGID)."""

    __slots__ = ()
    flags: int
    mode: int
    umask: int
    open_flags: int
    name: bytes


class Tmpfile(Create, opcode=Opcode.TMPFILE, body="fuse_create_in"):
    """7.37. O_TMPFILE in directory `nodeid`: like CREATE, but `name` is unused (the kernel sends b"/")."""

    __slots__ = ()


class Unlink(Request, opcode=Opcode.UNLINK):
    """Remove `name`, which is not a directory, from directory `nodeid`."""

    __slots__ = ()
    name: bytes


class Rmdir(Request, opcode=Opcode.RMDIR):
    """Remove the directory `name` from directory `nodeid`."""

    __slots__ = ()
    name: bytes


class Rename(Request, opcode=Opcode.RENAME, body="fuse_rename_in"):
    """Rename `name` in directory `nodeid` to `newname` in directory `newdir`."""

    __slots__ = ()
    newdir: int
    name: bytes
    newname: bytes


class Rename2(Request, opcode=Opcode.RENAME2, body="fuse_rename2_in"):
    """RENAME with the flags of renameat2(2); sent when they are not 0."""

    __slots__ = ()
    newdir: int
    flags: int
    name: bytes
    newname: bytes


class Link(Request, opcode=Opcode.LINK, body="fuse_link_in"):
    """Create a hard link to `oldnodeid`: `name` in directory `nodeid`."""

    __slots__ = ()
    oldnodeid: int
    name: bytes


# -- open files -----------------------------------------------------------------------------------------


class Open(Request, opcode=Opcode.OPEN, body="fuse_open_in"):
    """`flags` as in open(2), without O_CREAT, O_EXCL, O_NOCTTY; O_TRUNC only with ATOMIC_O_TRUNC."""

    __slots__ = ()
    flags: int
    open_flags: int


class Read(Request, opcode=Opcode.READ, body="fuse_read_in"):
    """`lock_owner` counts only with READ_LOCKOWNER in `read_flags`; `flags` are the file's, as in open(2)."""

    __slots__ = ()
    fh: int
    offset: int
    size: int
    read_flags: int
    lock_owner: int
    flags: int


class Write(Request, opcode=Opcode.WRITE, body="fuse_write_in"):
    """`data` is `size` bytes of the receive buffer. `write_flags`: WRITE_CACHE, WRITE_KILL_SUIDGID ..."""

    __slots__ = ()
    fh: int
    offset: int
    size: int
    write_flags: int
    lock_owner: int
    flags: int
    data: memoryview


class Release(Request, opcode=Opcode.RELEASE, body="fuse_release_in"):
    """The open file is closed. The kernel ignores an error."""

    __slots__ = ()
    fh: int
    flags: int
    release_flags: int
    lock_owner: int


class Fsync(Request, opcode=Opcode.FSYNC, body="fuse_fsync_in"):
    """`fsync_flags`: FSYNC_FDATASYNC."""

    __slots__ = ()
    fh: int
    fsync_flags: int


class Fallocate(Request, opcode=Opcode.FALLOCATE, body="fuse_fallocate_in"):
    """fallocate(2); `mode` is FALLOC_FL_*."""

    __slots__ = ()
    fh: int
    offset: int
    length: int
    mode: int


class Lseek(Request, opcode=Opcode.LSEEK, body="fuse_lseek_in"):
    """7.24. SEEK_DATA or SEEK_HOLE only."""

    __slots__ = ()
    fh: int
    offset: int
    whence: int


class CopyFileRange(Request, opcode=Opcode.COPY_FILE_RANGE, body="fuse_copy_file_range_in"):
    """7.28. The answer is a `write`, 32 bits wide: copy at most 4 GiB - 1."""

    __slots__ = ()
    fh_in: int
    off_in: int
    nodeid_out: int
    fh_out: int
    off_out: int
    len: int
    flags: int


class CopyFileRange64(CopyFileRange, opcode=Opcode.COPY_FILE_RANGE_64, body="fuse_copy_file_range_in"):
    """7.45. Tried first; ENOSYS makes the kernel fall back to COPY_FILE_RANGE."""

    __slots__ = ()


class Ioctl(Request, opcode=Opcode.IOCTL, body="fuse_ioctl_in"):
    """`data` has the `in_size` bytes encoded in the command's number; the answer has up to `out_size`."""

    __slots__ = ()
    fh: int
    flags: int
    cmd: int
    arg: int
    in_size: int
    out_size: int
    data: memoryview


# -- directories ----------------------------------------------------------------------------------------


class Readdir(Request, opcode=Opcode.READDIR, body="fuse_read_in"):
    """Entries after the one whose `off` was `offset` (0: from the start), at most `size` bytes."""

    __slots__ = ()
    fh: int
    offset: int
    size: int
    read_flags: int
    lock_owner: int
    flags: int


class Readdirplus(Readdir, opcode=Opcode.READDIRPLUS, body="fuse_read_in"):
    """Like READDIR, each entry with LOOKUP's answer; an entry with a nodeid counts one lookup."""

    __slots__ = ()


class Fsyncdir(Fsync, opcode=Opcode.FSYNCDIR, body="fuse_fsync_in"):
    """Like FSYNC, for a directory."""

    __slots__ = ()


# -- extended attributes --------------------------------------------------------------------------------


class Setxattr(Request, opcode=Opcode.SETXATTR, body="fuse_setxattr_in"):
    """`flags` as in setxattr(2); `setxattr_flags` is 0 unless SETXATTR_EXT was agreed (7.33)."""

    __slots__ = ()
    size: int
    flags: int
    setxattr_flags: int
    name: bytes
    value: bytes


class Getxattr(Request, opcode=Opcode.GETXATTR, body="fuse_getxattr_in"):
    """`size` 0 requests the value's size; else the value must fit `size`, or the answer is ERANGE."""

    __slots__ = ()
    size: int
    name: bytes


class Listxattr(Request, opcode=Opcode.LISTXATTR, body="fuse_getxattr_in"):
    """Like GETXATTR; the value is the names, each ended by a NUL."""

    __slots__ = ()
    size: int


class Removexattr(Request, opcode=Opcode.REMOVEXATTR):
    """Remove xattr `name`."""

    __slots__ = ()
    name: bytes
