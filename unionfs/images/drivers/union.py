"""The driver `union`: our own FUSE union over the lowers, with an upper in the container's directory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from unionfs.daemon import live
from unionfs.daemon.process import mount
from unionfs.daemon.settle import settle
from unionfs.daemon.unmount import umount
from unionfs.errors import UserError, quoted
from unionfs.images.drivers import uppers
from unionfs.images.drivers.base import Wanted, Writable
from unionfs.settings.specs import Spec
from unionfs.sys.process import pid_and_start, wait_gone

_END_SECONDS = 20.0


class Union(uppers.UpperDriver):
    name = "union"

    def check(self) -> None:
        """The mount itself says what is missing."""

    def mount(self, layer: Writable, wanted: Wanted) -> MountedUnion:
        own_upper = wanted.upper is None
        if own_upper:
            uppers.hide_storage(layer)
        settings = settle(
            layer.merged,
            lowers=layer.lowers,
            upper=uppers.upper_of(layer) if own_upper else wanted.upper,
            work=uppers.work_of(layer) if own_upper else wanted.work,
            options=["volatile"] if own_upper and wanted.volatile else [],
            storage=wanted.storage,
            storage_root=layer.root,
        )
        me = os.getpid()
        mount(replace(settings, lives_with=pid_and_start(me)))
        merged = settings.mountpoint
        entry = next((entry for entry in live.entries() if entry.settings.mountpoint == merged), None)
        if entry is None:
            raise UserError(f"{quoted(merged)} was unmounted before the command could start; try again.")
        return MountedUnion(entry)


@dataclass(frozen=True, slots=True)
class MountedUnion:
    """A union, whose daemon ends with this process."""

    entry: live.LiveMount

    @property
    def path(self) -> str:
        return self.entry.settings.mountpoint

    @property
    def storage(self) -> Sequence[Spec]:
        return self.entry.settings.storage

    def is_alive(self) -> bool:
        return self.entry.is_alive()

    def unmount(self) -> None:
        """With the container ends whatever else holds the mount, such as a mount namespace that was copied
        meanwhile: the next run needs the upper.
        """
        try:
            umount(self.path)
        except UserError:
            umount(self.path, force=True)

    def abandon(self) -> None:
        """The daemon unmounts it."""
        wait_gone(self.entry.pid, self.entry.started, _END_SECONDS)


DRIVER = Union
