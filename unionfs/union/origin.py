"""The origin of a copy: the xattr ``origin`` identifies the lower object, so that its ``st_ino`` stays.

The format is overlayfs's (fs/overlayfs/overlayfs.h, struct ovl_fb): version, magic, length, flags, handle
type, the filesystem's uuid, and the object's file handle. An empty value is a copy of unknown origin. As in
overlayfs, every directory that may contain copies has the xattr ``impure`` = ``y`` (copy_up.c,
ovl_set_impure); an origin is only read below these, so other lookups need no additional system call.

Overlayfs opens the handle to learn the origin's inode number. The handles of common filesystems contain it;
so it is read there, which needs no privilege and no system call. Other origins are unknown here, and so are
those of filesystems that no layer is on. The origin of a directory is not needed: a merged directory has the
number of its topmost real directory that is not a copy.

Overlayfs reads origins in the upper alone, so that a copy gets a new number when its upper becomes a lower.
Here it keeps the number: origins are also read in lowers, and a copy of a copy gets the same origin.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from unionfs.core.nodes import Stored
from unionfs.core.places import Gate, Layer, Place
from unionfs.settings.features import Features
from unionfs.sys import calls
from unionfs.sys.handles import filesystem_uuid, handle_at
from unionfs.union.markers import Markers
from unionfs.union.numbers import Numbers

if TYPE_CHECKING:
    from unionfs.core.node import Node

# struct ovl_fb: version, magic, len, flags, type, uuid; then the handle
_HEAD: Final = struct.Struct("=BBBBB16s")
_VERSION: Final = 0
_MAGIC: Final = 0xFB
_BIG_ENDIAN: Final = 1
_ANY_ENDIAN: Final = 2
_KNOWN_FLAGS: Final = 7
_PATH_UPPER: Final = 4
_THIS_ENDIAN: Final = 0 if struct.pack("=H", 1) == b"\1\0" else _BIG_ENDIAN

# include/linux/exportfs.h: FILEID_INO32_GEN, FILEID_BTRFS_WITHOUT_PARENT; fs/xfs/xfs_export.h: the
# former with XFS_FILEID_TYPE_64FLAG, struct xfs_fid64
_INO32: Final = 0x01
_BTRFS: Final = 0x4D
_XFS64: Final = 0x81
_EXT: Final = 0xEF53
_XFS: Final = 0x58465342
_BTRFS_MAGIC: Final = 0x9123683E
_F2FS: Final = 0xF2F52010
_SQUASHFS: Final = 0x73717368


class _Filesystem(NamedTuple):
    """A filesystem that layers are on."""

    device: int
    magic: int
    uuid: bytes
    subvolume: int
    """Of a btrfs, whose subvolumes have a device each; else 0."""


class Origins:
    """Reads and writes the origins of one union."""

    def __init__(self, layers: Sequence[Layer], markers: Markers, features: Features, gate: Gate) -> None:
        """Look at the filesystems and the roots of the layers, topmost first."""
        self.numbers = Numbers([layer.dev for layer in reversed(layers)], xino=features.xino != "off")
        self._markers = markers
        self._gate = gate
        self._lowest = len(layers) - 1
        self._of_device: dict[int, _Filesystem] = {}
        for layer in layers:
            if layer.dev not in self._of_device:
                filesystem = _look_at(layer)
                if filesystem is not None:
                    self._of_device[layer.dev] = filesystem
        self._known = self._distinct(features)
        for layer in layers[:-1]:
            marks = markers.directory(layer.root_fd)
            layer.root.marked(impure=marks.impure, copied=False)

    def _distinct(self, features: Features) -> dict[tuple[bytes, int], _Filesystem]:
        """The filesystems that an origin can name, by uuid and subvolume.

        Not several with one uuid. Nor a squashfs, which has none and is made anew for each change, unless
        ``xino=on`` or ``index=on`` promise that it was not (super.c, ovl_lower_uuid_ok).
        """
        found: dict[tuple[bytes, int], _Filesystem] = {}
        ambiguous = set()
        for one in self._of_device.values():
            key = one.uuid, one.subvolume
            if key in found:
                ambiguous.add(key)
            elif one.magic != _SQUASHFS or "on" in (features.xino, features.index):
                found[key] = one
        for key in ambiguous:
            del found[key]
        return found

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
        where = b"/proc/self/fd/%d/%b" % (self._gate.fd(place), name)
        try:
            return os.getxattr(where, xattr, follow_symlinks=False)
        except OSError:
            return None

    def number_of(self, origin: bytes) -> int | None:
        """The number of the object that an origin names; None if it is unknown or broken."""
        if len(origin) < _HEAD.size:
            return None
        version, magic, length, flags, kind, uuid = _HEAD.unpack_from(origin)
        if magic != _MAGIC or version > _VERSION or not _HEAD.size <= length <= len(origin):
            return None
        if flags & ~_KNOWN_FLAGS or (not flags & _ANY_ENDIAN and flags & _BIG_ENDIAN != _THIS_ENDIAN):
            return None
        handle = origin[_HEAD.size : length]
        filesystem = self._known.get((uuid, _subvolume(kind, handle)))
        if filesystem is None:
            return None
        inode = _inode(filesystem.magic, kind, handle)
        return None if inode is None else self.numbers.of(filesystem.device, inode)

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
        a path of the copy. An origin is a hint; so errors are not reported.
        """
        linked = st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode)
        if linked and node.entry is None:
            return Stored.BROKEN
        try:
            if linked:
                origin = self.encoded(source, b"", st.st_dev)
                os.setxattr(target, self._markers.origin, origin, follow_symlinks=follow)
                return Stored.INDEXED
            origin = self._of_copy(source) if node.from_origin else self.encoded(source, b"", st.st_dev)
            os.setxattr(target, self._markers.origin, origin, follow_symlinks=follow)
        except OSError:
            return Stored.BROKEN if linked else Stored.UNKNOWN
        if node.is_dir or self.number_of(origin) == node.ino:
            return Stored.READABLE
        return Stored.UNKNOWN

    def _of_copy(self, source: int) -> bytes:
        return os.getxattr(b"/proc/self/fd/%d" % source, self._markers.origin)

    def names_objects_of(self, layer: Layer) -> bool:
        """Whether origins name the objects of a layer, with the numbers that they have."""
        try:
            origin = self.encoded(layer.root_fd, b"", layer.dev)
        except OSError:
            return False
        st = os.stat(layer.root_fd)
        return self.number_of(origin) == self.numbers.of(st.st_dev, st.st_ino)

    def encoded(self, dir_fd: int, name: bytes, device: int, *, of_upper: bool = False) -> bytes:
        """The origin that names an object; b"" if its filesystem has no handles or its uuid is unknown.

        Without ``name``, that of ``dir_fd`` itself.
        """
        filesystem = self._of_device.get(device)
        if filesystem is None:
            return b""
        kind, handle = handle_at(dir_fd, name)
        length = _HEAD.size + len(handle)
        if not 0 <= kind <= 0xFF or length > 0xFF:
            return b""
        flags = _THIS_ENDIAN | (_PATH_UPPER if of_upper else 0)
        return _HEAD.pack(_VERSION, _MAGIC, length, flags, kind, filesystem.uuid) + handle

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


