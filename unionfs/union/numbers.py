"""``st_ino`` of the merged tree.

It derives from an object's origin, so it is the same before and after copy-up and after the kernel forgot the
node: the inode number itself on the first layer's device, else a hash.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final

import xxhash

from unionfs.sys import calls

if TYPE_CHECKING:
    from unionfs.union.places import Layer

#: Set in hashed numbers, so they never equal an inode number of a disk filesystem.
_HASHED: Final = 1 << 62
_ROOT: Final = 1


class Numbers:
    """The numbers of objects of the merged layers."""

    def __init__(self, plain_dev: int) -> None:
        """``plain_dev``: the device whose inode numbers are shown unchanged."""
        self._plain_dev = plain_dev
        self._origin: dict[tuple[int, int], int] = {}

    def of(self, st: os.stat_result, parent: int, name: bytes, *, upper: bool) -> int:
        """The number of the object ``name`` with attributes ``st`` in the directory numbered ``parent``.

        Each name of a lower file with several hard links has its own: copying up one must not change others.
        """
        if upper:
            known = self._origin.get((st.st_dev, st.st_ino))
            if known is not None:
                return known
        elif st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
            return hashed(b"%d/%b" % (parent, name))
        if st.st_dev == self._plain_dev and _ROOT < st.st_ino < _HASHED:
            return st.st_ino
        return hashed(b"%d:%d" % (st.st_dev, st.st_ino))

    def keep(self, st: os.stat_result, number: int) -> None:
        """Keep the original's number for its copy in the upper, which has the attributes ``st``."""
        self._origin[st.st_dev, st.st_ino] = number

    def release(self, held: int, layer: Layer) -> None:
        """Forget the number of the upper's object ``held``, unless it has names: the inode may be reused."""
        if not self._origin:
            return
        try:
            st = os.stat(held)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            # the server no longer has it, such as a removed directory on NFS
            self._origin.pop((layer.dev, calls.known_inode(held)), None)
            return
        if st.st_nlink <= layer.links_of_removed:
            self._origin.pop((st.st_dev, st.st_ino), None)


def of_bound(layer: Layer, st: os.stat_result) -> int:
    """The number of an object of bound storage."""
    return hashed(b"bound%d:%d:%d" % (layer.index, st.st_dev, st.st_ino))


def hashed(key: bytes) -> int:
    """A number derived from a key that identifies an object."""
    return xxhash.xxh3_64_intdigest(key) >> 2 | _HASHED
