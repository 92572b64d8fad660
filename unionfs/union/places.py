"""Real directories in layers, and the one gate from a directory to an fd.

A :class:`Place` says where a real directory lives: its layer, its parent place, its name. Nothing else in
the project builds paths: whoever needs a directory asks :meth:`Gate.fd`, which walks down from the nearest
ancestor whose fd is known, one ``openat`` a component, never through a symlink. So trees deeper than
PATH_MAX work, and a rename of a directory moves everything below it by changing one object.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from unionfs.union.layers import Layer

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Place:
    """A directory of one layer. ``fd`` is -1 unless the gate has it open."""

    __slots__ = ("default_acl", "empty", "fd", "key", "layer", "mtime_ns", "name", "parent")

    def __init__(
        self, layer: Layer, parent: Place | None, name: bytes, fd: int = -1, *, key: int = 0
    ) -> None:
        self.layer = layer
        #: `Layer.key` of the directory that it stands for; 0: not known.
        self.key = key
        self.parent = parent
        self.name = name
        self.fd = fd
        #: Of the upper: its default ACL, b"" without one; None until somebody asks, and when it has changed.
        self.default_acl: bytes | None = None
        #: Of the upper: a directory that was copied up, and into which nothing was put since.
        self.empty = False
        #: Of the upper: its time of modification after a copy-up; good while `Node.ctime` is `UNSEEN`.
        self.mtime_ns = 0


class Gate:
    """Directory fds (O_PATH), opened on demand; the least recently used are closed.

    An fd from :meth:`fd` is good until ``capacity`` other directories were asked for: use it at once, and
    duplicate it to hand it to another thread.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self.capacity = max(capacity, 64)
        self._recent: OrderedDict[Place, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._recent)

    def fd(self, place: Place) -> int:
        """The directory's fd. Raises ``OSError`` (ENOENT, EACCES ...) when it cannot be opened, ESTALE
        when another directory has its name by now."""
        fd = place.fd
        if fd >= 0:
            if place.parent is not None:
                self._recent.move_to_end(place)
            return fd
        chain: list[Place] = []
        above: Place | None = place
        while above is not None and above.fd < 0:
            chain.append(above)
            above = above.parent
        assert above is not None, "the root of a layer is always open"
        fd = above.fd
        for step in reversed(chain):
            fd = os.open(step.name, _DIRECTORY, dir_fd=fd)
            if step.key and step.layer.key(os.fstat(fd)) != step.key:
                os.close(fd)
                raise OSError(errno.ESTALE, "a layer holds another directory there")
            step.fd = fd
            self._recent[step] = None
            if len(self._recent) > self.capacity:
                oldest, _ = self._recent.popitem(last=False)
                os.close(oldest.fd)
                oldest.fd = -1
        return fd

    def open_for_listing(self, place: Place) -> int:
        """A new fd of the directory that can be read. Raises ``OSError``."""
        return open_for_listing(self.fd(place))

    def forget(self, place: Place) -> None:
        """Close the fd of a directory that is no longer there."""
        if place.fd >= 0 and self._recent.pop(place, place) is None:
            os.close(place.fd)
            place.fd = -1

    def close(self) -> None:
        """Close every fd."""
        for place in self._recent:
            os.close(place.fd)
            place.fd = -1
        self._recent.clear()


def open_for_listing(fd: int) -> int:
    """A new fd of the same directory that can be read (getdents, fsync)."""
    return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
