"""The index: one copy for all names of a lower file with several hard links.

The format is overlayfs's with ``index=on`` (Documentation/filesystems/overlayfs.rst, "Index directory";
copy_up.c, namei.c): the copy is a file in WORKDIR/index, named by its origin in hexadecimal, and the names
that were changed are hard links of it in the upper. Names that are only in the lower lead to it, too. The
xattr ``nlink`` is its number of names, as the difference to ``st_nlink`` of the copy (``U+1``) or of the
original (``L-1``; inode.c, ovl_set_nlink_upper). A copy without any name left is removed (util.c,
ovl_cleanup_index).

An index belongs to one upper and one topmost lower: the index has the xattr ``upper`` and the upper's root
the xattr ``origin``, and neither may name another directory (super.c, ovl_get_indexdir).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import stat
from collections.abc import Sequence
from typing import Final, Protocol

from unionfs.core.node import Node
from unionfs.core.places import Layer, Place
from unionfs.errors import LayerError
from unionfs.settings.features import Features
from unionfs.sys.fds import Owned, open_for_listing
from unionfs.union.listing import real_names
from unionfs.union.markers import Markers
from unionfs.union.origin import Origins
from unionfs.union.work import Temporary

log = logging.getLogger(__name__)

_NO_HANDLE: Final = (errno.EOPNOTSUPP, errno.EOVERFLOW, errno.ENOENT)
_LINKS: Final = re.compile(rb"([UL])([+-]\d{1,9})")


class Stack(Protocol):
    """What an index needs of the layers."""

    layers: list[Layer]
    upper: Layer | None
    markers: Markers
    features: Features

    def index_directory(self, *, make: bool) -> int:
        """An O_PATH fd of WORKDIR/index; -1 if it is missing, and not made."""


class Unfit(Exception):
    """Why there is no index, as the first part of a sentence."""


class Index:
    """The index directory of one union."""

    def __init__(self, fd: int, layers: Sequence[Layer], markers: Markers, origins: Origins) -> None:
        """``layers``: the upper and the lowers."""
        upper, *self._lowers = layers
        self.place = Place(upper, None, b"", fd)
        self._fd = fd
        self._nlink = markers.nlink
        self._origins = origins

    # -- finding --------------------------------------------------------------------------------------

    def entry_of_lower(self, dir_fd: int, name: bytes, st: os.stat_result) -> bytes | None:
        """The name of the entry for a lower's object, which has the attributes ``st``; None if its filesystem
        has no file handles. Raises OSError."""
        try:
            origin = self._origins.encoded(dir_fd, name, st.st_dev)
        except OSError as error:
            if error.errno not in _NO_HANDLE:
                raise  # else its names would become several files
            return None
        return origin.hex().encode() if origin else None

    def entry_of_copy(self, origin: bytes, st: os.stat_result) -> bytes | None:
        """The name of the entry for a copy with that origin; None if it is not the one in the index."""
        entry = origin.hex().encode()
        found = self.stat(entry)
        return entry if found is not None and os.path.samestat(found, st) else None

    def stat(self, entry: bytes) -> os.stat_result | None:
        """The attributes of an entry, None if there is none. Raises OSError."""
        try:
            return os.stat(entry, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def more_links(self, entry: bytes, st: os.stat_result, lower_links: int) -> int:
        """How many names the union has more than the copy, which has the attributes ``st``.

        ``lower_links``: ``st_nlink`` of the original, 0 if unknown. Without a valid xattr none but the entry
        itself, which is not a name (util.c, ovl_get_nlink, trusts ``st_nlink`` there). What is stored against
        the original was left by a crash; it is stored against the copy now, since names come and go.
        """
        found = _LINKS.fullmatch(self._value(entry))
        if found is None:
            return -1
        base = st.st_nlink if found[1] == b"U" else lower_links or self._links_of_original(entry)
        if not base or base + int(found[2]) <= 0:
            return -1
        more = base + int(found[2]) - st.st_nlink
        if found[1] == b"L":
            with contextlib.suppress(OSError):
                os.setxattr(self._path(entry), self._nlink, b"U%+d" % more, follow_symlinks=False)
        return more

    def _value(self, entry: bytes) -> bytes:
        """The xattr ``nlink`` of an entry, empty if it has none."""
        try:
            return os.getxattr(self._path(entry), self._nlink, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
        return b""

    def _links_of_original(self, entry: bytes) -> int:
        origin = bytes.fromhex(entry.decode())
        found = (self._origins.links_of(origin, layer.dev, layer.root_fd) for layer in self._lowers)
        return next(filter(None, found), 0)

    def _path(self, entry: bytes) -> bytes:
        return b"/proc/self/fd/%d/%b" % (self._fd, entry)

    def lacks_names(self) -> bool:
        """Whether a copy has names that only a lower has. Raises ``OSError``."""
        with Owned(open_for_listing(self._fd)) as fd:
            names = real_names(fd)
        return any(self._lacks_names(name) for name in names)

    def _lacks_names(self, entry: bytes) -> bool:
        st = self.stat(entry)
        return st is not None and not stat.S_ISDIR(st.st_mode) and self.more_links(entry, st, 0) >= 0

    # -- changing -------------------------------------------------------------------------------------

    def put(self, node: Node, temporary: Temporary) -> None:
        """Put the copy of a lower's node into the index; it has no name in the upper yet."""
        assert node.entry is not None
        more = node.lower_links - 1
        os.setxattr(b"/proc/self/fd/%d/%b" % temporary.at, self._nlink, b"U%+d" % more, follow_symlinks=False)
        temporary.put(self._fd, node.entry)
        node.is_indexed_copy(self.place, more)

    def link(self, node: Node, dir_fd: int, name: bytes) -> None:
        """Make a name of the union, which only a lower has, a name of the copy in the upper's directory.

        The count is stored against the original's while that of the copy changes (copy_up.c, ovl_link_up).
        """
        assert node.entry is not None
        path, more = self._path(node.entry), node.more_links
        if node.lower_links:
            st = os.stat(node.entry, dir_fd=self._fd, follow_symlinks=False)
            difference = st.st_nlink + more - node.lower_links
            os.setxattr(path, self._nlink, b"L%+d" % difference, follow_symlinks=False)
        os.link(node.entry, name, src_dir_fd=self._fd, dst_dir_fd=dir_fd, follow_symlinks=False)
        try:
            os.setxattr(path, self._nlink, b"U%+d" % (more - 1), follow_symlinks=False)
        except OSError:
            if not node.lower_links:  # else what is stored is right, too
                os.unlink(name, dir_fd=dir_fd)
                raise
        node.has_more_links(more - 1)

    def lost_name(self, node: Node) -> None:
        """Remove the entry of a copy without a name left in the union; after an error the next mount does."""
        if not node.is_indexed or not node.unlinked:
            return
        assert node.entry is not None
        with contextlib.suppress(OSError):
            st = self.stat(node.entry)
            known = node.lower_links or not self._value(node.entry).startswith(b"L")
            if known and st is not None and st.st_nlink + node.more_links <= 0:
                os.unlink(node.entry, dir_fd=self._fd)
                node.leaves_index()

    def clean(self) -> None:
        """Remove what a crash left: temporaries of the kernel, and copies without a name."""
        with Owned(open_for_listing(self._fd)) as fd:
            names = real_names(fd)
        for name in names:
            with contextlib.suppress(OSError):
                st = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
                if stat.S_ISDIR(st.st_mode):
                    continue
                orphan = st.st_nlink == 1 and self._is_orphan(name)
                if name.startswith(b"#") or orphan:
                    os.unlink(name, dir_fd=self._fd)

    def _is_orphan(self, entry: bytes) -> bool:
        return has_no_name(os.getxattr(self._path(entry), self._nlink, follow_symlinks=False))


