"""The merge of layers: resolves names to objects, and lists names.

Merge rules (Documentation/filesystems/overlayfs.rst): from the top layer down, the first object of a name
wins; a directory merges with directories of the same name below it until a non-directory, a whiteout or an
opaque directory ends the search; a redirect sets the name for the layers below.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from unionfs.core import layercalls
from unionfs.core.directories import Listing
from unionfs.core.lowernames import LowerNames
from unionfs.core.places import Gate, Layer, Place
from unionfs.core.search import PREFIX, Search
from unionfs.sys.fds import Owned, close_quietly, fd_limit
from unionfs.union.listing import NFS_REMOVED
from unionfs.union.lowerdata import LowerData
from unionfs.union.markers import Markers
from unionfs.union.metacopy import DataSearch, open_data
from unionfs.union.named import NamedWhiteouts, hidden_name
from unionfs.union.redirects import PartSearch, markers_of
from unionfs.union.rights import Rights

_PATH: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

Found = tuple[os.stat_result, list[Place]]
"""An object's attributes and its real directories: for a directory those merged into it, topmost first; else
the one that contains it."""


class Merge(Search):
    """Finds and lists names in layers, topmost first.

    Not thread-safe, but it does not change layers: each thread may have its own for the same layers.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        markers: Markers,
        *,
        directory_fds: int = 1024,
        rights: Rights | None = None,
    ) -> None:
        gate = Gate(directory_fds, rights or Rights(), fd_limit())
        named = NamedWhiteouts(gate)
        #: The parts of the root. Overlayfs ignores `opaque` on them (super.c, ovl_get_root).
        self.roots = named.roots(layers)
        self._lowest = len(layers) - 1
        self._lower_names = LowerNames(gate)
        directories = PartSearch(layers[: len(self.roots)], markers, named, gate)
        self._directories = directories
        self._data = DataSearch(markers, named, gate, directories)
        super().__init__(
            gate, markers, named, self._lower_names, directories, lowest=len(self.roots) - 1
        )

    def has_layers(self, layers: Sequence[Layer]) -> None:
        """Set the layers, topmost first. The lowest one stays, and their indices are in order."""
        self.roots[:] = self.named.roots(layers)
        self._directories.has_layers(layers[: len(self.roots)])
        self.forget_names()

    @contextmanager
    def other_layers(self, layers: Sequence[Layer]) -> Iterator[None]:
        """Follow redirects in other layers within the context."""
        own = self._directories.layers
        self._directories.has_layers(layers)
        try:
            yield
        finally:
            self._directories.has_layers(own)

    def listing_of_all(self, parts: Sequence[Place]) -> list[bytes]:
        """The names in real directories, and those of which they have whiteouts. Raises ``OSError``."""
        found: dict[bytes, None] = {}
        for part in parts:
            with Owned(self.gate.open_for_listing(part)) as fd:
                for name in map(os.fsencode, layercalls.call(os.listdir, fd)):
                    shown = hidden_name(name) if name.startswith(PREFIX) else name
                    if shown is not None:
                        found[shown] = None
        return list(found)

    def lower_data(
        self, parts: Sequence[Place], place: Place, name: bytes, where: bytes | int
    ) -> LowerData | None:
        """Where the data of the regular file ``name`` lies if it is metacopy; None: in the file.

        ``parts``: those of its directory; ``place``: the one that contains it; ``where``: a path or fd of it.
        Raises ``OSError``: EIO without data, EPERM if metacopy is not followed.
        """
        return self._data.find(parts, place.layer.index, name, where)

    def open_data(self, data: LowerData) -> int:
        """A new fd of the data of a metacopy file, for reading. Raises ``OSError``, EIO if another file has
        replaced it."""
        return open_data(self.gate, data)

    def forget_names(self, parts: Sequence[Place] | None = None) -> None:
        """Forget which lowers have which names in the directory merged from ``parts``; None: in all."""
        if parts is None:
            self._lower_names.clear()
        else:
            self._lower_names.forget(parts)

    def listing(self, parts: Iterable[Place]) -> Listing:
        """The names of the directory merged from ``parts``. Raises ``OSError``."""
        return _MergedListing(self, parts)

    def lists_bare_whiteout(self, parts: Sequence[Place], name: bytes) -> bool:
        """Whether listings show a name whose only object is an xattr whiteout in a directory without `x`.

        A lookup finds nothing, as on overlayfs; see :meth:`hides_xattr_whiteouts`.
        """
        for part in parts:
            fd = self.gate.fd(part)
            try:
                st = layercalls.call(os.stat, name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                if self.named.hides(part, fd, name):
                    return False
                continue
            except OSError:
                return False
            return stat.S_ISREG(st.st_mode) and not self.hides_xattr_whiteouts(parts, part, fd)
        return False

    def is_opaque(self, place: Place) -> bool:
        """Whether a real directory hides those with its name in the layers below, apart from the root."""
        return markers_of(self.markers, self.gate, place)[0] or self.named.cut(place)

    def hides_xattr_whiteouts(self, parts: Sequence[Place], part: Place, fd: int) -> bool:
        """Whether listings omit xattr whiteouts in one part of a directory; ``fd`` is an fd of it.

        Only where ``opaque`` is ``x``, only in merged directories, and not in the lowest layer, as overlayfs
        (namei.c, ovl_lookup_single; readdir.c, ovl_dir_read_merged). Elsewhere they are listed, though a
        lookup finds nothing. Our own uppers have them where device nodes are refused; there overlayfs would
        list them.
        """
        if part.layer.is_upper or (len(parts) > 1 and part.layer.index < self._lowest):
            return self.markers.opaque_value(fd) == b"x"
        return False

    def open_object(self, found: Found, name: bytes) -> int:
        """A new O_PATH fd of the non-directory found as ``name``. Raises ``OSError``, ESTALE if another
        object has replaced it.
        """
        st, (place,) = found
        fd = layercalls.call(os.open, name, _PATH, dir_fd=self.gate.fd(place))
        if place.layer.key(layercalls.call(os.fstat, fd)) != place.layer.key(st):
            close_quietly(fd)
            raise OSError(errno.ESTALE, "a layer holds another object there")
        return fd

    def forget(self, places: Iterable[Place]) -> None:
        """Close the fds of real directories no longer needed."""
        for place in places:
            self.gate.forget(place)

    def close(self) -> None:
        """Close all directory fds except those of the layers."""
        self.gate.close()


class _MergedListing(Listing):
    """The names of a merged directory, without whiteouts and the names they hide."""

    def __init__(self, merge: Merge, parts: Iterable[Place]) -> None:
        super().__init__(merge.gate, parts, merged=True)
        self._merge = merge

    def names(self) -> list[bytes]:
        hidden: set[bytes] = set()
        shown: dict[bytes, None] = {}
        try:
            for index, fd in enumerate(self.fds):
                whiteouts: set[bytes] = set()
                for name in self._in_use(index, self._entries(index, fd, whiteouts)):
                    if name not in hidden:
                        shown[name] = None
                hidden |= whiteouts
            return list(shown)
        finally:
            self.close()

    def _in_use(self, index: int, names: list[bytes]) -> list[bytes]:
        if index == 0 and self.hides_removed:
            return [name for name in names if not NFS_REMOVED.fullmatch(os.fsdecode(name))]
        return names

    def _entries(self, index: int, fd: int, whiteouts: set[bytes]) -> list[bytes]:
        """The names in one real directory without its whiteouts, which go into ``whiteouts``."""
        shown = []
        hides = self._merge.hides_xattr_whiteouts(self.parts, self.parts[index], fd)
        for name, kind in layercalls.call(_entries_of, fd):
            if name.startswith(PREFIX):
                below = hidden_name(name)
                if below is not None:
                    whiteouts.add(below)
                continue
            try:
                hidden = self._is_whiteout(index, fd, name, kind, files=hides)
            except FileNotFoundError:
                continue
            except OSError:  # a name that cannot be examined exists all the same
                hidden = False
            if hidden:
                whiteouts.add(name)
            else:
                shown.append(name)
        return shown

    def _is_whiteout(self, index: int, fd: int, name: bytes, kind: int, *, files: bool) -> bool:
        """Whether an entry of one real directory is a whiteout, as regular files may be if ``files``."""
        if kind in (stat.S_IFDIR, stat.S_IFLNK) or (not files and kind == stat.S_IFREG):
            return False
        try:
            st = layercalls.call(os.stat, name, dir_fd=fd, follow_symlinks=False)
        except PermissionError as error:
            again = self._merge.gate.stat_refused(self.parts[index], name, error)
            if again is None:
                return False
            st = again
        return self._merge.markers.is_whiteout(st, fd, name)


def _entries_of(fd: int) -> list[tuple[bytes, int]]:
    """The names in a real directory, each with its file type; 0: it has been removed, or is another one."""
    found = []
    with os.scandir(fd) as entries:
        for entry in entries:
            kind = 0
            with suppress(OSError):
                if entry.is_symlink():
                    kind = stat.S_IFLNK
                elif entry.is_dir(follow_symlinks=False):
                    kind = stat.S_IFDIR
                elif entry.is_file(follow_symlinks=False):
                    kind = stat.S_IFREG
            found.append((os.fsencode(entry.name), kind))
    return found


def path_of(place: Place) -> bytes:
    """The path of a real directory in its layer."""
    names = []
    above: Place | None = place
    while above is not None and above.name:
        names.append(above.name)
        above = above.parent
    return b"/".join(reversed(names))
