"""The union as a filesystem of requests: the common part of all sessions for names, attributes and listings.

A session translates a request into a call of these functions, the result into a reply, and ``OSError`` into
an error. This module does not know how a request arrived.

A function without ``async`` runs without interruption: this keeps the node table and the layers consistent,
so everything between finding a node and changing it happens without waiting. Operations that may take long
(copying data, fsync, reading from a disk, listing a huge directory) run in a thread with separate fds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

from unionfs.core import layercalls
from unionfs.core.answers import missing_xattr
from unionfs.core.files import Handle
from unionfs.core.node import Attributes, Node
from unionfs.core.setting import Change, set_attributes
from unionfs.fuse.asides import Asides
from unionfs.fuse.copying import CopyUps
from unionfs.fuse.directories import Directories
from unionfs.fuse.fence import Fence
from unionfs.fuse.files import Files, set_times, truncate
from unionfs.fuse.inline import in_thread
from unionfs.fuse.invalidations import Invalidations
from unionfs.fuse.latency import Latencies
from unionfs.fuse.refreshing import Refreshing
from unionfs.fuse.snapshots import Snapshots
from unionfs.sys import calls
from unionfs.sys.attributes import ACL_DEFAULT
from unionfs.sys.calls import os_error
from unionfs.sys.fds import Owned, close_quietly
from unionfs.sys.process import memory_figures
from unionfs.union.attributes import SET_IDS
from unionfs.union.changes import Caller, Changes
from unionfs.union.copyup import CopyUp
from unionfs.union.flags import APPEND, IMMUTABLE
from unionfs.union.owners import ACL
from unionfs.union.setids import Who, mode_after
from unionfs.union.tree import Union
from unionfs.union.xattrs import CAPABILITY, existed_before

Named = tuple[Node, Attributes]
"""A node and its attributes. A reply with a new entry counts a lookup: `Node.looked_up`."""


def _to_store(node: Node, change: Change) -> None:
    """Give the change the ids to store. Raises EINVAL."""
    owners = node.territory.owners
    if owners is not None and change.owner is not None:
        change.has_owner(*owners.to_store(*change.owner))


def _chown(node: Node, fd: int, uid: int, gid: int) -> None:
    owners, permissions = node.territory.owners, node.layer.permissions
    if permissions is not None:
        permissions.chown(fd, uid, gid)
    elif owners is None:
        calls.chown_fd(fd, uid, gid)
    else:
        owners.chown(fd, uid, gid)


def _chmod(node: Node, fd: int, mode: int) -> None:
    permissions = node.layer.permissions
    if permissions is None:
        os.chmod(b"/proc/self/fd/%d" % fd, stat.S_IMODE(mode))
    else:
        permissions.chmod(fd, mode)


class Operations:
    """Serves one union, for any session. All functions raise ``OSError``."""

    def __init__(self, union: Union) -> None:
        self.union = union
        self.invalidations = Invalidations()
        copy_up = CopyUp(union, self.invalidations.of_copy_up)
        self.changes = Changes(union, copy_up)
        self.fence = None if union.stack.lease is None else Fence(union.stack.lease)
        self.copy_ups = CopyUps(union, copy_up, self.fence)
        self.directories = Directories()
        self.asides = Asides(union.stack.layers)
        self.refreshing = Refreshing(union, self.directories, self.copy_ups, self.asides)
        self.files = Files(union, self.copy_ups)
        self.snapshots = Snapshots(union, copy_up, self.files.handles, self.refreshing)
        #: The number of requests by kind, counted by the session.
        self.requests: Counter[str] = Counter()
        #: The latencies of requests, measured by the session on demand.
        self.latencies = Latencies()
        self._more_figures: Callable[[], Mapping[str, object]] = dict

    def add_figures(self, more: Callable[[], Mapping[str, object]]) -> None:
        """Add figures of a session."""
        self._more_figures = more

    def figures(self) -> dict[str, object]:
        """Counters and the current state of the mount; JSON-able."""
        return {
            "requests": dict(sorted(self.requests.items())),
            "nodes": len(self.union.nodes),
            **self.files.figures(),
            "listed_directories": len(self.directories),
            "directory_fds": len(self.union.gate),
            **self.copy_ups.figures(),
            **({} if self.union.watches is None else self.union.watches.figures()),
            **self.asides.figures(self.copy_ups.silent()),
            **({} if self.union.stack.lease is None else {"lease": self.union.stack.lease.figures()}),
            **memory_figures(),
            **self._more_figures(),
        }

    # -- nodes ----------------------------------------------------------------------------------------

    def node(self, id_: int) -> Node:
        """The node of an id. Raises ESTALE."""
        if (node := self.union.nodes.get(id_)) is None:
            raise os_error(errno.ESTALE)
        return node

    def directory(self, id_: int) -> Node:
        """An existing directory by id. Raises ESTALE, ENOENT."""
        node = self.node(id_)
        if node.unlinked:
            raise os_error(errno.ENOENT)
        return node

    def is_ours_alone(self, id_: int) -> bool:
        """Whether only this daemon changes a directory, so that the kernel may cache its names."""
        node = self.union.nodes.get(id_)
        return node is None or node.territory.lasting

    def forget(self, id_: int, lookups: int) -> None:
        """The kernel forgot that many lookups."""
        if (node := self.union.nodes.named(id_)) is not None:
            self.union.nodes.forget(node, lookups)

    # -- names ----------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Named | None:
        """The object of that name, or None."""
        node = self.directory(parent)
        return node.territory.lookup(node, name)

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller, *, tried: bool = False) -> Named:
        """Create a directory. ``tried``: as in `Changes`."""
        return self.changes.mkdir(self.directory(parent), name, stat.S_IMODE(mode), caller, tried=tried)

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Named:
        """Create a fifo, socket, device or regular file."""
        return self.changes.mknod(self.directory(parent), name, mode, rdev, caller)

    def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Named:
        """Create a symlink."""
        return self.changes.symlink(self.directory(parent), name, target, caller)

    async def link(self, id_: int, new_parent: int, new_name: bytes, uid: int) -> Named:
        """Create a hard link, for user ``uid``."""
        node = self.node(id_)
        if node.territory is not self.directory(new_parent).territory:
            raise os_error(errno.EXDEV)
        self.union.flags.may_link(node, self.directory(new_parent))
        await self.copy_ups.ensure(node, uid)
        if not self.changes.finds_data(node):
            await self.copy_ups.ensure_data(node, uid)
        return self.changes.link(node, self.directory(new_parent), new_name)

    async def unlink(self, parent: int, name: bytes, uid: int, *, tried: bool = False) -> None:
        """Remove the name of a non-directory, for user ``uid``."""
        while (lower := self.changes.unlink(self.directory(parent), name, tried=tried)) is not None:
            await self.copy_ups.ensure(lower, uid)

    def rmdir(self, parent: int, name: bytes, *, tried: bool = False) -> None:
        """Remove an empty directory."""
        self.changes.rmdir(self.directory(parent), name, tried=tried)

    async def rename(
        self,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: int,
        uid: int,
        *,
        tried: bool = False,
        unique: int = 0,
    ) -> None:
        """renameat2(2) with 0, RENAME_NOREPLACE or RENAME_EXCHANGE; ``unique``: the number of the request."""
        old, new = self.directory(parent), self.directory(new_parent)
        if flags == calls.RENAME_EXCHANGE and self.union.state is not None:
            self.union.state.exchanges(unique)
        while lower := self.changes.rename(old, name, new, new_name, flags, tried=tried):
            for node in lower:
                if node.in_place:
                    await self.copy_ups.ensure_data(node, uid)
                else:
                    await self.copy_ups.ensure(node, uid)
        if old is not new:
            for directory, here in ((new, new_name), (old, name)):
                moved = self.union.nodes.child(directory, here)
                if moved is not None and moved.is_dir:
                    self.invalidations.of_moved(moved)

    def readlink(self, id_: int) -> bytes:
        """The target of a symlink."""
        return self.union.readlink(self.node(id_))

    # -- attributes -----------------------------------------------------------------------------------

    def getattr(self, id_: int) -> Named:
        """stat(2)."""
        node = self.node(id_)
        return node, self.union.attributes(node)

    async def setattr(self, id_: int, change: Change, handle: Handle | None, uid: int) -> Named:
        """truncate(2), chown(2), chmod(2) and utimensat(2), in this order, for user ``uid``."""
        node = self.node(id_)
        try:
            return await self._setattr(node, change, handle, uid)
        except OSError:
            self.invalidations.of_node(node)  # a part of it may have changed
            raise

    async def _setattr(self, node: Node, change: Change, handle: Handle | None, uid: int) -> Named:
        _to_store(node, change)
        if (found := self._set_at_once(node, change, uid)) is not None:
            return node, found
        only_mode = change.only_mode
        check = partial(self._may_set, node, change, handle)
        if change.size is None:
            kept = await self.copy_ups.ensure(node, uid, only_mode, changed=True, keep=True, check=check)
        else:
            kept = await self.copy_ups.ensure_data(node, uid, change.size, keep=True, check=check)
        try:
            if kept is not None and only_mode is not None and node.entry is None:
                assert kept.st is not None
                node.changes()
                return node, node.attributes_of(self.union.shown(node, kept.st, kept.fd))
            return self._set(node, change, handle)
        finally:
            if kept is not None:
                self.union.files.take_back_later(node, kept)

    def _set_at_once(self, node: Node, change: Change, uid: int) -> Attributes | None:
        """Make the change if the case is plain; None: it must be made in steps."""
        if not node.in_place:
            return None if change.size is not None else self.copy_ups.change(node, change, uid)
        if self.copy_ups.is_running(node):
            return None  # it sets the attributes that it has read
        self.union.flags.of(node)
        return set_attributes(self.union.gate, node, change)

    def _may_set(self, node: Node, change: Change, handle: Handle | None) -> None:
        """Raise EPERM for a change that the node's flags forbid."""
        flags = self.union.flags
        if change.owner is not None or change.mode is not None:
            flags.may_change(node)
        if change.size is not None and (handle is None or flags.of(node) & APPEND):
            flags.may_write(node, appends=False)
        # With writeback the kernel sends the time of a write, which was permitted, by itself.
        if change.atime_ns is not None or not self.union.files.is_open_for_writing(node):
            flags.may_set_times(node, [one for one in (change.atime_ns, change.mtime_ns) if one is not None])

    def _set(self, node: Node, change: Change, handle: Handle | None) -> Named:
        node.changes()
        changes_owner = change.owner is not None
        if change.size is not None:
            self._truncate(node, change.size, handle, change.killer)
        elif change.killer is not None and (change.killer.uid != 0 or not changes_owner):
            # before a chown, which looks at the old group; root's own clears the bits by itself
            self._drop_set_ids(node, change.killer)
        file = None if node.use is None or not node.data_in_place else node.use.file
        if file is not None and file.users:
            self._set_open(node, file.fd, change)
            return node, node.attributes_of(self.union.shown(node, os.fstat(file.fd), file.fd))
        changes_times = change.atime_ns is not None or change.mtime_ns is not None
        if changes_owner or change.mode is not None or changes_times:
            fd, opened = self.union.path_fd(node)
            try:
                if change.owner is not None:
                    _chown(node, fd, *change.owner)
                if change.mode is not None:
                    _chmod(node, fd, change.mode)
                if changes_times:
                    set_times(calls.set_times, fd, change)
            finally:
                if opened:
                    close_quietly(fd)
        return node, self.union.attributes(node)

    def _set_open(self, node: Node, fd: int, change: Change) -> None:
        """Change an open file by its fd, without its name."""
        if change.owner is not None:
            _chown(node, fd, *change.owner)
        if change.mode is not None:
            if node.layer.permissions is None:
                os.fchmod(fd, stat.S_IMODE(change.mode))
            else:
                _chmod(node, fd, change.mode)
        if change.atime_ns is not None or change.mtime_ns is not None:
            set_times(calls.futimens, fd, change)

    def _drop_set_ids(self, node: Node, killer: Who) -> None:
        if node.is_dir:
            return  # chown(2) keeps them on directories
        mode = mode_after(self.union.attributes(node).st, killer)
        if mode is not None:
            with Owned(self.union.open_path(node)) as fd:
                _chmod(node, fd, mode)

    def _truncate(self, node: Node, size: int, handle: Handle | None, killer: Who | None) -> None:
        if node.kind != stat.S_IFREG:
            raise os_error(errno.EINVAL)
        if node.use is not None:
            node.use.resize()
        if handle is not None and handle.file.writable:
            truncate(node, handle.file, size, killer)
            return
        file = self.union.files.lend(node, write=True)
        try:
            truncate(node, file, size, killer)
        finally:
            self.union.files.take_back(node, file)

    def statfs(self) -> os.statvfs_result:
        """statvfs(3) of the topmost layer."""
        return layercalls.call(os.fstatvfs, self.union.stack.layers[0].root_fd)

    # -- extended attributes --------------------------------------------------------------------------

    def getxattr(self, id_: int, name: bytes) -> bytes:
        """The value of an xattr."""
        node = self.node(id_)
        missing = missing_xattr(node, name, self.union.stack.acl)
        if missing:
            raise os_error(missing)
        stored = self.union.stored_name(node, name)
        with self.union.checked_path(node) as path:
            value = layercalls.call(os.getxattr, path, stored)
        owners = node.territory.owners
        return owners.show_acl(value, node.layer) if owners is not None and name.startswith(ACL) else value

    def listxattr(self, id_: int, uid: int) -> list[bytes]:
        """The names of the xattrs visible to user ``uid``."""
        node = self.node(id_)
        try:
            with self.union.checked_path(node) as path:
                stored = [os.fsencode(name) for name in layercalls.call(os.listxattr, path)]
        except OSError as failure:
            if failure.errno == errno.EOPNOTSUPP:
                return []
            raise
        names = self.union.shown_names(node, stored)
        if uid != 0:  # as in every filesystem: only the administrator sees trusted.*
            names = [name for name in names if not name.startswith(b"trusted.")]
        if not self.union.stack.acl:
            names = [name for name in names if not name.startswith(ACL)]
        return names

    async def setxattr(
        self, id_: int, name: bytes, value: bytes, uid: int, flags: int = 0, unique: int = 0
    ) -> Node:
        """Set an xattr; ``flags`` as in setxattr(2), ``unique``: the number of the request."""
        if name.startswith(ACL) and not self.union.stack.acl:
            raise os_error(errno.EOPNOTSUPP)
        node = self.node(id_)
        owners = node.territory.owners
        self.union.stored_name(node, name)  # no copy-up for a name that cannot be stored
        if owners is not None and name.startswith(ACL):
            value = owners.acl_to_store(value)
        await self.copy_ups.ensure(node, uid, check=partial(self.union.flags.may_change, node))
        stored = self.union.stored_name(node, name)
        node.changes()
        self.union.capabilities.changed(node)
        with self.union.checked_path(node) as path:
            if flags & os.XATTR_CREATE and existed_before(self.union.state, path, stored, unique) is False:
                flags &= ~os.XATTR_CREATE
            os.setxattr(path, stored, value, flags)
        self._acl_changed(node, name)
        return node

    def _acl_changed(self, node: Node, name: bytes) -> None:
        if name == ACL_DEFAULT and node.parts:
            node.parts[0].know_default_acl(None)

    def drop_group_set_id(self, node: Node) -> None:
        """Clear setgid after an ACL was set by a caller outside the file's group (fs/posix_acl.c)."""
        st = self.union.stat(node)
        if st.st_mode & stat.S_ISGID:
            with self.union.checked_path(node) as path:
                os.chmod(path, stat.S_IMODE(st.st_mode) & ~stat.S_ISGID)

    async def removexattr(self, id_: int, name: bytes, uid: int, unique: int = 0) -> None:
        """Remove an xattr, for user ``uid``; ``unique``: the number of the request."""
        if name != CAPABILITY or uid == 0:
            await self._removexattr(id_, name, uid, unique)
            return
        # The kernel sends it before a write, a truncation or a chown, for a caller who may not request it.
        # They remove the capabilities of the backing file too; a stranger's chown without an owner gets here,
        # and then fails if it must clear setuid or setgid as well.
        st = self.union.attributes(self.node(id_)).st
        if st.st_uid == uid or not st.st_mode & SET_IDS:
            with contextlib.suppress(PermissionError):  # in an ordinary user's daemon
                await self._removexattr(id_, name, uid)

    async def _removexattr(self, id_: int, name: bytes, uid: int, unique: int = 0) -> None:
        node = self.node(id_)
        stored = self.union.stored_name(node, name)
        # The kernel removes capabilities by itself, before a write.
        if name != CAPABILITY or self.union.flags.of(node) & IMMUTABLE:
            self.union.flags.may_change(node)
        if not node.in_place:
            with self.union.checked_path(node) as path:
                layercalls.call(os.getxattr, path, stored)  # no copy-up if there is nothing to remove
        await self.copy_ups.ensure(node, uid)
        stored = self.union.stored_name(node, name)
        node.changes()
        with self.union.checked_path(node) as path:
            existed = existed_before(self.union.state, path, stored, unique)
            try:
                os.removexattr(path, stored)
            except OSError as error:
                if not (existed and error.errno == errno.ENODATA):
                    raise
        self._acl_changed(node, name)

    # -- durability -----------------------------------------------------------------------------------

    async def fsyncdir(self, id_: int) -> None:
        """fsync(2) of a directory."""
        node = self.node(id_)
        if not node.in_place or node.unlinked or not node.territory.durable:
            return
        with Owned(self.union.gate.open_for_listing(node.parts[0])) as fd:
            await in_thread(os.fsync, fd)

    async def syncfs(self) -> None:
        """syncfs(2) of the upper."""
        if self.union.stack.upper is not None and not self.union.stack.volatile:
            await in_thread(self.union.stack.sync_upper)
        if self.union.stack.bound:
            await in_thread(self.union.stack.sync_bound)
