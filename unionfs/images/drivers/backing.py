"""The filesystem of the storage root."""

from __future__ import annotations

import os

from unionfs.sys.mountinfo import location_of, mounts_of_device


def existing(path: str) -> str:
    """Return the path, or the nearest directory above it that exists."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return os.path.realpath(path)


def kind_of(path: str) -> str:
    """Return the name of the filesystem of an existing directory, such as `ext4`."""
    there = location_of(path)
    mounts = mounts_of_device(there.device) if there is not None else []
    return mounts[0].fstype if mounts else "another filesystem"
