"""The driver `vfs`: each container has a copy of its lowers, sharing blocks where the filesystem can.

It works everywhere. Without root there are no mounts, so there the container has no storage.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from unionfs.errors import UserError
from unionfs.images.drivers import copying
from unionfs.images.drivers.base import Driver, Mounted, Wanted, Writable
from unionfs.images.drivers.private import PlainTree, PrivateMount, bind
from unionfs.storage.usage import size_of_tree
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability
from unionfs.sys.trees import remove_path


class Vfs(Driver):
    name = "vfs"

    def check(self) -> None:
        """Every host has directories."""

    def create(self, layer: Writable) -> None:
        tree, new = _tree(layer), f"{layer.path}/new"
        if os.path.isdir(tree):
            return
        remove_path(new)
        os.mkdir(new, 0o700)
        copying.copy_lowers(layer, new)
        os.rename(new, tree)

    def mount(self, layer: Writable, wanted: Wanted) -> Mounted:
        if has_capability(CAP_SYS_ADMIN):
            return PrivateMount(layer, wanted, lambda: bind(_tree(layer), layer.merged))
        if wanted.storage:
            raise UserError(
                "storage driver vfs cannot mount volumes without root; run as root, or choose the storage "
                "driver union."
            )
        return PlainTree(_tree(layer))

    def diff(self, layer: Writable) -> Iterator[tuple[str, bytes]]:
        """The changes since the lowers as they are now: they are not remembered."""
        return copying.changes_since(_tree(layer), copying.originals(layer))

    def size(self, layer: Writable) -> int:
        return size_of_tree(_tree(layer))


def _tree(layer: Writable) -> str:
    return f"{layer.path}/tree"


DRIVER = Vfs
