"""The tree of a union: the merged layers and the storage bound in them."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from unionfs.core import layercalls
from unionfs.core.node import Attributes, Node
from unionfs.core.nodes import NodeTable
from unionfs.core.places import BoundLayer, Layer
from unionfs.core.state import State
from unionfs.sys.calls import os_error
from unionfs.sys.creds import Identity
from unionfs.sys.inotify import Inotify
from unionfs.union.bound import Bound
from unionfs.union.flags import Flags
from unionfs.union.images import is_image
from unionfs.union.index import Index, open_index
from unionfs.union.layers import LayerStack
from unionfs.union.merge import Merge
from unionfs.union.merged import Merged
from unionfs.union.objects import Objects
from unionfs.union.openfiles import OpenFiles
from unionfs.union.origin import Origins
from unionfs.union.rights import Rights
from unionfs.union.shortcuts import Capabilities, Shortcuts
from unionfs.union.watching import Watches
from unionfs.union.work import Work

_ALL_SHORTCUTS: Final = Shortcuts()

log = logging.getLogger(__name__)


class Union(Objects):
    """The tree of a layer stack. Not thread-safe: only one thread calls it."""

    def __init__(
        self,
        stack: LayerStack,
        *,
        directory_fds: int = 1024,
        shortcuts: Shortcuts = _ALL_SHORTCUTS,
        notifier: Inotify | None = None,
        state: State | None = None,
    ) -> None:
        """``notifier``: watch the lowers with it; it is closed with the union. ``state``: where to
        record what another daemon needs to take over."""
        self.stack = stack
        self.state = state
        for layer in stack.layers:
            if not layer.is_upper and (layer.remote or not shortcuts.fast_layers):
                layer.is_slow()
        if stack.keeps_permissions:  # which are stored under other names
            shortcuts = replace(shortcuts, capabilities=False)
        if notifier is not None:
            # An open file must outlive its name, so the daemon has it open.
            shortcuts = replace(shortcuts, unread_files=False)
        rights = Rights(stack.work_fd)
        self.merge = Merge(stack.layers, stack.markers, directory_fds=directory_fds, rights=rights)
        super().__init__(self.merge.gate, stack.markers)
        self.origins = Origins(stack.layers, stack.markers, stack.features, self.gate)
        self.index = open_index(stack, self.origins)
        self.watches: Watches | None = None
        if notifier is not None:
            lowers = [layer for layer in stack.layers if not layer.is_upper and not is_image(layer.path)]
            self.watches = Watches(notifier, lowers, self.gate)
        known = None if self.watches is None else self.watches.known
        self.nodes = NodeTable(
            self.origins, self.index, self.gate, self._gone, copies_up=stack.upper is not None, known=known,
            state=state,
        )
        self.nodes.add_root(Merged(self, self.nodes, self.merge, stack), self.merge.roots)
        self.work = Work(stack.work_fd, rights)
        self.identity = Identity(stack.work_fd)
        self.shortcuts = shortcuts
        self.capabilities = Capabilities(shortcuts)
        self.flags = Flags(self, stack.markers)
        self.files = OpenFiles(self.gate, stack.markers, self.capabilities, shortcuts)
        self._owner_was_refused = False

    def has_index(self, index: Index | None) -> None:
        """Set the index of another upper; None: it has none."""
        self.index = index
        self.nodes.has_index(index)

    def _gone(self, node: Node) -> None:
        self.files.gone(node)
        if self.watches is not None:
            self.watches.gone(node)

    def lookup(self, parent: Node, name: bytes) -> tuple[Node, Attributes] | None:
        """The node ``name`` in ``parent`` with its attributes, or None."""
        return parent.territory.lookup(parent, name)

    def node_at(self, names: Sequence[bytes]) -> Node:
        """The node of a path from the root. Raises ``OSError``."""
        node = self.nodes.root
        for name in names:
            found = self.lookup(node, name)
            if found is None:
                raise os_error(errno.ENOENT)
            node = found[0]
        return node

    def number_of_unreachable(self, parent: Node, name: bytes) -> tuple[int, int] | None:
        """The listed number and file type (0: unknown) of a name whose lookup fails.

        None if it no longer exists. As in overlayfs (readdir.c, ovl_cache_update), which lists all names.
        """
        for part in parent.parts:
            try:
                st = layercalls.call(os.stat, name, dir_fd=self.gate.fd(part), follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError:
                return self.nodes.unreachable(parent, name), 0
            return self.nodes.unreachable(parent, name), stat.S_IFMT(st.st_mode)
        return None

    def require_upper(self) -> Layer:
        """The upper layer. Raises EROFS without one."""
        if self.stack.upper is None:
            raise os_error(errno.EROFS)
        return self.stack.upper

    def owner_refused(self, node: Node, st: os.stat_result) -> None:
        """A copy could not get the owner of its lower object: log why, once."""
        if not self._owner_was_refused:
            self._owner_was_refused = True
            log.warning(
                "%r cannot be copied up: it belongs to uid %d and gid %d, and only root can give the copy to "
                "them; with the mount options squash_to_uid=%d,squash_to_gid=%d everything is this user's",
                os.fsdecode(node.name), st.st_uid, st.st_gid, self.identity.uid, self.identity.gid,
            )  # fmt: skip

    def bind(self, parent: Node, name: bytes, layer: BoundLayer) -> Node:
        """Show storage as the existing name ``name`` in ``parent``, until `nodes.forget` of it.

        Call it before the first lookup of the name.
        """
        known = self.nodes.child(parent, name)
        # The directory was not looked up yet; without a child the table would drop it.
        parent.looked_up()
        if known is not None:
            self.nodes.remove_name(known, parent, name)
        node = Bound(self, self.nodes, layer).root(parent, name)
        self.nodes.forget(parent, 1)
        node.looked_up()
        return node

    def close(self) -> None:
        """Close every fd that the tree opened (not the layers' own)."""
        self.work.close()
        self.merge.close()
        if self.watches is not None:
            self.watches.close()


def path_of(node: Node) -> bytes:
    """The path of a node from the root of the union, b"" for the root. If it has several: the first."""
    steps = []
    while node.parent is not None:
        steps.append(node.name)
        node = node.parent
    return b"".join(b"/" + step for step in reversed(steps))
