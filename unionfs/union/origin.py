"""The origin of a copy: the xattr ``origin`` identifies the lower object, so that its ``st_ino`` stays.

The format is overlayfs's (`core.origins`): the filesystem's uuid, and the object's file handle. An empty
value is a copy of unknown origin. As in overlayfs, every directory that may contain copies has the xattr
``impure`` = ``y`` (copy_up.c, ovl_set_impure); an origin is only read below these, so other lookups need no
additional system call.

Overlayfs opens the handle to learn the origin's inode number. The handles of common filesystems contain it;
so it is read there, which needs no privilege and no system call. Other origins are unknown here, and so are
those of filesystems that no layer is on. The origin of a directory is not needed: a merged directory has the
number of its topmost real directory that is not a copy.

Overlayfs reads origins in the upper alone, so that a copy gets a new number when its upper becomes a lower.
Here it keeps the number: origins are also read in lowers, and a copy of a copy gets the same origin.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from unionfs.core import layercalls
from unionfs.core.nodes import Stored
from unionfs.core.origins import OriginFormat, handle_at, handle_in, subvolume
from unionfs.core.places import Gate, Layer, Place
from unionfs.settings.features import Features
from unionfs.sys.fds import Owned
from unionfs.sys.handles import filesystem_uuid, open_handle
from unionfs.union.markers import Markers
from unionfs.union.numbers import Numbers

if TYPE_CHECKING:
    from unionfs.core.node import Node

_SQUASHFS: Final = 0x73717368


class _Filesystem(NamedTuple):
    """A filesystem that layers are on."""

    device: int
    magic: int
    uuid: bytes
    subvolume: int
    """Of a btrfs, whose subvolumes have a device each; else 0."""


class Origins(OriginFormat):
    """Reads and writes the origins of one union."""

    def __init__(self, layers: Sequence[Layer], markers: Markers, features: Features, gate: Gate) -> None:
        """Look at the filesystems and the roots of the layers, topmost first."""
        of_device: dict[int, _Filesystem] = {}
        for layer in layers:
            if layer.dev not in of_device:
                found = layer.once("filesystem", _look_at)
                if found is not None:
                    uuid = bytes.fromhex(found[0])
                    of_device[layer.dev] = _Filesystem(layer.dev, layer.magic, uuid, found[1])
        known = _distinct(of_device.values(), features)
        super().__init__(
            [(*one, one in known) for one in of_device.values()],
            Numbers([layer.dev for layer in reversed(layers)], xino=features.xino != "off"),
        )
        self._markers = markers
        self._gate = gate
        self._lowest = len(layers) - 1
        for layer in layers[:-1]:
            impure = (
                markers.directory(layer.root_fd).impure  # which changes
                if layer.is_upper
                else layer.once("impure", lambda fd: markers.directory(fd).impure)
            )
            layer.root.marked(impure=impure, copied=False)

    # -- reading --------------------------------------------------------------------------------------

    def read(self, place: Place, name: bytes) -> bytes | None:
        """The origin of the non-directory ``name`` in ``place``; None without one."""
        if not place.impure or place.layer.index == self._lowest:
            return None
        return self._value(place, name, self._markers.origin)

    def was_indexed(self, place: Place, name: bytes) -> bool:
        """Whether a copy has, or had, an entry in an index, so that other names of its origin are the same
        file with that index, and other files without it."""
        return self._value(place, name, self._markers.nlink) is not None

    def _value(self, place: Place, name: bytes, xattr: bytes) -> bytes | None:
        dir_fd = self._gate.fd(place)
        where = b"/proc/self/fd/%d/%b" % (dir_fd, name)
        try:
            return layercalls.call(os.getxattr, where, xattr, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.EACCES or not place.layer.is_upper:
                return None
            refused = error
        # A `user.` xattr of a file that its owner must not read. To widen its mode would change its ctime.
        try:
            with Owned(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)) as fd:
                return self._gate.rights.getxattr(fd, xattr, refused, upper=False)
        except OSError:
            return None

    def number_of_directory(self, st: os.stat_result, parts: list[Place]) -> int:
        """The number of the directory merged from ``parts``, whose topmost one has the attributes ``st``."""
        last = len(parts) - 1
        if last and (parts[0].copied or parts[0].layer.is_upper):
            for index in range(1, last + 1):
                part = parts[index]
                if index == last or not part.copied:
                    return self.numbers.of(*part.identity, directory=True)
        return self.numbers.of(st.st_dev, st.st_ino, directory=True)

    # -- writing --------------------------------------------------------------------------------------

    def store(
        self, node: Node, source: int, st: os.stat_result, target: int | bytes, *, follow: bool = True
    ) -> Stored:
        """Store the origin of a copy of ``node`` before it is put in place.

        ``source``: an fd of the original (O_PATH suffices), with the attributes ``st``. ``target``: an fd or
        a path of the copy. An origin is a hint, so errors are not reported; but a copy in the index is found
        by it: then raises ``OSError``.
        """
        linked = st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode)
        if linked and node.entry is None:
            return Stored.BROKEN
        if linked:
            origin = self.encoded(source, b"", st.st_dev)
            os.setxattr(target, self._markers.origin, origin, follow_symlinks=follow)
            return Stored.INDEXED
        try:
            origin = self._of_copy(source) if node.from_origin else self.encoded(source, b"", st.st_dev)
            os.setxattr(target, self._markers.origin, origin, follow_symlinks=follow)
        except OSError:
            return Stored.UNKNOWN
        if node.is_dir or self.number_of(origin) == node.ino:
            return Stored.READABLE
        return Stored.UNKNOWN

    def _of_copy(self, source: int) -> bytes:
        return layercalls.call(os.getxattr, b"/proc/self/fd/%d" % source, self._markers.origin)

    def links_of(self, origin: bytes, device: int, root_fd: int) -> int:
        """``st_nlink`` of the object that an origin names, if it is on the filesystem of the layer with that
        root and device and can be opened by its handle, which takes privilege; else 0."""
        kind, handle = handle_in(origin)
        try:
            return layercalls.call(_links_by_handle, root_fd, kind, handle, device)
        except OSError:
            return 0

    def names_objects_of(self, layer: Layer) -> bool:
        """Whether origins name the objects of a layer, with the numbers that they have."""
        try:
            origin = self.encoded(layer.root_fd, b"", layer.dev)
        except OSError:
            return False
        number = self.number_of(origin)
        if number is None:  # of all slow layers
            return False
        st = os.stat(layer.root_fd)
        return number == self.numbers.of(st.st_dev, st.st_ino)

    def moves(self, node: Node, place: Place, dir_fd: int) -> None:
        """Mark a directory of the upper before ``node`` gets a name in it, if it is a copy (dir.c,
        ovl_rename)."""
        if node.from_origin or len(node.parts) > 1:
            self.becomes_impure(place, dir_fd)

    def becomes_impure(self, place: Place, dir_fd: int) -> bool:
        """Mark a directory of the upper before a copy is put into it; returns whether it is marked."""
        if not place.impure:
            with contextlib.suppress(OSError):
                os.setxattr(b"/proc/self/fd/%d" % dir_fd, self._markers.impure, b"y")
                place.marked(impure=True, copied=place.copied)
        return place.impure


def _links_by_handle(root_fd: int, kind: int, handle: bytes, device: int) -> int:
    """``st_nlink`` of the object; 0 if it is on another device. Raises OSError if there is none."""
    with Owned(open_handle(root_fd, kind, handle)) as fd:
        st = os.fstat(fd)
    return st.st_nlink if st.st_dev == device else 0


def _look_at(root_fd: int) -> tuple[str, int] | None:
    """Uuid, in hexadecimal, and subvolume of the filesystem of a layer; None if it has no file handles or its
    uuid cannot be read."""
    try:
        kind, handle = handle_at(root_fd)
    except OSError:
        return None
    uuid = filesystem_uuid(root_fd)
    return None if uuid is None else (uuid.hex(), subvolume(kind, handle))


def _distinct(filesystems: Iterable[_Filesystem], features: Features) -> set[_Filesystem]:
    """The filesystems that an origin can name, by uuid and subvolume.

    Not several with one uuid. Nor a squashfs, which has none and is made anew for each change, unless
    ``xino=on`` or ``index=on`` promise that it was not (super.c, ovl_lower_uuid_ok).
    """
    found: dict[tuple[bytes, int], _Filesystem] = {}
    ambiguous = set()
    for one in filesystems:
        key = one.uuid, one.subvolume
        if key in found:
            ambiguous.add(key)
        elif one.magic != _SQUASHFS or "on" in (features.xino, features.index):
            found[key] = one
    return {one for key, one in found.items() if key not in ambiguous}
