"""Changes of a union: the checks common to all territories; the territory then makes the change."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Final, NamedTuple

from unionfs.core.changing import EntryChanges
from unionfs.core.node import Attributes, Node
from unionfs.sys import calls
from unionfs.sys.calls import os_error
from unionfs.sys.fds import close_quietly
from unionfs.union.bound import Bound
from unionfs.union.changing import Steps, T
from unionfs.union.copyup import CopyUp
from unionfs.union.making import Making
from unionfs.union.named import is_reserved
from unionfs.union.permissions import Permissions, open_mode
from unionfs.union.removing import Removing
from unionfs.union.renaming import Renaming
from unionfs.union.tree import Union
from unionfs.union.xattrs import default_acl

__all__ = ["Caller", "Changes"]

_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Caller(NamedTuple):
    """The caller of a change. ``umask`` applies to a new object's mode, unless its directory has a default
    ACL; 0 if the kernel has applied it."""

    uid: int
    gid: int
    umask: int = 0


class _InUpper(Making, Removing, Renaming):
    """The changes of the merged layers, the only territory with copy-ups and markers."""


class Changes:
    """The changing operations on one union. Not thread-safe, like the union itself.

    ``tried``: the session has tried the plain case, see `entries`.
    """

    def __init__(self, union: Union, copy_up: CopyUp | None = None) -> None:
        """``copy_up`` copies up directories before a change."""
        self._union = union
        self._in_upper = _InUpper(union, copy_up)
        #: Makes and removes what is plain at once.
        self.entries = EntryChanges(union, union.identity, remembers=union.shortcuts.capabilities)

    def _territory(self, directory: Node) -> Steps:
        """The implementation of changes in a directory's territory."""
        territory = directory.territory
        return territory if type(territory) is Bound else self._in_upper

    # -- making ---------------------------------------------------------------------------------------

    def create(
        self, parent: Node, name: bytes, mode: int, caller: Caller, *, tried: bool = False
    ) -> tuple[Node, Attributes, int]:
        """Create a regular file; returns an fd of it too (O_RDWR), which the caller owns."""
        if not tried:
            made = self.entries.make(parent, name, stat.S_IFREG | mode, *caller, opens=True)
            if made is not None:
                return made
        fd = self._make(parent, name, mode, caller, _create, kind=stat.S_IFREG)
        return (*self._new_node(parent, name, fd), fd)

    def tmpfile(self, parent: Node, mode: int, caller: Caller, flags: int) -> tuple[Node, Attributes, int]:
        """Create a nameless regular file (O_TMPFILE); returns an fd too (O_RDWR), which the caller owns.

        With O_EXCL in ``flags`` it cannot be linked. EOPNOTSUPP if the upper's filesystem lacks support.
        """
        union = self._union
        union.flags.may_make(parent)
        place = self._territory(parent).writable(parent)
        wanted = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC | flags & os.O_EXCL
        dir_fd, permissions = union.gate.fd(place), place.layer.permissions
        if caller.umask and (permissions is not None or not default_acl(place, dir_fd)):
            mode &= ~caller.umask
        if permissions is None:
            with self._acting_as(parent, caller):
                fd = os.open(b".", wanted, mode, dir_fd=dir_fd)
        else:
            fd = os.open(b".", wanted, open_mode(mode), dir_fd=dir_fd)
        try:
            if permissions is not None:
                permissions.write(fd, self._of_new(permissions, parent, stat.S_IFREG | mode, 0, caller))
            held = os.open(b"/proc/self/fd/%d" % fd, os.O_PATH | os.O_CLOEXEC)
            try:
                union.gate.keeps(held)
                node = parent.territory.unnamed(parent, held)
            except BaseException:
                close_quietly(held)
                raise
            node.know_flags(0)
            try:
                return node, union.attributes(node), fd
            except BaseException:
                union.nodes.forget(node, 0)  # with its fd: the kernel does not know it
                raise
        except BaseException:
            close_quietly(fd)
            raise

    def mkdir(
        self, parent: Node, name: bytes, mode: int, caller: Caller, *, tried: bool = False
    ) -> tuple[Node, Attributes]:
        """Create a directory."""
        if not tried:
            made = self.entries.make(parent, name, stat.S_IFDIR | mode, *caller)
            if made is not None:
                return made[:2]
        self._make(parent, name, mode, caller, _mkdir, kind=stat.S_IFDIR)
        return self._new_node(parent, name, directory=True)

    def symlink(self, parent: Node, name: bytes, target: bytes, caller: Caller) -> tuple[Node, Attributes]:
        """Create a symlink."""
        made = self.entries.make(parent, name, stat.S_IFLNK, *caller, target=target)
        if made is not None:
            return made[:2]

        def make(fd: int, here: bytes, _: int) -> None:
            os.symlink(target, here, dir_fd=fd)

        self._make(parent, name, 0, caller, make, kind=stat.S_IFLNK)
        return self._new_node(parent, name)

    def mknod(
        self, parent: Node, name: bytes, mode: int, rdev: int, caller: Caller
    ) -> tuple[Node, Attributes]:
        """Create a fifo, socket, device or regular file. EPERM for character device 0/0, a whiteout."""
        if stat.S_ISCHR(mode) and rdev == 0 and parent.territory.has_markers:
            raise os_error(errno.EPERM)
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        made = self.entries.make(parent, name, kind | mode, *caller, rdev=rdev)
        if made is not None:
            return made[:2]

        def make(fd: int, here: bytes, kept: int) -> None:
            os.mknod(here, kept, rdev, dir_fd=fd)

        self._make(parent, name, mode, caller, make, kind=kind, rdev=rdev)
        return self._new_node(parent, name)

    def _new_node(
        self, parent: Node, name: bytes, fd: int = -1, *, directory: bool = False
    ) -> tuple[Node, Attributes]:
        """The node of a new object (``fd``, if open) without lower parts.

        Raises OSError; then the object is removed and ``fd`` closed.
        """
        union, place = self._union, parent.parts[0]
        try:
            dir_fd = union.gate.fd(place)
            st = os.fstat(fd) if fd >= 0 else os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            if place.layer.permissions is not None:
                st = place.layer.permissions.show_at(st, dir_fd, name)
        except OSError:
            if fd >= 0:
                close_quietly(fd)
            self._territory(parent).unmake(parent, name, directory=directory)
            raise
        node = parent.territory.add(parent, name, st, place)
        union.capabilities.none(node)
        node.know_flags(0)
        return node, node.attributes_of(st)

    def _make(
        self,
        parent: Node,
        name: bytes,
        mode: int,
        caller: Caller,
        make: Callable[[int, bytes, int], T],
        *,
        kind: int,
        rdev: int = 0,
    ) -> T:
        """Run ``make``, with the fd of a directory, a name and a mode, as the caller.

        ``kind``: S_IFMT bits of what it makes.
        """
        union, steps = self._union, self._territory(parent)
        _check_name(parent, name)
        union.flags.may_make(parent)
        place = steps.writable(parent)
        dir_fd = union.gate.fd(place)
        if place.layer.is_upper:
            self._in_upper.replace_named(place, dir_fd, name)
        if place.layer.permissions is not None:
            st = self._of_new(place.layer.permissions, parent, kind | mode & ~caller.umask, rdev, caller)
            return self._in_upper.make_kept(place, name, make, st)
        if caller.umask and not default_acl(place, dir_fd):  # which replaces the umask
            mode &= ~caller.umask
        try:
            with self._acting_as(parent, caller):
                return make(dir_fd, name, mode)
        except FileExistsError:
            as_caller = partial(self._as_caller, parent, caller, make, mode)
            return steps.make_over(place, name, as_caller, directory=kind == stat.S_IFDIR)

    def _of_new(
        self, permissions: Permissions, parent: Node, mode: int, rdev: int, caller: Caller
    ) -> os.stat_result:
        """The attributes, as they are stored, of what a caller makes in ``parent``."""
        owners, owner = parent.territory.owners, (caller.uid, caller.gid)
        if owners is not None:
            owner = owners.of_creator(*owner, self._union.identity)
        return permissions.of_new(self._union.stat(parent), owner, mode, rdev)

    def _as_caller(
        self,
        parent: Node,
        caller: Caller,
        make: Callable[[int, bytes, int], T],
        mode: int,
        dir_fd: int,
        name: bytes,
    ) -> T:
        with self._acting_as(parent, caller):
            return make(dir_fd, name, mode)

    def _acting_as(self, parent: Node, caller: Caller) -> AbstractContextManager[None]:
        """Within the context, files made in ``parent`` get the caller's ids, as they are stored there."""
        owners, identity = parent.territory.owners, self._union.identity
        if owners is None:
            return identity.acting_as(caller.uid, caller.gid)
        return identity.acting_as(*owners.of_creator(caller.uid, caller.gid, identity))

    def finds_data(self, node: Node) -> bool:
        """Whether a node that is changed in place has its data also under a new name; else the data must
        follow before :meth:`link`."""
        return self._in_upper.finds_data(node)

    def link(self, node: Node, parent: Node, name: bytes) -> tuple[Node, Attributes]:
        """Create a hard link to a node that is changed in place; see :meth:`finds_data`."""
        if node.place is None:
            raise os_error(errno.ENOENT)
        if node.territory is not parent.territory:
            raise os_error(errno.EXDEV)
        _check_name(parent, name)
        return self._territory(parent).link(node, parent, name)

    # -- removing -------------------------------------------------------------------------------------

    def unlink(self, parent: Node, name: bytes, *, tried: bool = False) -> Node | None:
        """Remove the name of a non-directory.

        Returns a node that must be copied up first; in that case nothing has changed.
        """
        if not tried and self.entries.unlink(parent, name):
            return None
        node = self._existing(parent, name)
        if node.is_dir:
            raise os_error(errno.EISDIR)
        parent.territory.require_writable()
        self._union.flags.may_remove(parent, node)
        if node.is_linked_lower:
            return node
        nodes = self._union.nodes
        with self._union.outliving(node, nodes.changed) as fd:
            nodes.removing(parent, name, node, fd)
            self._territory(parent).unlink(node, parent, name)
            nodes.remove_name(node, parent, name)
            if self._union.index is not None:
                self._union.index.lost_name(node)
        return None

    def rmdir(self, parent: Node, name: bytes, *, tried: bool = False) -> None:
        """Remove a directory without visible names."""
        if not tried and self.entries.rmdir(parent, name):
            return
        node = self._existing(parent, name)
        if not node.is_dir:
            raise os_error(errno.ENOTDIR)
        parent.territory.require_writable()
        self._union.flags.may_remove(parent, node)
        if not node.territory.is_empty(node):
            raise os_error(errno.ENOTEMPTY)
        nodes = self._union.nodes
        with self._union.outliving(node, nodes.changed) as fd:
            nodes.removing(parent, name, node, fd)
            self._territory(parent).rmdir(node, parent, name)
            self._union.merge.forget(node.parts)
            nodes.remove_name(node, parent, name)

    def _existing(self, parent: Node, name: bytes) -> Node:
        """The node of a name to be removed. Raises ENOENT, and EBUSY for the root of bound storage."""
        node = self._union.nodes.child(parent, name)
        if node is None or not parent.territory.lasting:
            found = parent.territory.lookup(parent, name)
            if found is None:
                raise os_error(errno.ENOENT)
            node = found[0]
        if node.is_mountpoint:
            raise os_error(errno.EBUSY)
        return node

    # -- renaming -------------------------------------------------------------------------------------

    def rename(
        self,
        parent: Node,
        name: bytes,
        new_parent: Node,
        new_name: bytes,
        flags: int,
        *,
        tried: bool = False,
    ) -> list[Node]:
        """renameat2(2) with 0, NOREPLACE or EXCHANGE.

        Returns nodes that must be copied up first; in that case nothing has changed. A refused rename raises
        before that.
        """
        if flags not in (0, calls.RENAME_NOREPLACE, calls.RENAME_EXCHANGE):
            raise os_error(errno.EINVAL)
        if flags == 0 and not tried and self.entries.rename(parent, name, new_parent, new_name):
            return []
        node = self._existing(parent, name)
        if parent.territory is not new_parent.territory:
            raise os_error(errno.EXDEV)
        _check_name(new_parent, new_name)
        found = new_parent.territory.lookup(new_parent, new_name)
        target = None if found is None else found[0]
        parent.territory.require_writable()
        if target is not None and target.is_mountpoint:
            raise os_error(errno.EBUSY)
        self._union.flags.may_remove(parent, node)
        if target is None:
            self._union.flags.may_make(new_parent)
        else:
            self._union.flags.may_remove(new_parent, target)
        return self._territory(parent).rename(node, target, (parent, name), (new_parent, new_name), flags)


def _check_name(parent: Node, name: bytes) -> None:
    """Raise EINVAL for a new name that would be a whiteout in the upper, as fuse-overlayfs does."""
    if parent.territory.has_markers and is_reserved(name):
        raise os_error(errno.EINVAL)


def _create(dir_fd: int, name: bytes, mode: int) -> int:
    return os.open(name, _NEW, mode, dir_fd=dir_fd)


def _mkdir(dir_fd: int, name: bytes, mode: int) -> None:
    os.mkdir(name, mode, dir_fd=dir_fd)
