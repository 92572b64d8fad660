"""Renaming, with and without exchange."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import nullcontext

from unionfs.sys import calls
from unionfs.union import bound
from unionfs.union.changing import Changing, fail
from unionfs.union.listing import is_empty
from unionfs.union.nodes import Node
from unionfs.union.work import NO_FLAGS


class Renaming(Changing):
    """Renames."""

    def rename(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int) -> None:
        """renameat2(2) with NOREPLACE or EXCHANGE. What :meth:`renamed` returns is in the upper already."""
        union = self._union
        node, target = self._accepted(parent, name, new_parent, new_name, flags)
        if parent.identity is not None:
            bound.rename(union, node, parent, name, new_parent, new_name, flags)
            return
        if target is node:
            return
        if flags == calls.RENAME_EXCHANGE:
            assert target is not None
            self._exchange(node, parent, name, target, new_parent, new_name)
            return
        with nullcontext() if target is None else union.outliving(target):
            self._replace(node, parent, name, target, new_parent, new_name)
            if target is not None:
                for part in target.parts:
                    union.gate.forget(part)
                union.nodes.remove_name(target, new_parent, new_name)
            union.nodes.move(node, parent, name, new_parent, new_name)

    def renamed(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> list[Node]:
        """What such a rename moves, and so has to be in the upper before, unless it is a directory.

        Raises what :meth:`rename` would: a rename that is refused copies nothing up.
        """
        node, target = self._accepted(parent, name, new_parent, new_name, flags)
        if flags == calls.RENAME_EXCHANGE:
            assert target is not None
            return [node, target]
        return [node]

    def _accepted(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> tuple[Node, Node | None]:
        """The nodes of both names, when nothing speaks against the rename.

        EXDEV for a directory that shows something of a lower, as overlayfs without ``redirect_dir``.
        """
        union = self._union
        if flags not in (0, calls.RENAME_NOREPLACE, calls.RENAME_EXCHANGE):
            raise fail(errno.EINVAL)
        node = self._existing(parent, name)
        if not bound.same_storage(parent, new_parent):
            raise fail(errno.EXDEV)
        found = union.lookup(new_parent, new_name)
        target = None if found is None else found[0]
        if parent.identity is not None:
            union.require_writable(parent)
        if target is not None and target.is_mountpoint:
            raise fail(errno.EBUSY)
        if parent.identity is not None:
            return node, node
        exchange = flags == calls.RENAME_EXCHANGE
        if exchange and target is None:
            raise fail(errno.ENOENT)
        if flags == calls.RENAME_NOREPLACE and target is not None:
            raise fail(errno.EEXIST)
        moved = [node, target] if exchange and target is not None else [node]
        if any(one.is_dir and not one.is_pure_upper for one in moved):
            raise fail(errno.EXDEV)
        if target is not None and target is not node and not exchange:
            if target.is_dir and not node.is_dir:
                raise fail(errno.EISDIR)
            if node.is_dir and not target.is_dir:
                raise fail(errno.ENOTDIR)
            if target.is_dir and not is_empty(union, target):
                raise fail(errno.ENOTEMPTY)
        for one in moved:
            if not one.is_dir and target is not node:
                union.refuse_metacopy(one)
        return node, target

    def _exchange(
        self, node: Node, parent: Node, name: bytes, target: Node, new_parent: Node, new_name: bytes
    ) -> None:
        nodes = self._union.nodes
        self._hide_below(node, new_parent, new_name)
        self._hide_below(target, parent, name)
        with self._both_writable(parent, new_parent) as (old_fd, new_fd):
            calls.renameat2(old_fd, name, new_fd, new_name, calls.RENAME_EXCHANGE)
        nodes.move(node, parent, name, new_parent, new_name)
        nodes.move(target, new_parent, new_name, parent, name)

    def _hide_below(self, node: Node, parent: Node, name: bytes) -> None:
        """Make a directory opaque that is to be ``name`` in ``parent``, if a lower has that name there."""
        union = self._union
        if node.is_dir and union.is_visible_below(parent, name):
            union.markers.set_opaque(union.gate.fd(node.parts[0]))

    def _replace(
        self, node: Node, parent: Node, name: bytes, target: Node | None, new_parent: Node, new_name: bytes
    ) -> None:
        """The step on disk of a rename without EXCHANGE."""
        leaves_whiteout = self._union.is_visible_below(parent, name)
        self._hide_below(node, new_parent, new_name)
        with self._both_writable(parent, new_parent) as (old_fd, new_fd):
            self._rename_over(node, name, target, new_name, old_fd, new_fd, leaves_whiteout=leaves_whiteout)

    def _rename_over(
        self,
        node: Node,
        name: bytes,
        target: Node | None,
        new_name: bytes,
        old_fd: int,
        new_fd: int,
        *,
        leaves_whiteout: bool,
    ) -> None:
        try:
            st = os.stat(new_name, dir_fd=new_fd, follow_symlinks=False)
        except FileNotFoundError:
            st = None
        if node.is_dir and st is not None and not stat.S_ISDIR(st.st_mode):
            # a whiteout: no directory can be renamed over it, but it can go where the directory was
            self._work.exchange((old_fd, name), (new_fd, new_name))
            if not leaves_whiteout:
                os.unlink(name, dir_fd=old_fd)
            return
        if target is not None and target.is_dir and st is not None:
            self._clear_whiteouts(target, new_fd, new_name)
        if not leaves_whiteout:
            calls.renameat2(old_fd, name, new_fd, new_name)
            return
        try:
            calls.renameat2(old_fd, name, new_fd, new_name, calls.RENAME_WHITEOUT)
        except OSError as error:
            if error.errno not in (errno.EPERM, *NO_FLAGS):
                raise
            old, new = (old_fd, name), (new_fd, new_name)
            with self._work.temporary() as whiteout:
                self._whiteout(whiteout.at, old_fd)
                self._work.rename_leaving(
                    whiteout.at, old, new, directory=node.is_dir, occupied=st is not None
                )

    def _clear_whiteouts(self, node: Node, dir_fd: int, name: bytes) -> None:
        """Put an opaque empty directory in the place of one that holds only whiteouts (overlayfs: dir.c,
        ovl_clear_empty): nothing changes to the eye, and a directory can be renamed over it."""
        union = self._union
        inner = union.gate.open_for_listing(node.parts[0])
        try:
            if not os.listdir(inner):
                return
            st = os.stat(inner)
            work = self._work.fd
            with self._work.temporary() as temporary:
                os.mkdir(temporary.name, 0o700, dir_fd=work)
                fd = os.open(temporary.name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=work)
                try:
                    union.markers.set_opaque(fd)
                    os.fchown(fd, st.st_uid, st.st_gid)
                    os.fchmod(fd, stat.S_IMODE(st.st_mode))
                finally:
                    os.close(fd)
                self._work.exchange(temporary.at, (dir_fd, name))
        finally:
            os.close(inner)
        union.gate.forget(node.parts[0])
