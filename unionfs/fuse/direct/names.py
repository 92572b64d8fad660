"""Requests for names, attributes and xattrs: handlers that translate and answer.

`core.namerequests` has tried the plain case of those that change names.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import Final

from unionfs.core import layercalls
from unionfs.core.node import Attributes, Node
from unionfs.core.setrequests import are_kept_times, error_to_answer
from unionfs.core.setting import Change
from unionfs.fuse.direct.former import is_removed, is_renamed, made
from unionfs.fuse.direct.loop import Answer, Waiting
from unionfs.fuse.direct.nodeio import NodeIos
from unionfs.fuse.direct.writeback import WriteBack
from unionfs.fuse.operations import Named, Operations
from unionfs.fuse.protocol import FOREVER, NEVER, Decision, Init, Opcode, Reply, Timeout, encode
from unionfs.fuse.protocol import requests as rq
from unionfs.fuse.protocol.flags import (
    FATTR_ATIME,
    FATTR_CTIME,
    FATTR_FH,
    FATTR_GID,
    FATTR_KILL_SUIDGID,
    FATTR_LOCKOWNER,
    FATTR_MODE,
    FATTR_MTIME,
    FATTR_SIZE,
    FATTR_UID,
    SETXATTR_ACL_KILL_SGID,
)
from unionfs.sys import calls
from unionfs.sys.calls import os_error
from unionfs.union.changes import Caller
from unionfs.union.setids import mode_after
from unionfs.union.xattrs import CAPABILITY

_NS: Final = 1_000_000_000


class NameRequests:
    """Handlers by opcode in `table`; those of `waiting` are coroutine functions."""

    def __init__(self, operations: Operations, ios: NodeIos, decision: Decision) -> None:
        self._operations = operations
        self._union = operations.union
        self._ios = ios
        #: Whether the daemon applies the caller's umask.
        self._masks = bool(decision.flags & Init.DONT_MASK)
        #: Preserves attributes while data is written back; None without write-back.
        writes_back = bool(decision.flags & Init.WRITEBACK_CACHE)
        self.write_back = WriteBack(operations.union.capabilities) if writes_back else None
        #: The last node and thread (pid) for which the kernel removed a file capability.
        self._capability_removed: tuple[int, int] | None = None
        #: Whether the kernel sends no OPEN.
        self._opens_unseen = Opcode.OPEN in decision.enosys
        self.table: dict[Opcode, Answer] = {
            Opcode.STATX: self._statx,
            Opcode.SYMLINK: self._symlink,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.RMDIR: self._rmdir,
            Opcode.STATFS: self._statfs,
            Opcode.GETXATTR: self._getxattr,
            Opcode.LISTXATTR: self._listxattr,
        }
        self.waiting: dict[Opcode, Waiting] = {
            Opcode.SETATTR: self._setattr,
            Opcode.UNLINK: self._unlink,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename2,
            Opcode.LINK: self._link,
            Opcode.SETXATTR: self._setxattr,
            Opcode.REMOVEXATTR: self._removexattr,
            Opcode.FSYNCDIR: self._fsyncdir,
            Opcode.SYNCFS: self._syncfs,
        }

    # -- answers --------------------------------------------------------------------------------------

    def _entry(self, unique: int, found: Named) -> Reply:
        """An entry, which counts one lookup."""
        return encode.data(unique, self.entry_out(found, unique))

    def entry_out(self, found: Named, unique: int) -> bytes:
        """An entry as part of another answer, which counts one lookup."""
        node, attributes = found
        node.looked_up(unique)
        return encode.entry_out(
            node.id,
            node.generation,
            FOREVER if node.territory.lasting else NEVER,
            self._ios.valid(node, attributes),
            attributes.packed(),
        )

    def _valid(self, id_: int, node: Node, attributes: Attributes) -> Timeout:
        # Notices about changes of the node that superseded this one contain the new id.
        return self._ios.valid(node, attributes) if node.id == id_ else NEVER

    def _attributes(self, request_id: int, unique: int, found: Named) -> Reply:
        node, attributes = found
        return encode.attr(
            unique,
            self._valid(request_id, node, attributes),
            attributes.packed(),
        )

    def caller(self, request: rq.Mknod | rq.Mkdir | rq.Create) -> Caller:
        """The creator of an object, with the umask to apply."""
        return Caller(request.uid, request.gid, request.umask if self._masks else 0)

    # -- names ----------------------------------------------------------------------------------------

    def _symlink(self, request: rq.Symlink) -> Reply:
        found = self._made_before(request, stat.S_IFLNK)
        if found is None:
            caller = Caller(request.uid, request.gid)
            found = self._operations.symlink(request.nodeid, request.name, request.target, caller)
        return self._entry(request.unique, found)

    def _made_before(self, request: rq.Symlink | rq.Mknod | rq.Mkdir, kind: int) -> Named | None:
        """The object that a request made which is sent again."""
        return made(self._operations, request.nodeid, request.name, kind) if request.resent else None

    def _mknod(self, request: rq.Mknod) -> Reply:
        found = self._made_before(request, stat.S_IFMT(request.mode) or stat.S_IFREG)
        if found is None:
            found = self._operations.mknod(
                request.nodeid, request.name, request.mode, request.rdev, self.caller(request)
            )
        return self._entry(request.unique, found)

    def _mkdir(self, request: rq.Mkdir) -> Reply:
        found = self._made_before(request, stat.S_IFDIR)
        if found is None:
            found = self._operations.mkdir(
                request.nodeid, request.name, request.mode, self.caller(request), tried=not request.resent
            )
        return self._entry(request.unique, found)

    async def _unlink(self, request: rq.Unlink) -> Reply:
        if not (request.resent and is_removed(self._operations, request.nodeid, request.name)):
            await self._operations.unlink(
                request.nodeid, request.name, request.uid, tried=not request.resent
            )
        return encode.ok(request.unique)

    def _rmdir(self, request: rq.Rmdir) -> Reply:
        if not (request.resent and is_removed(self._operations, request.nodeid, request.name)):
            self._operations.rmdir(request.nodeid, request.name, tried=not request.resent)
        return encode.ok(request.unique)

    async def _rename(self, request: rq.Rename) -> Reply:
        if not (request.resent and is_renamed(self._operations, request)):
            await self._operations.rename(
                request.nodeid, request.name, request.newdir, request.newname, 0, request.uid,
                tried=not request.resent,
            )
        return encode.ok(request.unique)

    async def _rename2(self, request: rq.Rename2) -> Reply:
        if not (request.resent and is_renamed(self._operations, request)):
            await self._operations.rename(
                request.nodeid, request.name, request.newdir, request.newname, request.flags, request.uid,
                tried=not request.resent, unique=request.unique,
            )
        return encode.ok(request.unique)

    async def _link(self, request: rq.Link) -> Reply:
        found = None
        if request.resent:
            linked = self._operations.node(request.oldnodeid)
            found = made(self._operations, request.nodeid, request.name, linked.kind)
        if found is None:
            found = await self._operations.link(
                request.oldnodeid, request.nodeid, request.name, request.uid
            )
        return self._entry(request.unique, found)

    # -- attributes -----------------------------------------------------------------------------------

    def _statx(self, request: rq.Statx) -> Reply:
        node, attributes = self._operations.getattr(request.nodeid)
        with self._union.checked_path(node) as path:
            raw = layercalls.call(_statx, path, request.sx_mask)
        patched = bytearray(raw)
        # Some fields of struct statx, include/uapi/linux/stat.h: stx_nlink, stx_uid, stx_gid, stx_mode,
        # stx_blocks, stx_ctime, stx_rdev_major and stx_rdev_minor
        st = attributes.st
        struct.pack_into("=IIIH", patched, 16, attributes.nlink, st.st_uid, st.st_gid, st.st_mode)
        struct.pack_into("=II", patched, 128, os.major(st.st_rdev), os.minor(st.st_rdev))
        struct.pack_into("=Q", patched, 48, st.st_blocks)
        struct.pack_into("=qI", patched, 96, *divmod(attributes.ctime_ns, _NS))
        return encode.statx(
            request.unique, self._valid(request.nodeid, node, attributes), patched, attributes.ino
        )

    async def _setattr(self, request: rq.Setattr) -> Reply:
        valid = request.valid
        if self._is_mtime_of_removed(request):
            return self._attributes(
                request.nodeid, request.unique, self._operations.getattr(request.nodeid)
            )
        change = Change(
            size=request.size if valid & FATTR_SIZE else None,
            uid=request.new_uid if valid & FATTR_UID else None,
            gid=request.new_gid if valid & FATTR_GID else None,
            mode=request.mode if valid & FATTR_MODE else None,
            atime_ns=request.atime * _NS + request.atimensec if valid & FATTR_ATIME else None,
            mtime_ns=request.mtime * _NS + request.mtimensec if valid & FATTR_MTIME else None,
            killer=request if valid & FATTR_KILL_SUIDGID or self._only_kills(request) else None,
        )
        handle = self._operations.files.get(request.fh) if valid & FATTR_FH else None
        try:
            found = await self._operations.setattr(request.nodeid, change, handle, request.uid)
        except OSError as error:
            raise error_to_answer(error, valid) from None
        if self._operations.invalidations.now and found[0].id == request.nodeid:
            self._operations.invalidations.answered(found[0])
        if self.write_back is not None and change.mtime_ns is not None:
            self.write_back.mtime_set(found[0], change.mtime_ns)
        return self._attributes(request.nodeid, request.unique, found)

    def _is_mtime_of_removed(self, request: rq.Setattr) -> bool:
        """Whether the request changes only the ctime of a lower file, because its name was removed.

        With writeback the kernel sends them when it forgets the file. A copy-up for that would be useless.
        """
        if not are_kept_times(request.valid):
            return False
        node = self._operations.node(request.nodeid)
        if node.in_place or not node.unlinked:
            return False
        return self._union.stat(node).st_mtime_ns == request.mtime * _NS + request.mtimensec

    def _only_kills(self, request: rq.Setattr) -> bool:
        """Whether a SETATTR without changes requests clearing of setuid and setgid. Raises EPERM.

        With HANDLE_KILLPRIV_V2 the kernel sends it for a write through a backing file (fs/backing-file.c,
        file_remove_privs) or for a chown without an owner, whose permission check it leaves to the daemon. It
        is a chown if it has a ctime, which is sent with writeback, or if the file is not open for writing.
        """
        valid = request.valid
        if valid & ~(FATTR_FH | FATTR_LOCKOWNER | FATTR_CTIME):
            return False
        node, attributes = self._operations.getattr(request.nodeid)
        if node.is_dir:
            return False  # chown(2) keeps them on directories
        writes = node.kind == stat.S_IFREG and (
            self._opens_unseen or (node.use is not None and any(handle.writes for handle in node.use.handles))
        )
        if writes and not valid & FATTR_CTIME:
            if request.uid != 0:
                return True
            if (request.nodeid, request.pid) == self._capability_removed:
                # A write of root, which keeps the bits. It is sent because the kernel has just removed the
                # file's capability (fs/attr.c, notify_change); otherwise none is, so it is a chown.
                self._capability_removed = None
                return False
        if mode_after(attributes.st, request) is None:
            return False
        if request.uid not in (0, attributes.st.st_uid):
            raise os_error(errno.EPERM)
        return True

    def _statfs(self, request: rq.Statfs) -> Reply:
        return encode.statfs(request.unique, self._operations.statfs())

    # -- extended attributes --------------------------------------------------------------------------

    def _getxattr(self, request: rq.Getxattr) -> Reply:
        value = self._operations.getxattr(request.nodeid, request.name)
        return _sized(request.unique, value, request.size)

    def _listxattr(self, request: rq.Listxattr) -> Reply:
        names = self._operations.listxattr(request.nodeid, request.uid)
        return _sized(request.unique, b"".join(name + b"\0" for name in names), request.size)

    async def _setxattr(self, request: rq.Setxattr) -> Reply:
        node = await self._operations.setxattr(
            request.nodeid, request.name, request.value, request.uid, request.flags, request.unique
        )
        if request.name == CAPABILITY and self.write_back is not None:
            self.write_back.capability_set(node, bytes(request.value))
        if request.setxattr_flags & SETXATTR_ACL_KILL_SGID:
            self._operations.drop_group_set_id(node)
        return encode.ok(request.unique)

    async def _removexattr(self, request: rq.Removexattr) -> Reply:
        if request.name == CAPABILITY and self.write_back is not None:
            self.write_back.capability_set(self._operations.node(request.nodeid), None)
        if request.name == CAPABILITY:
            self._capability_removed = request.nodeid, request.pid
        await self._operations.removexattr(request.nodeid, request.name, request.uid, request.unique)
        return encode.ok(request.unique)

    # -- durability -----------------------------------------------------------------------------------

    async def _fsyncdir(self, request: rq.Fsyncdir) -> Reply:
        await self._operations.fsyncdir(request.nodeid)
        return encode.ok(request.unique)

    async def _syncfs(self, request: rq.Syncfs) -> Reply:
        await self._operations.syncfs()
        return encode.ok(request.unique)


def _statx(path: bytes, mask: int) -> bytes:
    return calls.statx(calls.AT_FDCWD, path, 0, mask)


def _sized(unique: int, value: bytes, size: int) -> Reply:
    """The answer to GETXATTR and LISTXATTR: the value, or its size if ``size`` is 0."""
    if size == 0:
        return encode.xattr_size(unique, len(value))
    if len(value) > size:
        raise os_error(errno.ERANGE)
    return encode.data(unique, value)
