"""``st_ino`` of the merged tree.

It comes from an object's origin, so that it is the same before and after copy-up and after the kernel forgot
the node: the inode number itself on the first layer's device, else a hash.
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

#: Hashed numbers have this bit, so they meet no inode number that a disk filesystem gives out.
_HASHED: Final = 1 << 62
_ROOT: Final = 1


class Numbers:
    """The numbers of objects of the merged layers."""

    def __init__(self, plain_dev: int) -> None:
        """``plain_dev``: the device whose inode numbers are shown as they are."""
        self._plain_dev = plain_dev
        self._origin: dict[tuple[int, int], int] = {}

    def of(self, st: os.stat_result, parent: int, name: bytes, *, upper: bool) -> int:
        """The number of an object with the attributes ``st``: ``name`` in the directory numbered ``parent``.

        Each name of a lower file with several hard links has its own: copying up one must not change another.
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
        """The upper's object with the attributes ``st`` carries the number of what it is a copy of."""
        self._origin[st.st_dev, st.st_ino] = number

    def release(self, held: int, layer: Layer) -> None:
        """Forget the number of the upper's object ``held``, unless it has names: it may be another's soon."""
        if not self._origin:
            return
        try:
            st = os.stat(held)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            # the server has it no more, as a directory on NFS that was removed
            self._origin.pop((layer.dev, calls.known_inode(held)), None)
            return
        if st.st_nlink <= layer.links_of_removed:
            self._origin.pop((st.st_dev, st.st_ino), None)


def of_bound(layer: Layer, st: os.stat_result) -> int:
    """The number of an object of bound storage."""
    return hashed(b"bound%d:%d:%d" % (layer.index, st.st_dev, st.st_ino))


def hashed(key: bytes) -> int:
    """A number made of something that names an object."""
    return xxhash.xxh3_64_intdigest(key) >> 2 | _HASHED
