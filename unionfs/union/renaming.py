"""Renaming in the merged layers, with and without exchange."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import nullcontext
from functools import partial

from unionfs.core.node import Node
from unionfs.sys import calls
from unionfs.sys.calls import os_error
from unionfs.sys.fds import Owned
from unionfs.union.changing import Changing, Name
from unionfs.union.redirecting import redirect_for
from unionfs.union.redirects import markers_of
from unionfs.union.work import NO_FLAGS, NOT_EMPTY, At, rename

Redirects = dict[Node, bytes | None]
"""The renamed directories with lower parts, and the redirect that each needs; None if it has it already."""


class Renaming(Changing):
    """Renames."""

    def rename(self, node: Node, target: Node | None, old: Name, new: Name, flags: int) -> list[Node]:
        """renameat2(2). Returns nodes that must be copied up first; in that case nothing has changed."""
        moved = [node, target] if flags == calls.RENAME_EXCHANGE and target is not None else [node]
        self._check(node, target, moved, flags)
        if target is node:
            return []
        redirects = self._redirects(moved, same_parent=old[0] is new[0])
        lower = [one for one in moved if not one.is_dir and not (one.in_place and self.finds_data(one))]
        if target is not None and target.is_linked_lower and target not in lower:
            lower.append(target)  # it loses a name
        if lower:
            return lower
        for one in redirects:
            self._copy_up.directory(one)
        if len(moved) > 1:
            self._exchange(node, *old, moved[1], *new, redirects)
            return []
        union = self._union
        try:
            with nullcontext(-1) if target is None else union.outliving(target, union.nodes.changed) as fd:
                union.nodes.renaming(*old, *new, node, target, fd)
                self._replace(node, *old, target, *new, redirects)
                if target is not None:
                    union.merge.forget(target.parts)
                    union.nodes.remove_name(target, *new)
                    if union.index is not None:
                        union.index.lost_name(target)
                union.nodes.move(node, *old, *new)
        finally:
            union.nodes.changed()
        return []

    def _check(self, node: Node, target: Node | None, moved: list[Node], flags: int) -> None:
        """Raise OSError for a refused rename: EXDEV for a directory with lower parts, unless redirects are
        written."""
        exchange = flags == calls.RENAME_EXCHANGE
        if exchange and target is None:
            raise os_error(errno.ENOENT)
        if flags == calls.RENAME_NOREPLACE and target is not None:
            raise os_error(errno.EEXIST)
        writes = self._union.stack.features.redirect_dir == "on"
        if not writes and any(one.is_dir and not one.is_pure_upper for one in moved):
            raise os_error(errno.EXDEV)
        if target is not None and target is not node and not exchange:
            if target.is_dir and not node.is_dir:
                raise os_error(errno.EISDIR)
            if node.is_dir and not target.is_dir:
                raise os_error(errno.ENOTDIR)
            if target.is_dir and not target.territory.is_empty(target):
                raise os_error(errno.ENOTEMPTY)

    def _redirects(self, moved: list[Node], *, same_parent: bool) -> Redirects:
        """The directories with lower parts, each with the redirect that it needs. Raises EXDEV."""
        needed = partial(redirect_for, self._union.markers, self._union.gate, same_parent=same_parent)
        return {one: needed(one) for one in moved if one.is_dir and not one.is_pure_upper}

    def _exchange(
        self,
        node: Node,
        parent: Node,
        name: bytes,
        target: Node,
        new_parent: Node,
        new_name: bytes,
        redirects: Redirects,
    ) -> None:
        nodes = self._union.nodes
        self._copy_up.link_up(node, parent, name)
        self._copy_up.link_up(target, new_parent, new_name)
        with self._both_writable(parent, new_parent) as (old_fd, new_fd):
            self._detach(node, redirects, new_parent, new_name)
            self._detach(target, redirects, parent, name)
            self._union.origins.moves(node, new_parent.parts[0], new_fd)
            self._union.origins.moves(target, parent.parts[0], old_fd)
            nodes.renaming(parent, name, new_parent, new_name, node, target, exchange=True)
            try:
                calls.renameat2(old_fd, name, new_fd, new_name, calls.RENAME_EXCHANGE)
                nodes.has_exchanged()
                nodes.move(node, parent, name, new_parent, new_name)
                nodes.move(target, new_parent, new_name, parent, name)
            finally:
                nodes.changed()

    def _detach(self, node: Node, redirects: Redirects, parent: Node, name: bytes) -> None:
        """Make a directory independent of its name before it becomes ``name`` in ``parent``: by a redirect to
        its lower parts, or opaque if it has none and would otherwise get some. The old tree stays as it is.
        """
        union = self._union
        if not node.is_dir:
            return
        node.changes()
        fd = union.gate.fd(node.parts[0])
        if node in redirects:
            redirect = redirects[node]
            try:
                if redirect is not None:
                    self._set_marker(fd, partial(union.markers.set_redirect, fd, redirect))
            except OSError as error:  # as overlayfs: the caller may copy the directory instead
                raise os_error(errno.EXDEV) from error
        elif union.merge.is_visible_below(parent.parts, name) or (
            # a redirect to nothing, which may lead to something in another parent
            len(parent.parts) > 1 and self._has_redirect(node)
        ):
            self._set_opaque(fd)

    def _has_redirect(self, node: Node) -> bool:
        return markers_of(self._union.markers, self._union.gate, node.parts[0])[1] is not None

    def _replace(
        self,
        node: Node,
        parent: Node,
        name: bytes,
        target: Node | None,
        new_parent: Node,
        new_name: bytes,
        redirects: Redirects,
    ) -> None:
        """Rename on disk, without EXCHANGE."""
        self._copy_up.link_up(node, parent, name)
        if target is not None:
            self._copy_up.link_up(target, new_parent, new_name)
        leaves_whiteout = self._union.merge.is_visible_below(parent.parts, name)
        with self._both_writable(parent, new_parent) as (old_fd, new_fd):
            self._detach(node, redirects, new_parent, new_name)
            old, new = (old_fd, name), (new_fd, new_name)
            self.replace_named(new_parent.parts[0], *new)
            self._union.origins.moves(node, new_parent.parts[0], new_fd)
            try:
                self._rename_over(node, old, new, leaves_whiteout=leaves_whiteout)
            except OSError as error:
                if error.errno not in NOT_EMPTY or target is None or not target.is_dir:
                    raise
                self._clear_whiteouts(target, new)
                self._rename_over(node, old, new, leaves_whiteout=leaves_whiteout)

    def _rename_over(self, node: Node, old: At, new: At, *, leaves_whiteout: bool) -> None:
        there = _mode(new) if node.is_dir else 0
        if there and not stat.S_ISDIR(there):
            # a whiteout: a directory cannot be renamed over it, but it can move to the directory's old name
            self._work.exchange(old, new)
            if not leaves_whiteout:
                try:
                    os.unlink(old[1], dir_fd=old[0])
                except OSError:
                    self._work.exchange(old, new)
                    raise
            return
        if not leaves_whiteout:
            rename(old, new)
            return
        try:
            calls.renameat2(*old, *new, calls.RENAME_WHITEOUT)
        except OSError as error:
            if error.errno not in (errno.EPERM, *NO_FLAGS):
                raise
            with self._work.temporary() as whiteout:
                self._whiteout(whiteout.at, old[0])
                self._work.rename_leaving(
                    whiteout.at, old, new, directory=node.is_dir, occupied=_mode(new) != 0
                )

    def _clear_whiteouts(self, node: Node, at: At) -> None:
        """Replace a directory that contains only whiteouts with an empty opaque one, which looks the same and
        can be renamed over (overlayfs: dir.c, ovl_clear_empty)."""
        gate = self._union.gate
        st = os.stat(gate.fd(node.parts[0]))
        with self._work.temporary() as temporary, Owned(temporary.mkdir()) as fd:
            self._union.markers.set_opaque(fd)
            os.fchown(fd, st.st_uid, st.st_gid)
            os.fchmod(fd, stat.S_IMODE(st.st_mode))
            self._work.exchange(temporary.at, at)
        gate.forget(node.parts[0])


def _mode(at: At) -> int:
    """The mode of a name in the upper, 0 if missing."""
    try:
        return os.stat(at[1], dir_fd=at[0], follow_symlinks=False).st_mode
    except FileNotFoundError:
        return 0
