"""Storage drivers: what the root filesystem of a container is made of, and where its changes go.

    union          our own FUSE union (the default)
    overlay2       the kernel's overlay mount
    btrfs          snapshots of a btrfs subvolume
    zfs            clones of a ZFS dataset
    devicemapper   thin snapshots of a block device
    vfs            a full copy, with shared blocks (reflinks) where the filesystem can

Each is one class in a module of its name, with the interface `base.Driver`. union, overlay2 and vfs take the
lowers of a container as they are; the others copy them once into a *base* and take snapshots of it
(`snapshots.py`).
"""

from __future__ import annotations

from importlib import import_module

from unionfs.images.drivers.base import Driver, Mounted, Wanted, Writable
from unionfs.settings.drivers import STORAGE_DRIVERS

__all__ = ["Driver", "Mounted", "Wanted", "Writable", "open_driver"]


def open_driver(name: str, root: str) -> Driver:
    """The driver of that name for a storage root. Changes nothing, and tests nothing of the host."""
    assert name in STORAGE_DRIVERS
    # A module is only imported when its driver is used.
    driver: Driver = import_module(f"{__name__}.{name}").DRIVER(root)
    return driver
