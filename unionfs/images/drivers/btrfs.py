"""The driver `btrfs`: a base is a subvolume, a container a snapshot of it. The storage root is on btrfs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from unionfs.errors import UserError, quoted
from unionfs.images.drivers import copying
from unionfs.images.drivers.backing import existing, kind_of
from unionfs.images.drivers.base import Wanted, Writable
from unionfs.images.drivers.private import PrivateMount, bind
from unionfs.images.drivers.snapshots import Snapshots
from unionfs.storage.usage import size_of_tree
from unionfs.sys import btrfs
from unionfs.sys.calls import filesystem_magic
from unionfs.sys.fds import directory, is_directory


class Btrfs(Snapshots):
    name = "btrfs"

    def check(self) -> None:
        self._need_root()
        place = existing(self.root)
        with directory(place) as fd:
            if filesystem_magic(fd) == btrfs.MAGIC:
                return
        raise UserError(
            f"storage driver btrfs needs the storage root on btrfs, and {quoted(self.root)} is on "
            f"{kind_of(place)}; give a --root on btrfs, or choose another driver."
        )

    def mount(self, layer: Writable, wanted: Wanted) -> PrivateMount:
        return PrivateMount(layer, wanted, lambda: bind(_tree(layer), layer.merged))

    def _new_base(self, key: str, layer: Writable) -> Mapping[str, Any]:
        btrfs.create(self._base(key))
        copying.copy_lowers(layer, self._base(key))
        return {"size": size_of_tree(self._base(key))}

    def _delete_base(self, key: str) -> None:
        _destroy(self._base(key))

    def _has(self, layer: Writable) -> bool:
        return is_directory(_tree(layer))

    def _snapshot(self, key: str, layer: Writable) -> None:
        btrfs.snapshot(self._base(key), _tree(layer))

    def _delete(self, layer: Writable) -> None:
        _destroy(_tree(layer))

    @contextmanager
    def _trees(self, layer: Writable, key: str) -> Iterator[tuple[str, str]]:
        yield _tree(layer), self._base(key)

    def _base_size(self, key: str) -> int:
        return int(self._record(key)["size"])

    def _base(self, key: str) -> str:
        return f"{self._home(key)}/tree"


def _tree(layer: Writable) -> str:
    return f"{layer.path}/tree"


def _destroy(path: str) -> None:
    """Remove a subvolume, and those that the container has made in it."""
    try:
        with suppress(FileNotFoundError):
            btrfs.destroy(path)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        for above, names, _, _ in os.fwalk(path, topdown=False):
            for name in names:
                inner = f"{above}/{name}"
                st = os.lstat(inner)
                if st.st_ino == btrfs.FIRST_INODE and not os.path.islink(inner):
                    btrfs.destroy(inner)
        btrfs.destroy(path)


DRIVER = Btrfs
