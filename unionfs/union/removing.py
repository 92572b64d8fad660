"""Removing names: of files, and of directories that show nothing."""

from __future__ import annotations

import errno
import os

from unionfs.union.changing import Changing, fail
from unionfs.union.nodes import Node
from unionfs.union.work import NOT_EMPTY, rename


class Removing(Changing):
    """Removes names."""

    def unlink(self, parent: Node, name: bytes) -> None:
        """Remove a name that is not a directory's."""
        union = self._union
        node = self._existing(parent, name)
        if node.is_dir:
            raise fail(errno.EISDIR)
        union.require_writable(parent)
        hides_another = node.is_upper and union.is_visible_below(parent, name)
        with union.outliving(node):
            dir_fd = union.gate.fd(self._writable(parent))
            if not node.is_upper:
                self._whiteout((dir_fd, name), dir_fd)
            elif hides_another:
                with self._work.temporary() as temporary:
                    self._whiteout(temporary.at, dir_fd)
                    temporary.put(dir_fd, name)
            else:
                os.unlink(name, dir_fd=dir_fd)
            union.nodes.remove_name(node, parent, name)

    def rmdir(self, parent: Node, name: bytes) -> None:
        """Remove a directory that shows nothing."""
        union = self._union
        node = self._existing(parent, name)
        if not node.is_dir:
            raise fail(errno.ENOTDIR)
        union.require_writable(parent)
        if not union.is_empty(node):
            raise fail(errno.ENOTEMPTY)
        hides_another = node.is_upper and union.is_visible_below(parent, name)
        with union.outliving(node):
            dir_fd = union.gate.fd(self._writable(parent))
            if node.identity is not None:
                os.rmdir(name, dir_fd=dir_fd)
            elif not node.is_upper:
                self._whiteout((dir_fd, name), dir_fd)
            else:
                self._remove_directory(dir_fd, name, hides_another=hides_another)
            for part in node.parts:
                union.gate.forget(part)
            union.nodes.remove_name(node, parent, name)

    def _remove_directory(self, dir_fd: int, name: bytes, *, hides_another: bool) -> None:
        """Remove a directory of the upper that holds nothing but whiteouts."""
        with self._work.temporary() as temporary:
            if hides_another:
                self._whiteout(temporary.at, dir_fd)
                self._work.exchange(temporary.at, (dir_fd, name))
                return
            try:
                os.rmdir(name, dir_fd=dir_fd)
            except OSError as error:
                if error.errno not in NOT_EMPTY:
                    raise
                rename((dir_fd, name), temporary.at)