def has_no_name(nlink: bytes) -> bool:
    """Whether a copy with that xattr, whose only link is in the index, has no name left in the union. The
    xattr also counts the names that only a lower has."""
    found = _LINKS.fullmatch(nlink)
    return found is not None and found[1] == b"U" and int(found[2]) < 0


def open_index(stack: Stack, origins: Origins) -> Index | None:
    """The index of a union; None without one. Raises LayerError, OSError.

    By default there is one if the upper is new or was always used with it, on filesystems with file handles.
    """
    if stack.upper is None or stack.features.index == "off":
        return None
    try:
        return _open(stack, stack.upper, origins, asked_for=stack.features.index == "on")
    except Unfit as reason:
        if stack.features.index == "on":
            raise LayerError(f"index=on: {reason}; use another upper and work, or index=off.") from None
        log.info("no index of hard links: %s", reason)
        return None


def _open(stack: Stack, upper: Layer, origins: Origins, *, asked_for: bool) -> Index:
    lowers = [layer for layer in stack.layers if not layer.is_upper]
    if not lowers or upper.links_of_removed:
        raise Unfit("it needs a lower, and an upper that is not on NFS")
    for layer in stack.layers:
        if not origins.names_objects_of(layer):
            raise Unfit(
                f"the filesystem of {layer.path} has no file handles with inode numbers, or the same uuid as "
                "another layer's"
            )
    fd = stack.index_directory(make=asked_for or _is_empty(upper))
    if fd < 0:
        raise Unfit(f"upper {upper.path} was used without one")
    markers = stack.markers
    lower, itself = lowers[0], origins.encoded(upper.root_fd, b"", upper.dev, of_upper=True)
    root = b"/proc/self/fd/%d" % upper.root_fd, markers.origin, origins.encoded(lower.root_fd, b"", lower.dev)
    entries = b"/proc/self/fd/%d" % fd, markers.upper, itself
    new_root = _is_new(*root, f"upper {upper.path} was used with another topmost lower")
    new = _is_new(*entries, f"the index in the work directory belongs to another upper than {upper.path}")
    try:
        if new_root:
            os.setxattr(*root)
        if new:
            os.setxattr(*entries)
    except OSError as error:
        raise Unfit(f"the upper's filesystem does not store it ({error.strerror})") from error
    index = Index(fd, [upper, *lowers], markers, origins)
    index.clean()
    return index


def _is_new(where: bytes, name: bytes, value: bytes, otherwise: str) -> bool:
    """Whether the xattr is not set yet; raises Unfit if it has another value."""
    try:
        known = os.getxattr(where, name)
    except OSError:
        return True
    if known not in (b"", value):
        raise Unfit(otherwise)
    return not known


def _is_empty(upper: Layer) -> bool:
    with Owned(open_for_listing(upper.root_fd)) as fd, os.scandir(fd) as entries:
        return next(entries, None) is None


