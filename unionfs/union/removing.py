"""Removes names from the merged layers: a whiteout hides the object of a lower."""

from __future__ import annotations

import os

from unionfs.core.node import Node
from unionfs.union.changing import Changing
from unionfs.union.work import NOT_EMPTY


class Removing(Changing):
    """Removes names."""

    def unlink(self, node: Node, parent: Node, name: bytes) -> None:
        """Remove a name of a non-directory from the disk."""
        self._copy_up.link_up(node, parent, name)
        dir_fd = self._union.gate.fd(self.writable(parent))
        if not node.in_place:
            self._whiteout((dir_fd, name), dir_fd)
        elif self._union.merge.is_visible_below(parent.parts, name):
            with self._work.temporary() as temporary:
                self._whiteout(temporary.at, dir_fd)
                temporary.put(dir_fd, name)
        else:
            os.unlink(name, dir_fd=dir_fd)

    def rmdir(self, node: Node, parent: Node, name: bytes) -> None:
        """Remove a directory without visible names, which may contain whiteouts, from the disk."""
        dir_fd = self._union.gate.fd(self.writable(parent))
        if not node.in_place:
            self._whiteout((dir_fd, name), dir_fd)
            return
        with self._work.temporary() as temporary:
            if self._union.merge.is_visible_below(parent.parts, name):
                self._whiteout(temporary.at, dir_fd)
                self._work.exchange(temporary.at, (dir_fd, name))
                return
            try:
                os.rmdir(name, dir_fd=dir_fd)
            except OSError as error:
                if error.errno not in NOT_EMPTY:
                    raise
                temporary.take(dir_fd, name)
