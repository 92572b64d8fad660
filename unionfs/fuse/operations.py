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
import resource
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from unionfs.fuse.copying import CopyUps
from unionfs.fuse.directories import Directories
from unionfs.fuse.files import Files, Opened, truncate
from unionfs.fuse.inline import in_thread
from unionfs.fuse.invalidations import Invalidations
from unionfs.fuse.latency import Latencies
from unionfs.sys import calls
from unionfs.sys.calls import os_error
from unionfs.sys.fds import Owned
from unionfs.sys.process import supplementary_groups
from unionfs.union.attributes import Attributes
from unionfs.union.changes import ACL_DEFAULT, Caller, Changes
from unionfs.union.copyup import CopyUp
from unionfs.union.files import SET_IDS, mode_without_set_ids
from unionfs.union.node import Node
from unionfs.union.tree import Union
from unionfs.union.xattrs import CAPABILITY

ACL: Final = b"system.posix_acl_"
Found = tuple[Node, Attributes]
"""A node and its attributes. A reply with a new entry counts a lookup: `Node.looked_up`."""


class Change(NamedTuple):
    """The changes of a SETATTR; None: unchanged. Times in nanoseconds since 1970."""

    size: int | None = None
    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    kills_set_ids: bool = False
    """Clear setuid and setgid: the caller may not keep them."""


def _owner(change: Change) -> tuple[int, int]:
    """The arguments of chown(2), where -1 leaves an id as it is."""
    return -1 if change.uid is None else change.uid, -1 if change.gid is None else change.gid


def _memory() -> dict[str, int]:
    """This process's resident set in bytes, now and its maximum; proc_pid_statm(5), getrusage(2).

    The kernel counts some pages of each CPU a little later. smaps_rollup is exact, but walks the page tables
    while requests wait.
    """
    with open("/proc/self/statm", "rb") as statm:
        now = int(statm.read().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"resident_bytes": now, "peak_resident_bytes": max(now, peak)}


