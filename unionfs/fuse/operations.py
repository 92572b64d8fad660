"""The union as a FUSE filesystem: requests in, replies out.

The only place where results of ``unionfs.union`` become FUSE replies and ``OSError`` becomes ``FUSEError``.
A handler without ``await`` runs to its end undisturbed: that is what keeps the node table and the layers in
step, so everything between finding a node and changing it happens without one. What may take long (copying
data, fsync, reading from a disk, listing a huge directory) runs in a thread on fds of its own.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, ParamSpec, TypeVar

import pyfuse3
import trio

from unionfs.fuse.permissions import group_set_id_goes
from unionfs.sys import calls
from unionfs.union.changes import Caller, Changes
from unionfs.union.copyup import FileCopy, copy_up_special, ensure_upper
from unionfs.union.files import Handle, OpenFile, mode_without_set_ids
from unionfs.union.listing import Listing
from unionfs.union.nodes import Node
from unionfs.union.places import open_for_listing
from unionfs.union.tree import Attributes, Union

log = logging.getLogger(__name__)

#: Seconds; only this daemon changes the tree, so what the kernel knows stays true.
FOREVER: Final = 1e9
#: A write above this many bytes goes to a thread: the disk may make it wait.
_LONG_WRITE: Final = 256 * 1024
_ACL: Final = b"system.posix_acl_"

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _request(handler: Callable[_P, Coroutine[Any, Any, _T]]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """Count the request; no exception but ``FUSEError`` leaves it, for that would end the daemon."""
    kind = handler.__name__

    @functools.wraps(handler)
    async def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        operations = args[0]
        assert isinstance(operations, UnionOperations)
        operations.requests[kind] += 1
        try:
            try:
                return await handler(*args, **kwargs)
            finally:
                if operations.union.stale:
                    await operations.invalidate_attributes()
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except pyfuse3.FUSEError:
            raise
        except Exception:
            log.exception("%s%r failed", kind, args[1:])
            raise pyfuse3.FUSEError(errno.EIO) from None

    return guarded


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class _OpenDirectory:
    __slots__ = ("names", "node")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.names: list[bytes] | None = None


class UnionOperations(pyfuse3.Operations):  # type: ignore[misc,unused-ignore]
    """Serves one union; any session may drive it."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, union: Union) -> None:
        super().__init__()
        self.union = union
        self.changes = Changes(union)
        self.enable_acl = union.stack.acl
        self.on_init: Callable[[], None] | None = None
        self.requests: Counter[str] = Counter()
        self.copy_ups = 0
        self.copied_bytes = 0
        self._handles: dict[int, Handle] = {}
        self._directories: dict[int, _OpenDirectory] = {}
        self._next_handle = 1

    def init(self) -> None:
        """The kernel and the session agreed: the mount is usable."""
        if self.on_init is not None:
            self.on_init()

    def figures(self) -> dict[str, object]:
        """What the mount has done and holds now; all JSON-able."""
        return {
            "requests": dict(sorted(self.requests.items())),
            "nodes": len(self.union.nodes),
            "open_files": len(self._handles),
            "open_directories": len(self._directories),
            "directory_fds": len(self.union.gate),
            "copy_ups": self.copy_ups,
            "copied_bytes": self.copied_bytes,
        }

    async def invalidate_attributes(self) -> None:
        """Let the kernel ask again for attributes that a copy-up changed; before the reply, so that nobody
        sees the old ones after it. In a thread: a notice may have to wait for requests that we serve.
        """
        stale = {node.id for node in self.union.stale if node.lookups > 0}
        self.union.stale.clear()
        await trio.to_thread.run_sync(_invalidate, stale)

    # -- helpers --------------------------------------------------------------------------------------

    def _node(self, id_: int) -> Node:
        node = self.union.nodes.get(id_)
        if node is None:
            raise _error(errno.ESTALE)
        return node

    def _directory(self, id_: int) -> Node:
        node = self._node(id_)
        if node.unlinked:
            raise _error(errno.ENOENT)
        return node

    def _found(self, node: Node, attributes: Attributes) -> pyfuse3.EntryAttributes:
        """The reply for a name the kernel will remember: one more lookup of the node."""
        node.lookups += 1
        return _entry(attributes)

    async def _copy_up(self, node: Node, limit: int | None = None) -> None:
        """Have the node in the upper. ``limit``: that many bytes of data are enough (truncation)."""
        self.union.require_upper()
        while not node.is_upper:
            if node.copying is not None:
                assert isinstance(node.copying, trio.Event)
                await node.copying.wait()
            elif node.kind == stat.S_IFREG:
                await self._copy_up_file(node, limit)
            elif node.is_dir:
                ensure_upper(self.union, node)
                self.copy_ups += 1
            else:
                copy_up_special(self.union, node)
                self.copy_ups += 1

    async def _copy_up_file(self, node: Node, limit: int | None) -> None:
        copy = FileCopy(self.union, node, limit)
        done = node.copying = trio.Event()
        try:
            if copy.is_quick:
                copy.copy()
            else:
                await trio.to_thread.run_sync(copy.copy)
            copy.finish()
            self.copy_ups += 1
            self.copied_bytes += copy.size
        finally:
            copy.abort()
            node.copying = None
            done.set()

    def _drop_set_ids(self, file: OpenFile, uid: int) -> None:
        """A write or truncation by anybody but root clears setuid and setgid."""
        if uid != 0:
            mode = mode_without_set_ids(os.fstat(file.fd).st_mode)
            if mode is not None:
                os.fchmod(file.fd, mode)

    # -- names ----------------------------------------------------------------------------------------

    @_request
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        found = self.union.lookup(self._directory(parent_inode), name)
        if found is None:
            return _absent()
        return self._found(*found)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        nodes = self.union.nodes
        for id_, lookups in inode_list:
            node = nodes.get(id_)
            if node is not None:
                try:
                    nodes.forget(node, lookups)
                except Exception:
                    log.exception("forget of node %d failed", id_)
        self.requests["forget"] += 1

    @_request
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent = self._directory(parent_inode)
        return self._found(*self.changes.mkdir(parent, name, stat.S_IMODE(mode), Caller(ctx.uid, ctx.gid)))

    @_request
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent = self._directory(parent_inode)
        return self._found(*self.changes.mknod(parent, name, mode, rdev, Caller(ctx.uid, ctx.gid)))

    @_request
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent = self._directory(parent_inode)
        return self._found(*self.changes.symlink(parent, name, target, Caller(ctx.uid, ctx.gid)))

    @_request
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        node = self._node(inode)
        await self._copy_up(node)
        return self._found(*self.changes.link(node, self._directory(new_parent_inode), new_name))

    @_request
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self.changes.unlink(self._directory(parent_inode), name)

    @_request
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self.changes.rmdir(self._directory(parent_inode), name)

    @_request
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        parent, new_parent = self._directory(parent_inode_old), self._directory(parent_inode_new)
        names = [(parent, name_old)]
        if flags & calls.RENAME_EXCHANGE:
            names.append((new_parent, name_new))
        for directory, name in names:
            found = self.union.lookup(directory, name)
            if found is not None and not found[0].is_dir:
                await self._copy_up(found[0])
        self.changes.rename(parent, name_old, new_parent, name_new, flags)

    @_request
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self.union.readlink(self._node(inode))

    # -- attributes -----------------------------------------------------------------------------------

    @_request
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return _entry(self.union.attributes(self._node(inode)))

    @_request
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        node = self._node(inode)
        await self._copy_up(node, attr.st_size if fields.update_size else None)
        if fields.update_size:
            self._truncate(node, attr.st_size, None if fh is None else self._handles.get(fh), ctx.uid)
        if fields.update_uid or fields.update_gid or fields.update_mode:
            fd = self.union.open_path(node)
            try:
                if fields.update_uid or fields.update_gid:
                    uid = attr.st_uid if fields.update_uid else -1
                    calls.chown_fd(fd, uid, attr.st_gid if fields.update_gid else -1)
                if fields.update_mode:
                    os.chmod(b"/proc/self/fd/%d" % fd, stat.S_IMODE(attr.st_mode))
            finally:
                os.close(fd)
        if fields.update_atime or fields.update_mtime:
            path, follow = self.union.path(node)
            calls.utimensat(
                calls.AT_FDCWD,
                path,
                attr.st_atime_ns if fields.update_atime else None,
                attr.st_mtime_ns if fields.update_mtime else None,
                follow=follow,
            )
        return _entry(self.union.attributes(node))

    def _truncate(self, node: Node, size: int, handle: Handle | None, uid: int) -> None:
        if node.kind != stat.S_IFREG:
            raise _error(errno.EINVAL)
        if handle is not None and handle.file.writable:
            os.ftruncate(handle.file.fd, size)
            self._drop_set_ids(handle.file, uid)
            return
        file = self.union.open_file(node, write=True)
        try:
            os.ftruncate(file.fd, size)
            self._drop_set_ids(file, uid)
        finally:
            self.union.close_file(node, file)

    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True  # the kernel checks (default_permissions)

    @_request
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        stats = os.statvfs(self.union.stack.layers[0].root_fd)
        reply = pyfuse3.StatvfsData()
        for field in _STATVFS:
            setattr(reply, field, getattr(stats, field))
        return reply

    # -- extended attributes --------------------------------------------------------------------------

    @_request
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        if name.startswith(_ACL) and not self.union.stack.acl:
            raise _error(errno.EOPNOTSUPP)
        path, follow = self.union.path(self._node(inode))
        return os.getxattr(path, self.union.markers.stored_name(name), follow_symlinks=follow)

    @_request
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        path, follow = self.union.path(self._node(inode))
        try:
            stored = [os.fsencode(name) for name in os.listxattr(path, follow_symlinks=follow)]
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return []
            raise
        names = self.union.markers.shown_names(stored)
        if ctx.uid != 0:  # as every filesystem does it: trusted.* is for the administrator
            names = [name for name in names if not name.startswith(b"trusted.")]
        if not self.union.stack.acl:
            names = [name for name in names if not name.startswith(_ACL)]
        return names

    @_request
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        if name.startswith(_ACL) and not self.union.stack.acl:
            raise _error(errno.EOPNOTSUPP)
        node = self._node(inode)
        await self._copy_up(node)
        path, follow = self.union.path(node)
        os.setxattr(path, self.union.markers.stored_name(name), value, follow_symlinks=follow)
        if name == _ACL + b"access":
            self._drop_group_set_id(node, ctx)

    def _drop_group_set_id(self, node: Node, ctx: pyfuse3.RequestContext) -> None:
        """An ACL set by somebody outside the file's group clears setgid (fs/posix_acl.c)."""
        st = self.union.stat(node)
        if st.st_mode & stat.S_ISGID and group_set_id_goes(st.st_gid, ctx.uid, ctx.gid, ctx.pid):
            fd = self.union.open_path(node)
            try:
                os.chmod(b"/proc/self/fd/%d" % fd, stat.S_IMODE(st.st_mode) & ~stat.S_ISGID)
            finally:
                os.close(fd)

    @_request
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        node = self._node(inode)
        stored = self.union.markers.stored_name(name)
        path, follow = self.union.path(node)
        if not node.is_upper:
            os.getxattr(path, stored, follow_symlinks=follow)  # nothing to remove is no reason to copy up
        await self._copy_up(node)
        path, follow = self.union.path(node)
        os.removexattr(path, stored, follow_symlinks=follow)

    # -- files ----------------------------------------------------------------------------------------

    def _register(self, node: Node, file: OpenFile, uid: int, *, writes: bool) -> pyfuse3.FileInfo:
        handle = Handle(node, file, uid, writes=writes)
        if node.handles is None:
            node.handles = []
        node.handles.append(handle)
        number = self._next_handle
        self._next_handle += 1
        self._handles[number] = handle
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(number), keep_cache=True)

    @_request
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        node = self._node(inode)
        truncates = bool(flags & os.O_TRUNC)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if writes or truncates:
            await self._copy_up(node, 0 if truncates else None)
        file = self.union.open_file(node, write=writes or truncates)
        try:
            if truncates:
                os.ftruncate(file.fd, 0)
                self._drop_set_ids(file, ctx.uid)
        except BaseException:
            self.union.close_file(node, file)
            raise
        return self._register(node, file, ctx.uid, writes=writes)

    @_request
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        parent = self._directory(parent_inode)
        caller = Caller(ctx.uid, ctx.gid)
        node, attributes, fd = self.changes.create(parent, name, stat.S_IMODE(mode), caller)
        assert node.place is not None
        file = OpenFile(fd, readable=True, writable=True, waits=not node.place.layer.memory)
        file.users = 1
        node.file = file
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        info = self._register(node, file, ctx.uid, writes=writes)
        return info, self._found(node, attributes)

    @_request
    async def read(self, fh: int, off: int, size: int) -> bytes | bytearray:  # type: ignore[override]
        file = self._handles[fh].file
        data = file.read_cached(size, off)
        if data is not None:
            return data
        file.users += 1
        try:
            return await trio.to_thread.run_sync(file.read, size, off)
        finally:
            file.release()

    @_request
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self._handles[fh]
        file = handle.file
        if handle.uid != 0:
            self._drop_set_ids(file, handle.uid)
        if len(buf) <= _LONG_WRITE or not file.waits:
            return file.write(buf, off)
        file.users += 1
        try:
            return await trio.to_thread.run_sync(file.write, buf, off)
        finally:
            file.release()

    @_request
    async def flush(self, fh: int) -> None:
        raise _error(errno.ENOSYS)  # nothing to do at close; the kernel asks once and never again

    @_request
    async def fsync(self, fh: int, datasync: bool) -> None:
        handle = self._handles[fh]
        if not handle.node.is_upper or self.union.stack.volatile:
            return
        file = handle.file
        file.users += 1
        try:
            await trio.to_thread.run_sync(os.fdatasync if datasync else os.fsync, file.fd)
        finally:
            file.release()

    @_request
    async def release(self, fh: int) -> None:
        handle = self._handles.pop(fh)
        node = handle.node
        assert node.handles is not None
        node.handles.remove(handle)
        if not node.handles:
            node.handles = None
        self.union.close_file(node, handle.file)
        self.union.nodes.forget(node, 0)

    # -- directories ----------------------------------------------------------------------------------

    @_request
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        number = self._next_handle
        self._next_handle += 1
        self._directories[number] = _OpenDirectory(self._node(inode))
        return number

    @_request
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Positions: 1 is behind ``.``, 2 behind ``..``, 2 + n behind the n-th name of the snapshot that
        reading from the start takes; so no name comes twice or is left out while others come and go."""
        directory = self._directories[fh]
        node = directory.node
        if directory.names is None or start_id == 0:
            listing = Listing(self.union, node)
            if listing.large:
                directory.names = await trio.to_thread.run_sync(listing.names)
            else:
                directory.names = listing.names()
        if start_id < 1 and not _reply_dot(token, b".", node, 1):
            return
        if start_id < 2 and not _reply_dot(token, b"..", node.parent or node, 2):
            return
        names = directory.names
        for position in range(max(start_id - 2, 0), len(names)):
            if node.unlinked:
                return
            found = self.union.lookup(node, names[position])
            if found is None:
                continue
            child, attributes = found
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(names[position]), _entry(attributes),
                                         position + 3):  # fmt: skip
                self.union.nodes.forget(child, 0)
                return
            child.lookups += 1

    @_request
    async def releasedir(self, fh: int) -> None:
        del self._directories[fh]

    @_request
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        node = self._directories[fh].node
        if not node.is_upper or node.unlinked or self.union.stack.volatile:
            return
        fd = open_for_listing(self.union.gate.fd(node.parts[0]))
        try:
            await trio.to_thread.run_sync(os.fsync, fd)
        finally:
            os.close(fd)


_STATVFS: Final = (
    "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax",
)  # fmt: skip


def _entry(attributes: Attributes) -> pyfuse3.EntryAttributes:
    st: Any = attributes.st
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = pyfuse3.InodeT(attributes.ino)
    entry.entry_timeout = FOREVER
    entry.attr_timeout = FOREVER if attributes.lasting else 0
    entry.st_mode = pyfuse3.ModeT(st.st_mode)
    entry.st_nlink = attributes.nlink
    entry.st_uid = st.st_uid
    entry.st_gid = st.st_gid
    entry.st_rdev = st.st_rdev
    entry.st_size = st.st_size
    entry.st_blksize = st.st_blksize
    entry.st_blocks = st.st_blocks
    entry.st_atime_ns = st.st_atime_ns
    entry.st_mtime_ns = st.st_mtime_ns
    entry.st_ctime_ns = st.st_ctime_ns
    return entry


def _invalidate(ids: set[int]) -> None:
    for id_ in ids:
        try:
            pyfuse3.invalidate_inode(pyfuse3.InodeT(id_), attr_only=True)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOSYS, errno.ENOTCONN, errno.ENODEV):
                log.warning("attributes of node %d could not be invalidated: %s", id_, error)


def _absent() -> pyfuse3.EntryAttributes:
    """A reply that lets the kernel remember that there is nothing."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = pyfuse3.InodeT(0)
    entry.entry_timeout = FOREVER
    return entry


def _reply_dot(token: pyfuse3.ReaddirToken, name: bytes, node: Node, position: int) -> bool:
    """``.`` and ``..``: the kernel takes number and type from it and counts no lookup (fs/fuse/readdir.c)."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = pyfuse3.InodeT(node.ino)
    entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR)
    return pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), entry, position)
