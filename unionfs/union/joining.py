"""Joins two layers that lie on each other to one, of which an overlay shows the same tree.

The layers may be in use: they are not changed. A file with one name is copied, since another name would show
in its link count; blocks are shared where the filesystem can. One with several names gets more, since an
index finds it by its inode. A file whose data lies further down (metacopy) gets that.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

from unionfs.core.places import Layer, Place
from unionfs.sys import attributes
from unionfs.sys.fds import Owned, close_quietly
from unionfs.union.filedata import clone, copy_data
from unionfs.union.images import is_image, open_image
from unionfs.union.markers import Markers
from unionfs.union.merge import Merge, path_of

_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_TWO: Final = 2


def join(layers: Sequence[str], target: int, markers: Markers) -> None:
    """Put the content of the two topmost ``layers`` into the empty directory ``target`` (O_PATH, on their
    filesystem).

    ``layers``: those two, and all below them. Raises ``OSError``.
    """
    with ExitStack() as resources:
        opened = []
        for index, path in enumerate(layers):
            fd = (
                open_image(path)
                if is_image(path)
                else os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            )
            resources.callback(close_quietly, fd)
            opened.append(Layer(index, path, fd, is_upper=False))
        merge = Merge(opened, markers, directory_fds=256)
        resources.callback(merge.close)
        _Joining(merge, markers).directory(merge.roots, target)


class _Joining:
    def __init__(self, merge: Merge, markers: Markers) -> None:
        self._merge = merge
        self._gate = merge.gate
        self._markers = markers
        self._never: set[int] = set()

    def directory(self, parts: list[Place], target: int) -> None:
        """Fill a directory (O_PATH); its own attributes come last, with the times."""
        above, below = _halves(parts)
        names = sorted({os.fsencode(name) for part in above for name in self._listed(part)})
        for name in names:
            part = next(one for one in above if self._stat(one, name) is not None)
            st = self._stat(part, name)
            assert st is not None
            if stat.S_ISDIR(st.st_mode):
                self._subdirectory(parts, name, target)
            elif below or not self._is_whiteout(part, name, st):
                self._file(parts, part, name, st, target)
        self._attributes(above[0], target)
        if below and any(self._markers.opaque_value(self._gate.fd(part)) == b"x" for part in above):
            # It has whiteouts that are files with an xattr, which overlayfs looks for only then.
            os.setxattr(b"/proc/self/fd/%d" % target, self._markers.opaque, b"x")

    def _subdirectory(self, parts: list[Place], name: bytes, target: int) -> None:
        found = self._merge.search(parts, name)
        if found is None:
            raise OSError(errno.EIO, "a directory cannot be found", os.fsdecode(name))
        places = found[1]
        os.mkdir(name, 0o700, dir_fd=target)
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        with Owned(os.open(name, flags, dir_fd=target)) as fd:
            self.directory(places, fd)
            self._mark(parts, places, name, b"/proc/self/fd/%d" % fd)
            st = os.stat(self._gate.fd(places[0]))
            os.utime(b"/proc/self/fd/%d" % fd, ns=(st.st_atime_ns, st.st_mtime_ns))
        self._merge.forget(places)

    def _mark(self, parts: list[Place], places: list[Place], name: bytes, path: bytes) -> None:
        """Make a directory merge with the same ones below as before."""
        around, below = _halves(parts)[1], _halves(places)[1]
        if not below:
            if around:
                os.setxattr(path, self._markers.opaque, b"y")
        elif any(one.parent not in around or one.name != name for one in below):
            os.setxattr(path, self._markers.redirect, b"/" + path_of(below[0]))

    def _file(self, parts: list[Place], part: Place, name: bytes, st: os.stat_result, target: int) -> None:
        at = self._gate.fd(part)
        where = b"/proc/self/fd/%d/%b" % (at, name)
        is_regular = stat.S_ISREG(st.st_mode)
        lacks_data = is_regular and self._markers.metacopy_value(where) is not None
        if (st.st_nlink > 1 or (not is_regular and not stat.S_ISLNK(st.st_mode))) and not lacks_data:
            os.link(name, name, src_dir_fd=at, dst_dir_fd=target, follow_symlinks=False)
            return
        if not is_regular:
            os.symlink(os.readlink(name, dir_fd=at), name, dir_fd=target)
        else:
            self._data(parts, part, name, st, target)
        private = (self._markers.metacopy, self._markers.redirect) if lacks_data else ()
        xattrs = attributes.read_xattrs(
            where, lambda key: key not in private, attributes.unsupported, follow=False
        )
        attributes.write(target, name, attributes.attributes(st, xattrs), attributes.unsupported)

    def _data(self, parts: list[Place], part: Place, name: bytes, st: os.stat_result, target: int) -> None:
        where = b"/proc/self/fd/%d/%b" % (self._gate.fd(part), name)
        data = self._merge.lower_data(parts, part, name, where)
        source = (
            os.open(name, _READ, dir_fd=self._gate.fd(part)) if data is None else self._merge.open_data(data)
        )
        with Owned(source) as fd, Owned(os.open(name, _NEW, 0o600, dir_fd=target)) as new:
            if not clone(fd, new, os.fstat(fd).st_dev, self._never):
                copy_data(fd, new, st.st_size)

    def _attributes(self, place: Place, target: int) -> None:
        """Those of a directory, with the marks that do not depend on what lies below."""
        source, path = self._gate.fd(place), b"/proc/self/fd/%d" % target
        depending = self._markers.opaque, self._markers.redirect
        xattrs = attributes.read_xattrs(
            b"/proc/self/fd/%d" % source, lambda key: key not in depending, attributes.unsupported
        )
        with Owned(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
            attributes.write(fd, None, attributes.attributes(os.stat(source), xattrs), attributes.unsupported)

    def _listed(self, place: Place) -> list[str]:
        with Owned(self._gate.open_for_listing(place)) as fd:
            return os.listdir(fd)

    def _stat(self, place: Place, name: bytes) -> os.stat_result | None:
        try:
            return os.stat(name, dir_fd=self._gate.fd(place), follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _is_whiteout(self, place: Place, name: bytes, st: os.stat_result) -> bool:
        return self._markers.is_whiteout(st, self._gate.fd(place), name)


def _halves(parts: Sequence[Place]) -> tuple[list[Place], list[Place]]:
    """The parts in the two layers, and those below."""
    above = [part for part in parts if part.layer.index < _TWO]
    return above, [part for part in parts if part.layer.index >= _TWO]
