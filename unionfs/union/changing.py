"""The changes of the merged layers, on disk and in the node table.

Each change becomes visible atomically: by one system call in the upper, or one rename out of work. The order
in every function: steps that can fail, then that step, then the node table.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Protocol, TypeVar

from unionfs.core.node import Attributes, Node
from unionfs.core.places import Place
from unionfs.core.search import PREFIX
from unionfs.sys.fds import Owned
from unionfs.union.copyup import CopyUp
from unionfs.union.redirecting import absolute_redirect
from unionfs.union.tree import Union
from unionfs.union.work import At

T = TypeVar("T")
Name = tuple[Node, bytes]
"""A name: the node of its directory, and the name within it."""


class Steps(Protocol):
    """The changes in one territory. `Changes` has done the checks common to all territories."""

    def writable(self, directory: Node) -> Place:
        """The real directory of a directory to be changed. Raises EROFS, ENOENT."""

    def make_over(self, place: Place, name: bytes, make: Callable[[int, bytes], T], *, directory: bool) -> T:
        """Call ``make`` (with a directory fd and a name), and replace the marker at ``name`` with its result.
        Raises FileExistsError without a marker.
        """

    def unmake(self, parent: Node, name: bytes, *, directory: bool) -> None:
        """Remove a new object, since its attributes cannot be read. Ignores errors."""

    def unlink(self, node: Node, parent: Node, name: bytes) -> None:
        """Remove a name of a non-directory from the disk."""

    def rmdir(self, node: Node, parent: Node, name: bytes) -> None:
        """Remove a directory without visible names from the disk."""

    def rename(self, node: Node, target: Node | None, old: Name, new: Name, flags: int) -> list[Node]:
        """renameat2(2). Returns nodes that must be copied up first; in that case nothing has changed."""

    def link(self, node: Node, parent: Node, name: bytes) -> tuple[Node, Attributes]:
        """Create a hard link to a node that is changed in place."""


class Changing:
    """The base of the changes of the merged layers. Not thread-safe, like the union itself."""

    def __init__(self, union: Union, copy_up: CopyUp | None = None) -> None:
        """``copy_up`` copies up directories before a change."""
        self._union = union
        self._copy_up = copy_up or CopyUp(union)
        self._work = union.work

    def writable(self, directory: Node) -> Place:
        """The upper's directory of a node, about to be changed."""
        place = self._copy_up.directory(directory)
        assert place.layer.is_upper
        place.fills()
        directory.changes()
        return place

    @contextmanager
    def _both_writable(self, one: Node, other: Node) -> Iterator[tuple[int, int]]:
        """Fds of the upper's directories of two nodes, about to be changed; see :meth:`_directories`."""
        first, second = self.writable(one), self.writable(other)
        one.changes()  # again: copying up the other into it has restored its ctime
        with self._directories(first, second) as fds:
            yield fds

    @contextmanager
    def _directories(self, one: Place, other: Place) -> Iterator[tuple[int, int]]:
        """Fds of two real directories that stay open even if the gate closes its own."""
        gate = self._union.gate
        with Owned(os.dup(gate.fd(one))) as first, Owned(os.dup(gate.fd(other))) as second:
            yield first, second

    def replace_named(self, place: Place, dir_fd: int, name: bytes) -> None:
        """Replace a whiteout by name in the upper with overlayfs's, before something gets the name ``name``.

        Left beside the new object, it would hide that from fuse-overlayfs. If both exist, as after a crash of
        fuse-overlayfs, both stay.
        """
        if place.asked_named < 0 or not self._union.merge.named.hides(place, dir_fd, name):
            return
        with suppress(FileExistsError, IsADirectoryError):
            self._whiteout((dir_fd, name), dir_fd)
            os.unlink(PREFIX + name, dir_fd=dir_fd)

    def finds_data(self, node: Node) -> bool:
        """Let a file of the upper find its data under other names if it is metacopy, by a redirect (dir.c,
        ovl_set_redirect). False if its data must follow before it gets another name.
        """
        if node.kind != stat.S_IFREG or not node.territory.has_markers:
            return True
        union = self._union
        path, follow = union.path(node)
        if union.markers.metacopy_value(path, follow=follow) is None:
            return True
        if union.stack.features.metacopy != "on":
            return False
        with union.checked_path(node) as path:
            redirect = union.markers.redirect_value(path, follow=True)
            if redirect is None or not redirect.startswith(b"/"):
                try:
                    redirect = absolute_redirect(union.markers, union.gate, node, redirect)
                    os.setxattr(path, union.markers.redirect, redirect)
                except OSError:
                    return False
        return True

    def _set_opaque(self, fd: int) -> None:
        """Make an upper's directory hide the layers below it."""
        self._set_marker(fd, partial(self._union.markers.set_opaque, fd))

    def _set_marker(self, fd: int, call: Callable[[], None]) -> None:
        """Set an xattr of an upper's directory, whatever its mode."""
        try:
            call()
        except PermissionError:
            with self._work.rights.widened(fd):
                call()

    def _whiteout(self, at: At, directory: int) -> None:
        """Make a whiteout at a name that is, or will be, in the upper's directory ``directory`` (an fd)."""
        union = self._union
        if not self._work.make_whiteout(*at):
            union.markers.make_whiteout(*at, (directory, union.require_upper().root_fd))
