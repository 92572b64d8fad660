"""The driver `zfs`: a base is a dataset with a snapshot, a container a clone. The storage root is on ZFS.

Source: zfs-create(8), zfs-snapshot(8), zfs-clone(8), zfs-destroy(8). Datasets with `mountpoint=legacy` are
mounted by this process alone.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from unionfs.errors import UserError, quoted
from unionfs.images.drivers import copying
from unionfs.images.drivers.backing import existing, kind_of
from unionfs.images.drivers.base import Wanted, Writable
from unionfs.images.drivers.private import PrivateMount, attach_device, mounted_device
from unionfs.images.drivers.snapshots import Snapshots
from unionfs.storage.mounts import need_program, run_program
from unionfs.sys import detached

_LEGACY = ("-o", "mountpoint=legacy")
_ABOVE = ("-o", "mountpoint=none", "-o", "acltype=posixacl", "-o", "xattr=sa")
"""The others inherit it: without acltype a dataset refuses ACLs (zfsprops(7))."""
_BUSY_SECONDS = 5.0
_OTHER = "choose another driver"


class Zfs(Snapshots):
    name = "zfs"

    def check(self) -> None:
        self._need_root()
        if not detached.is_known("zfs"):  # a module without the alias fs-zfs is not loaded by that
            raise UserError(
                "storage driver zfs: this kernel has no ZFS; load the module zfs (`modprobe zfs`, package "
                f"zfs-dkms), or {_OTHER}."
            )
        need_program("zfs", "zfsutils-linux", "storage driver zfs")
        kind = kind_of(existing(self.root))
        if kind != "zfs":
            raise UserError(
                f"storage driver zfs needs the storage root on ZFS, and {quoted(self.root)} is on {kind}; "
                f"give a --root on a ZFS dataset, or {_OTHER}."
            )

    def mount(self, layer: Writable, wanted: Wanted) -> PrivateMount:
        return PrivateMount(layer, wanted, lambda: attach_device("zfs", self._clone(layer), layer.merged))

    def size(self, layer: Writable) -> int:
        return self._property("used", self._clone(layer))

    def _new_base(self, key: str, layer: Writable) -> Mapping[str, Any]:
        if not self._exists(self._dataset()):
            self._zfs("create", *_ABOVE, self._dataset())
        base = self._base(key)
        self._zfs("create", *_LEGACY, base)
        with mounted_device("zfs", base) as tree:
            copying.copy_lowers(layer, tree, f"the dataset {base}")
        self._zfs("snapshot", f"{base}@base")
        return {}

    def _delete_base(self, key: str) -> None:
        """With the last dataset of this storage root goes the one above it."""
        self._destroy(self._base(key))
        if not any(name.startswith(f"{self._dataset()}/") for name in self._datasets()):
            self._destroy(self._dataset())

    def _has(self, layer: Writable) -> bool:
        return self._exists(self._clone(layer))

    def _snapshot(self, key: str, layer: Writable) -> None:
        self._zfs("clone", *_LEGACY, f"{self._base(key)}@base", self._clone(layer))

    def _delete(self, layer: Writable) -> None:
        self._destroy(self._clone(layer))

    @contextmanager
    def _trees(self, layer: Writable, key: str) -> Iterator[tuple[str, str]]:
        with (
            mounted_device("zfs", self._clone(layer)) as tree,
            mounted_device("zfs", f"{self._base(key)}@base", read_only=True) as base,
        ):
            yield tree, base

    def _base_size(self, key: str) -> int:
        return self._property("referenced", self._base(key))

    # -- datasets

    def _datasets(self) -> list[str]:
        """The dataset that the storage root is on, and then all below it."""
        return self._zfs("list", "-H", "-o", "name", "-r", existing(self.root)).splitlines()

    def _dataset(self) -> str:
        """The dataset of this storage root, below the one that the root is on."""
        above = self._zfs("list", "-H", "-o", "name", existing(self.root)).strip()
        return f"{above}/unionfs-{hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]}"

    def _base(self, key: str) -> str:
        return f"{self._dataset()}/base-{key}"

    def _clone(self, layer: Writable) -> str:
        return f"{self._dataset()}/container-{os.path.basename(layer.path)}"

    def _exists(self, dataset: str) -> bool:
        return dataset in self._datasets()

    def _destroy(self, dataset: str) -> None:
        """The processes of a container that was killed may keep it busy for a moment longer."""
        end = time.monotonic() + _BUSY_SECONDS
        while self._exists(dataset):
            try:
                self._zfs("destroy", "-r", dataset)
            except UserError as error:
                if "busy" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def _property(self, name: str, dataset: str) -> int:
        return int(self._zfs("get", "-Hp", "-o", "value", name, dataset))

    def _zfs(self, *words: str) -> str:
        cure = "see `zpool list` and `zpool status`"
        return run_program(("zfs", *words), f"storage driver zfs: `zfs {words[0]}` failed", cure=cure)


DRIVER = Zfs
