"""Access to the real object of a node: its attributes, paths and fds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from unionfs.core import layercalls, marks
from unionfs.core import objects as core
from unionfs.core.node import Node
from unionfs.core.nodes import NodeTable
from unionfs.core.places import Gate
from unionfs.sys.fds import Owned, close_quietly
from unionfs.union.markers import Markers
from unionfs.union.permissions import shown_names, stored_name

_PATH: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Objects(core.Objects):
    """Accesses the objects of nodes through the gate."""

    nodes: NodeTable
    """Those of the union."""

    def __init__(self, gate: Gate, markers: Markers) -> None:
        super().__init__(gate)
        self.markers = markers

    def shown(self, node: Node, st: os.stat_result, fd: int = -1) -> os.stat_result:
        """The attributes to show for the node's object; ``st``: its own, ``fd``: an fd of it, if open."""
        permissions = node.layer.permissions
        if permissions is None:
            return st
        if fd >= 0:
            return permissions.show_fd(st, fd)
        path, follow = self.path(node)
        return permissions.show(st, path, follow=follow)

    def stored_name(self, node: Node, name: bytes) -> bytes:
        """The name on disk of the user's xattr ``name`` of a node."""
        permissions = node.layer.permissions
        if permissions is None:
            return node.territory.stored_name(name)
        return stored_name(self.markers, permissions, name)

    def shown_names(self, node: Node, stored: list[bytes]) -> list[bytes]:
        """Convert names on disk of a node's xattrs to the names that users see."""
        permissions = node.layer.permissions
        if permissions is None:
            return node.territory.shown_names(stored)
        return shown_names(self.markers, permissions, stored)

    def path(self, node: Node) -> tuple[bytes, bool]:
        """A path of /proc/self/fd for calls without an ``at`` form, and whether to follow its final link."""
        if node.held >= 0:
            return b"/proc/self/fd/%d" % node.held, True
        if node.is_dir:
            return b"/proc/self/fd/%d" % self.gate.fd(node.parts[0]), True
        assert node.place is not None
        return b"/proc/self/fd/%d/%b" % (self.gate.fd(node.place), node.real_name), False

    def path_fd(self, node: Node) -> tuple[int, bool]:
        """An O_PATH fd of the node's object for immediate use, and whether the caller must close it."""
        if node.held >= 0:
            return node.held, False
        if node.is_dir:
            return self.gate.fd(node.parts[0]), False
        assert node.place is not None
        dir_fd, name = self.gate.fd(node.place), node.real_name
        try:
            fd = layercalls.call(os.open, name, _PATH, dir_fd=dir_fd)
        except PermissionError as error:
            fd = self.gate.rights.open(dir_fd, name, _PATH, error, upper=node.place.layer.is_upper)
        try:
            node.check(layercalls.call(os.fstat, fd))
        except BaseException:
            close_quietly(fd)
            raise
        return fd, True

    @contextmanager
    def checked_path(self, node: Node) -> Iterator[bytes]:
        """A path of the node's object within the context, for calls that follow its final link."""
        fd, opened = self.path_fd(node)
        try:
            yield b"/proc/self/fd/%d" % fd
        finally:
            if opened:
                close_quietly(fd)

    def open_path(self, node: Node) -> int:
        """A new O_PATH fd of the node's object; the caller closes it."""
        fd, opened = self.path_fd(node)
        return fd if opened else marks.duplicate(fd)

    @contextmanager
    def outliving(self, node: Node, done: Callable[[], object] = lambda: None) -> Iterator[int]:
        """Keep an fd of the object, which it yields, if the context removes the last known name of ``node``.

        Only after the context succeeds: until then the object is accessed by its name. ``done`` is called at
        the end, before an fd that is not kept is closed: a daemon that takes over must not use the fd of
        another file for it.
        """
        fd = self.open_path(node)
        try:
            if node.held < 0:
                self.gate.keeps(fd)
            yield fd
            if node.unlinked and node.held < 0:
                node.hold(fd)
                fd = -1
                node.territory.lost_name(node)
        finally:
            done()
            if fd >= 0:
                close_quietly(fd)
        if node.lookups == 0:  # nobody will forget it: it was found by this request alone
            self.nodes.forget(node, 0)

    def readlink_refused(self, node: Node) -> bytes:
        """The target of a symlink in a directory that this user may not search."""
        with Owned(self.open_path(node)) as fd:
            return layercalls.call(os.readlink, b"", dir_fd=fd)


def link_object(node: Node, source: int, dir_fd: int, name: bytes) -> None:
    """linkat(2) of the node's object, from the real directory ``source`` if it has a name. A nameless object
    can be linked only if it never had a name (O_TMPFILE); else ENOENT (fs/namei.c, vfs_link).
    """
    if node.held >= 0:
        os.link(b"/proc/self/fd/%d" % node.held, name, dst_dir_fd=dir_fd, follow_symlinks=True)
    else:
        os.link(node.real_name, name, src_dir_fd=source, dst_dir_fd=dir_fd, follow_symlinks=False)
