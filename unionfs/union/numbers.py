"""``st_ino`` of the merged tree: a number for each pair of filesystem and inode number.

The filesystems of the layers are counted from the lowest layer up, so that a new layer on top changes no
number of those below it. The lowest one's inode numbers are shown unchanged; so all are, if all layers are on
one filesystem. The others have their filesystem's index in the bits above `_SHIFT`, like overlayfs with
``xino=on`` (fs/overlayfs/inode.c, ovl_map_dev_ino; it counts from the top). So numbers of two objects are
never equal, except hashed ones by chance (62 bits): of objects with larger inode numbers, of filesystems
mounted within a layer, and of the names in bound storage.

With ``xino=off`` the inode numbers of files are shown unchanged, whatever their filesystem, and all hashed
numbers have 32 bits. Directories of other filesystems than the lowest layer's are hashed, because two equal
ones on a path look like a loop to find(1) and others.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import xxhash

if TYPE_CHECKING:
    from unionfs.core.places import Layer

_SHIFT: Final = 52
_MOST: Final = 1 << 10
#: Set in hashed numbers, so they never equal a number with the index of a filesystem.
_HASHED: Final = 1 << 62
#: The same with ``xino=off``, for hashed numbers of 32 bits.
_HASHED_SMALL: Final = 1 << 31
_ROOT: Final = 1


class Numbers:
    """The numbers of objects of one union."""

    def __init__(self, devices: Sequence[int], *, xino: bool = True) -> None:
        """``devices`` of the layers, the lowest layer's first. ``xino``: whether numbers of several
        filesystems are kept apart."""
        filesystems = dict.fromkeys(devices)
        self._high = {device: index << _SHIFT for index, device in enumerate(filesystems) if index < _MOST}
        self._plain = devices[0]
        self._limit = _HASHED if len(filesystems) == 1 else 1 << _SHIFT
        #: Whether two objects never have one number, apart from hashes.
        self.unique = xino or len(filesystems) == 1
        self._small = not xino

    @property
    def plain(self) -> tuple[int, int]:
        """The device whose inode numbers are shown unchanged, and the first number that is not."""
        return self._plain, self._limit

    @staticmethod
    def after(number: int) -> int:
        """A number for the node that supersedes the one with that id."""
        return hashed(b"after%d" % number)

    def of(self, device: int, inode: int, *, directory: bool = False) -> int:
        """The number of an object with that ``st_dev`` and ``st_ino``."""
        if device == self._plain and _ROOT < inode < self._limit:
            return inode
        if self._small:
            if not directory and _ROOT < inode < _HASHED:
                return inode
        else:
            high = self._high.get(device)
            if high and inode < 1 << _SHIFT:
                return high | inode
        return self.hashed(b"%d:%d" % (device, inode))

    def of_bound(self, layer: Layer, st: os.stat_result) -> int:
        """The number of an object of bound storage."""
        return self.hashed(b"bound%d:%d:%d" % (layer.index, st.st_dev, st.st_ino))

    def hashed(self, key: bytes) -> int:
        """A number derived from a key that identifies an object."""
        if self._small:
            return xxhash.xxh3_64_intdigest(key) % _HASHED_SMALL | _HASHED_SMALL
        return hashed(key)


def hashed(key: bytes) -> int:
    """A 64-bit number derived from a key."""
    return xxhash.xxh3_64_intdigest(key) >> 2 | _HASHED