class Operations:
    """Serves one union, for any session. All functions raise ``OSError``."""

    def __init__(self, union: Union) -> None:
        self.union = union
        self.invalidations = Invalidations()
        copy_up = CopyUp(union, self.invalidations.of_copy_up)
        self.changes = Changes(union, copy_up)
        self.copy_ups = CopyUps(union, copy_up)
        self.directories = Directories()
        self.files = Files(union, self.copy_ups)
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
            "open_files": len(self.files),
            "listed_directories": len(self.directories),
            "directory_fds": len(self.union.gate),
            "copy_ups": self.copy_ups.count,
            "copied_bytes": self.copy_ups.copied_bytes,
            "copy_up_seconds": self.copy_ups.nanoseconds / 1e9,
            "read_bytes": self.files.bytes_read,
            "written_bytes": self.files.bytes_written,
            **_memory(),
            **self._more_figures(),
        }

    # -- nodes ----------------------------------------------------------------------------------------

    def node(self, id_: int) -> Node:
        """The node of an id. Raises ESTALE."""
        node = self.union.nodes.get(id_)
        if node is None:
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
        node = self.union.nodes.named(id_)
        if node is not None:
            self.union.nodes.forget(node, lookups)

    # -- names ----------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Found | None:
        """The object of that name, or None."""
        node = self.directory(parent)
        return node.territory.lookup(node, name)

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Found:
        """Create a directory."""
        return self.changes.mkdir(self.directory(parent), name, stat.S_IMODE(mode), caller)

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Found:
        """Create a fifo, socket, device or regular file."""
        return self.changes.mknod(self.directory(parent), name, mode, rdev, caller)

    def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Found:
        """Create a symlink."""
        return self.changes.symlink(self.directory(parent), name, target, caller)

    async def link(self, id_: int, new_parent: int, new_name: bytes) -> Found:
        """Create a hard link."""
        node = self.node(id_)
        if node.territory is not self.directory(new_parent).territory:
            raise os_error(errno.EXDEV)
        await self.copy_ups.ensure(node)
        return self.changes.link(node, self.directory(new_parent), new_name)

    async def unlink(self, parent: int, name: bytes) -> None:
        """Remove the name of a non-directory."""
        while (lower := self.changes.unlink(self.directory(parent), name)) is not None:
            await self.copy_ups.ensure(lower)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        self.changes.rmdir(self.directory(parent), name)

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        """renameat2(2) with 0, RENAME_NOREPLACE or RENAME_EXCHANGE."""
        old, new = self.directory(parent), self.directory(new_parent)
        while lower := self.changes.rename(old, name, new, new_name, flags):
            for node in lower:
                await self.copy_ups.ensure(node)

    def readlink(self, id_: int) -> bytes:
        """The target of a symlink."""
        return self.union.readlink(self.node(id_))

    # -- attributes -----------------------------------------------------------------------------------

    def getattr(self, id_: int) -> Found:
        """stat(2)."""
        node = self.node(id_)
        return node, self.union.attributes(node)

    async def setattr(self, id_: int, change: Change, handle: Opened | None) -> Found:
        """truncate(2), chown(2), chmod(2) and utimensat(2), in this order."""
        node = self.node(id_)
        only_mode = change.mode if change == Change(mode=change.mode) else None
        kept = await self.copy_ups.ensure(node, change.size, only_mode, keep=True)
        try:
            if kept is not None and only_mode is not None:
                assert kept.st is not None
                node.changes()
                return node, node.attributes_of(kept.st)
            return self._set(node, change, handle)
        finally:
            if kept is not None:
                self.union.files.take_back_later(node, kept)

    def _set(self, node: Node, change: Change, handle: Opened | None) -> Found:
        node.changes()
        if change.size is not None:
            self._truncate(node, change.size, handle, kills_set_ids=change.kills_set_ids)
        elif change.kills_set_ids and change.uid is None and change.gid is None:
            self._drop_set_ids(node)
        file = None if node.use is None else node.use.file
        if file is not None and file.users:
            self._set_open(file.fd, change)
            return node, node.attributes_of(os.fstat(file.fd))
        if change.uid is not None or change.gid is not None or change.mode is not None:
            fd, opened = self.union.path_fd(node)
            try:
                if change.uid is not None or change.gid is not None:
                    calls.chown_fd(fd, *_owner(change))
                if change.mode is not None:
                    os.chmod(b"/proc/self/fd/%d" % fd, stat.S_IMODE(change.mode))
            finally:
                if opened:
                    os.close(fd)
        if change.atime_ns is not None or change.mtime_ns is not None:
            with self.union.checked_path(node) as path:
                calls.utimensat(calls.AT_FDCWD, path, change.atime_ns, change.mtime_ns, follow=True)
        return node, self.union.attributes(node)

    def _set_open(self, fd: int, change: Change) -> None:
        """Change an open file by its fd, without its name."""
        if change.uid is not None or change.gid is not None:
            os.fchown(fd, *_owner(change))
        if change.mode is not None:
            os.fchmod(fd, stat.S_IMODE(change.mode))
        if change.atime_ns is not None or change.mtime_ns is not None:
            calls.futimens(fd, change.atime_ns, change.mtime_ns)

    def _drop_set_ids(self, node: Node) -> None:
        mode = mode_without_set_ids(self.union.stat(node).st_mode)
        if mode is not None:
            with self.union.checked_path(node) as path:
                os.chmod(path, mode)

    def _truncate(self, node: Node, size: int, handle: Opened | None, *, kills_set_ids: bool) -> None:
        if node.kind != stat.S_IFREG:
            raise os_error(errno.EINVAL)
        if handle is not None and handle.file.writable:
            truncate(handle.file, size, kills_set_ids=kills_set_ids)
            return
        file = self.union.files.lend(node, write=True)
        try:
            truncate(file, size, kills_set_ids=kills_set_ids)
        finally:
            self.union.files.take_back(node, file)

    def statfs(self) -> os.statvfs_result:
        """statvfs(3) of the topmost layer."""
        return os.statvfs(self.union.stack.layers[0].root_fd)

    # -- extended attributes --------------------------------------------------------------------------

    def getxattr(self, id_: int, name: bytes) -> bytes:
        """The value of an xattr."""
        if name.startswith(ACL) and not self.union.stack.acl:
            raise os_error(errno.EOPNOTSUPP)
        node = self.node(id_)
        if name == CAPABILITY and node.no_capability:
            raise os_error(errno.ENODATA)
        stored = node.territory.stored_name(name)
        with self.union.checked_path(node) as path:
            return os.getxattr(path, stored)

    def listxattr(self, id_: int, uid: int) -> list[bytes]:
        """The names of the xattrs visible to user ``uid``."""
        node = self.node(id_)
        try:
            with self.union.checked_path(node) as path:
                stored = [os.fsencode(name) for name in os.listxattr(path)]
        except OSError as failure:
            if failure.errno == errno.EOPNOTSUPP:
                return []
            raise
        names = node.territory.shown_names(stored)
        if uid != 0:  # as in every filesystem: only the administrator sees trusted.*
            names = [name for name in names if not name.startswith(b"trusted.")]
        if not self.union.stack.acl:
            names = [name for name in names if not name.startswith(ACL)]
        return names

    async def setxattr(self, id_: int, name: bytes, value: bytes, flags: int = 0) -> Node:
        """Set an xattr; ``flags`` as in setxattr(2)."""
        if name.startswith(ACL) and not self.union.stack.acl:
            raise os_error(errno.EOPNOTSUPP)
        node = self.node(id_)
        stored = node.territory.stored_name(name)
        await self.copy_ups.ensure(node)
        node.changes()
        self.union.capabilities.changed(node)
        with self.union.checked_path(node) as path:
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

    def is_outside_group(self, node: Node, uid: int, gid: int, pid: int) -> bool:
        """Whether a caller is neither root nor in the group of the node's object.

        A request has no supplementary groups: they come from /proc/PID/status. A caller that has exited
        counts as in none.
        """
        group = self.union.stat(node).st_gid
        return uid != 0 and gid != group and group not in supplementary_groups(pid)

    async def removexattr(self, id_: int, name: bytes, uid: int) -> None:
        """Remove an xattr, for user ``uid``."""
        if name != CAPABILITY or uid == 0:
            await self._removexattr(id_, name)
            return
        # The kernel sends it before a write, a truncation or a chown, for a caller who may not request it.
        # They remove the capabilities of the backing file too; a stranger's chown without an owner gets here,
        # and then fails if it must clear setuid or setgid as well.
        st = self.union.stat(self.node(id_))
        if st.st_uid == uid or not st.st_mode & SET_IDS:
            with contextlib.suppress(PermissionError):  # in an ordinary user's daemon
                await self._removexattr(id_, name)

    async def _removexattr(self, id_: int, name: bytes) -> None:
        node = self.node(id_)
        stored = node.territory.stored_name(name)
        if not node.in_place:
            with self.union.checked_path(node) as path:
                os.getxattr(path, stored)  # no copy-up if there is nothing to remove
        await self.copy_ups.ensure(node)
        node.changes()
        with self.union.checked_path(node) as path:
            os.removexattr(path, stored)
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
