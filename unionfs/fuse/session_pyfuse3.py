"""The session of pyfuse3 and libfuse: runs everywhere, with the features of that library."""

from __future__ import annotations

import errno
import functools
import itertools
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, ParamSpec, TypeVar

import pyfuse3
import trio

from unionfs.core.memo import Memo, Wanted
from unionfs.core.setting import Change
from unionfs.fuse.errors import CUT_OFF, SessionError
from unionfs.fuse.inline import finish
from unionfs.fuse.operations import Named, Operations
from unionfs.fuse.pyfuse3_listing import send_names
from unionfs.fuse.pyfuse3_notices import Notices, invalidate_attributes
from unionfs.fuse.pyfuse3_replies import FOREVER, bare, entry, named, opened
from unionfs.sys.calls import os_error
from unionfs.sys.liveness import is_dead
from unionfs.sys.mountinfo import mounted_at, mounts_of_device
from unionfs.union.changes import Caller
from unionfs.union.owners import ACL
from unionfs.union.setids import Process, is_outside

log = logging.getLogger(__name__)

_FIGURES: Final[dict[str, object]] = {
    "passthrough": {"upper": False, "lower": False, "lower_programs_only": False},
    "cache": {"writeback": False, "opens_without_request": False},
}

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def serve(
    operations: Operations, mountpoint: str, mount_options: Sequence[str], on_ready: Callable[[], None],
    figures: Mapping[str, object],
) -> None:  # fmt: skip
    """Mount, serve until the mount is gone, and clean up.

    ``mount_options`` are libfuse's (``fsname=...``, ``allow_other`` ...); ``on_ready`` is called at the
    kernel's first request; ``figures`` are added to those of the session. Raises
    :class:`SessionError` if mounting fails or the mount is disconnected.
    """
    operations.add_figures(lambda: {**_FIGURES, **figures})
    operations.refreshing.serve(Notices())
    try:
        pyfuse3.init(
            PyfuseOperations(operations, on_ready), mountpoint, {"default_permissions", *mount_options}
        )
    except RuntimeError as failure:
        raise SessionError(str(failure)) from failure
    entry = mounted_at(mountpoint)
    try:
        try:
            await pyfuse3.main()
        except BaseExceptionGroup as group:
            aborted, others = group.split(_is_abort)
            if aborted is None or others is not None:
                raise
            # An ordinary umount causes this too, during the read of a request (fs/fuse/dev.c,
            # fuse_dev_do_read).
        # libfuse does not distinguish the two, but a disconnected mount still exists.
        cut_off = entry is not None and await _is_left(entry.device)
    finally:
        pyfuse3.close(unmount=True)
    if cut_off:
        raise SessionError(CUT_OFF.format(mountpoint))


async def _is_left(device: str) -> bool:
    """Whether the unserved mount with that device number still exists. The number may now belong to another
    mount, which answers, or blocks."""
    for mount in mounts_of_device(device):
        if mount.is_fuse and await trio.to_thread.run_sync(is_dead, mount.mountpoint):
            return True
    return False


def _is_abort(failure: BaseException) -> bool:
    return isinstance(failure, OSError) and failure.errno == errno.ECONNABORTED