def _look_at(layer: Layer) -> _Filesystem | None:
    """The filesystem of a layer; None if it has no file handles or its uuid cannot be read."""
    try:
        kind, handle = handle_at(layer.root_fd)
    except OSError:
        return None
    uuid = filesystem_uuid(layer.root_fd)
    if uuid is None:
        return None
    magic = calls.filesystem_magic(layer.root_fd)
    return _Filesystem(layer.dev, magic, uuid, _subvolume(kind, handle))


def _subvolume(kind: int, handle: bytes) -> int:
    """fs/btrfs/export.h, struct btrfs_fid: objectid, root_objectid, gen."""
    return struct.unpack_from("=Q", handle, 8)[0] if kind == _BTRFS and len(handle) >= 16 else 0


def _inode(magic: int, kind: int, handle: bytes) -> int | None:
    """The inode number in a file handle, None if the format is not known."""
    size = len(handle)
    if kind == _INO32 and magic == calls.TMPFS_MAGIC and size == 12:  # mm/shmem.c, shmem_encode_fh
        low, high = struct.unpack_from("=II", handle, 4)
        return int(low | high << 32)
    if kind == _INO32 and magic in (_EXT, _XFS, _F2FS, _SQUASHFS) and size == 8:  # struct fid, i32
        return int(struct.unpack_from("=I", handle)[0])
    if (kind, magic, size) == (_XFS64, _XFS, 12) or (kind, magic, size) == (_BTRFS, _BTRFS_MAGIC, 20):
        return int(struct.unpack_from("=Q", handle)[0])
    return None