def _request(handler: Callable[_P, Coroutine[Any, Any, _T]]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """Count the request, and turn every exception into ``FUSEError``: any other would end the daemon.

    The latency, measured on demand, is the time between the library's read of the request and its write of
    the answer.
    """
    kind = handler.__name__

    @functools.wraps(handler)
    async def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        adapter = args[0]
        assert isinstance(adapter, PyfuseOperations)
        adapter.operations.requests[kind] += 1
        fence, latencies = adapter.operations.fence, adapter.operations.latencies
        if fence is not None and not fence.passes and not await fence.passed():
            raise pyfuse3.FUSEError(errno.EIO)
        began = latencies.clock() if latencies.watched else 0
        try:
            try:
                if not adapter.operations.asides.needed:
                    return await handler(*args, **kwargs)
                return await adapter.with_memo(kind, lambda: handler(*args, **kwargs), args)
            finally:
                invalidations = adapter.operations.invalidations
                if invalidations.now:  # where one is `soon`, one is `now`: only `core` answers without
                    await adapter.invalidate_attributes()
        except OSError as failure:
            raise pyfuse3.FUSEError(failure.errno or errno.EIO) from None
        except pyfuse3.FUSEError:
            raise
        except Exception:
            log.exception("%s%r failed", kind, args[1:])
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            if began and latencies.goes_on(began):
                latencies.record(kind, latencies.clock() - began)

    return guarded


class PyfuseOperations(pyfuse3.Operations):  # type: ignore[misc,unused-ignore]
    """Translates a request of pyfuse3 into a call of ``Operations``, and the result into a reply."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, operations: Operations, on_init: Callable[[], None]) -> None:
        super().__init__()
        self.operations = operations
        self.files = operations.files
        self.enable_acl = operations.union.stack.acl
        self.nodes = operations.union.nodes
        self._on_init = on_init
        #: The node and the process of each, by number.
        self._open_directories: dict[int, tuple[int, int]] = {}
        self._numbers = itertools.count(1)

    def init(self) -> None:
        """INIT is answered: the mount is usable."""
        self._on_init()

    async def with_memo(
        self, kind: str, handle: Callable[[], Coroutine[Any, Any, _T]], args: Sequence[object]
    ) -> _T:
        """Answer a request; if it needs a slow layer, after the calls were made there; see `core.memo`."""
        memo = Memo()
        try:
            while True:
                try:
                    return await finish(handle(), memo)
                except Wanted:
                    pid, is_caller = self._caller(kind, args)
                    await self.operations.asides.make_for(memo, pid, is_caller=is_caller)
                    if self.operations.fence is not None:
                        await self.operations.fence.must_pass()
        finally:
            memo.close()

    def _caller(self, kind: str, args: Sequence[Any]) -> tuple[int, bool]:
        """The task that sent a request (libfuse passes no FUSE_INTERRUPT on), or, and then False, the one
        that opened the file, which is likely to be the same; 0: unknown."""
        if isinstance(args[-1], pyfuse3.RequestContext):
            return int(args[-1].pid), True
        if kind == "read":
            who = self.files[args[1]].who
            return (0 if who is None else int(who.pid)), False
        return (self._open_directories[args[1]][1] if kind == "readdir" else 0), False

    async def invalidate_attributes(self) -> None:
        """Invalidate attributes changed by a copy-up, before the reply, so that no process sees old ones
        after it. In a thread: a notice may have to wait for requests that the daemon serves.
        """
        invalidations = self.operations.invalidations
        stale = {*invalidations.take_now(), *invalidations.take_soon(), *invalidations.take_listings()}
        await trio.to_thread.run_sync(invalidate_attributes, stale)

    def _found(self, found: Named) -> pyfuse3.EntryAttributes:
        """The reply for a name that the kernel caches; counts a lookup of the node."""
        found[0].looked_up()
        return named(found)

    # -- names ----------------------------------------------------------------------------------------

    @_request
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        found = self.operations.lookup(parent_inode, name)
        if found is None:
            return bare(0, seconds=FOREVER if self.operations.is_ours_alone(parent_inode) else 0)
        return self._found(found)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for id_, lookups in inode_list:
            try:
                self.operations.forget(id_, lookups)
            except Exception:
                log.exception("forget of node %d failed", id_)
        self.operations.requests["forget"] += 1

    @_request
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._found(self.operations.mkdir(parent_inode, name, mode, Caller(ctx.uid, ctx.gid)))

    @_request
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._found(self.operations.mknod(parent_inode, name, mode, rdev, Caller(ctx.uid, ctx.gid)))

    @_request
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._found(self.operations.symlink(parent_inode, name, target, Caller(ctx.uid, ctx.gid)))

    @_request
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._found(await self.operations.link(inode, new_parent_inode, new_name, ctx.uid))

    @_request
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self.operations.unlink(parent_inode, name, ctx.uid)

    @_request
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self.operations.rmdir(parent_inode, name)

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
        await self.operations.rename(
            parent_inode_old, name_old, parent_inode_new, name_new, flags, ctx.uid
        )

    @_request
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self.operations.readlink(inode)

    # -- attributes -----------------------------------------------------------------------------------

    @_request
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return entry(self.operations.getattr(inode))

    @_request
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        kills = fields.update_size or fields.update_uid or fields.update_gid
        change = Change(
            size=attr.st_size if fields.update_size else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            # with another change, the mode is the kernel's, which clears set-id bits, but not for the group
            mode=attr.st_mode if fields.update_mode and not kills else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            killer=_killer(ctx) if kills else None,
        )
        handle = None if fh is None else self.files.get(fh)
        return entry(await self.operations.setattr(inode, change, handle, ctx.uid))

    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True  # the kernel checks (default_permissions)

    @_request
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        stats = self.operations.statfs()
        reply = pyfuse3.StatvfsData()
        for field in _STATVFS:
            setattr(reply, field, getattr(stats, field))
        return reply

    # -- extended attributes --------------------------------------------------------------------------

    @_request
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return self.operations.getxattr(inode, name)

    @_request
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        return self.operations.listxattr(inode, ctx.uid)

    @_request
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        node = await self.operations.setxattr(inode, name, value, ctx.uid)
        if name == ACL + b"access" and is_outside(ctx, self.operations.union.attributes(node).st.st_gid):
            self.operations.drop_group_set_id(node)

    @_request
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self.operations.removexattr(inode, name, ctx.uid)

    # -- files ----------------------------------------------------------------------------------------

    @_request
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        node = self.operations.node(inode)
        prepared = await self.files.prepare(node, flags, ctx.uid)
        who = Process(ctx.uid, ctx.gid, ctx.pid)
        number = self.files.open(node, flags, who, prepared, kills_set_ids=ctx.uid != 0)
        return opened(number, keep_cache=node.territory.lasting)

    @_request
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        parent = self.operations.directory(parent_inode)
        number, node, attributes = self.files.create(
            self.operations.changes, parent, name, mode, flags, Caller(ctx.uid, ctx.gid),
            Process(ctx.uid, ctx.gid, ctx.pid),
        )  # fmt: skip
        return opened(number), self._found((node, attributes))

    @_request
    async def read(self, fh: int, off: int, size: int) -> bytes | bytearray:  # type: ignore[override]
        file = self.files[fh].file
        data = bytearray(size)
        with memoryview(data) as view:
            count = file.read_into(view, off)
        if count is None:
            return await self.files.read(file, off, size)
        self.files.was_read(count)
        del data[count:]
        return data

    @_request
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        # The library negotiates HANDLE_KILLPRIV, so the daemon clears set-id bits.
        handle = self.files[fh]
        killer = handle.who if handle.who is not None and handle.who.uid else None
        return await self.files.write(handle.file, off, buf, killer, handle.node.layer.permissions)

    @_request
    async def flush(self, fh: int) -> None:
        raise os_error(errno.ENOSYS)  # close does nothing; the kernel sends no other FLUSH

    @_request
    async def fsync(self, fh: int, datasync: bool) -> None:
        handle = self.files[fh]
        await self.files.fsync(handle.node, handle.file, datasync=datasync)

    @_request
    async def release(self, fh: int) -> None:
        self.files.release(fh)

    # -- directories ----------------------------------------------------------------------------------

    @_request
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        # Listings belong to the directory, not to an open, but a request for one has no process.
        number = next(self._numbers)
        self._open_directories[number] = inode, ctx.pid
        return number

    @_request
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        node = self.operations.node(self._open_directories[fh][0])
        entries, first = await self.operations.directories.entries(node, start_id)
        send_names(self.operations, node, entries, first, start_id, token)

    @_request
    async def releasedir(self, fh: int) -> None:
        self._open_directories.pop(fh, None)

    @_request
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self.operations.fsyncdir(self._open_directories[fh][0])


_STATVFS: Final = (
    "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax",
)  # fmt: skip


def _killer(ctx: pyfuse3.RequestContext) -> Process | None:
    """The process of a request, if its changes clear set-id bits."""
    return Process(ctx.uid, ctx.gid, ctx.pid) if ctx.uid else None
