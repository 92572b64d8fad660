"""Rewrites the markers of an upper at rest: for overlayfs, for fuse-overlayfs, or for an OCI image layer.

The first pass refuses what the form cannot express, or the user may not change, before anything changes. The
second adds each marker in the new form and then removes the old one, so after a crash everything that was
hidden still is, for a union that reads all forms; converting again finishes.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from unionfs.core.places import Place
from unionfs.core.search import PREFIX
from unionfs.errors import LayerError, quoted, reason
from unionfs.sys import calls
from unionfs.sys.fds import Owned
from unionfs.union.checkxattrs import KNOWN
from unionfs.union.markers import FUSE_OVERLAYFS
from unionfs.union.named import INTERNAL, OPAQUE, hidden_name
from unionfs.union.redirects import markers_of
from unionfs.union.resting import TRUSTED, USER, Resting, is_device_whiteout, object_path, xattrs

FORMS: Final = ("overlay", "fuse-overlayfs", "oci")
_ESCAPE: Final = b"overlay."
_NAME_MAX: Final = 255
#: What another form cannot express, by overlayfs's xattr.
_LOST: Final = {
    b"redirect": "it was renamed without its content, which stayed in a lower (redirect)",
    b"metacopy": "its data is in a lower (metacopy)",
    b"protattr": "it is immutable or append-only by a marker (protattr)",
}
_ANOTHER_USER: Final = "change its owner, mode or flags (chattr), or run this as root"
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class Converted:
    """The numbers of markers that were rewritten or removed."""

    whiteouts: int = 0
    opaque: int = 0
    xattrs: int = 0


def convert(layers: Resting, form: str) -> Converted:
    """Rewrite the upper's markers to one of FORMS; for ``overlay`` under the prefix of the layers' markers.

    Raises LayerError for what the form cannot express or the user may not change, and then changes nothing;
    or OSError.
    """
    conversion: _Conversion = _ToOverlay(layers) if form == "overlay" else _ToNames(layers, form)
    for place, path in _directories(layers):
        conversion.survey(place, path)
    for place, _ in _directories(layers):
        before = os.stat(layers.gate.fd(place))
        layers.may_change()
        if conversion.rewrite(place):
            os.utime(
                object_path(layers.gate.fd(place), b""), ns=(before.st_atime_ns, before.st_mtime_ns)
            )
    return conversion.converted


def _directories(layers: Resting) -> Iterator[tuple[Place, bytes]]:
    """All directories of the upper with their paths, each before those below it."""
    todo = [(layers.upper.root, b"")]
    while todo:
        place, path = todo.pop()
        yield place, path
        for name, st in layers.entries(place):
            if stat.S_ISDIR(st.st_mode) and not name.startswith(PREFIX):
                todo.append((Place(place.layer, place, name), path + b"/" + name))


class _Conversion:
    """Examines, then rewrites one directory after the other."""

    form: str

    def __init__(self, layers: Resting) -> None:
        self._layers = layers
        self._gate = layers.gate
        self._markers = layers.markers
        self.converted = Converted()

    def survey(self, place: Place, path: bytes) -> None:
        """Raise LayerError for what the form cannot express in a directory; ``path``: its path."""
        try:
            dir_fd = self._gate.fd(place)
            own = xattrs(object_path(dir_fd, b""))
            if place.parent is None:
                self._judge(b"", os.stat(dir_fd), path, own)
            if self._obsolete(own):
                self._permit(dir_fd, b"", path)
            if self._is_opaque(own):
                self._permit_entries(dir_fd, path)
            for name, st in self._layers.entries(place):
                self._survey(place, name, st, path)
        except PermissionError as error:
            raise self._refuse(path, f"it cannot be read ({reason(error)})", _ANOTHER_USER) from error

    def _survey(self, place: Place, name: bytes, st: os.stat_result, directory: bytes) -> None:
        dir_fd, path = self._gate.fd(place), directory + b"/" + name
        try:
            found = xattrs(object_path(dir_fd, name))
        except PermissionError as error:
            raise self._refuse(path, f"its xattrs cannot be read ({reason(error)})", _ANOTHER_USER) from error
        self._judge(name, st, path, found)
        if self._is_rewritten(name, st, found):
            self._permit_entries(dir_fd, directory)
            hidden = hidden_name(name)
            if hidden is not None and os.path.isdir(object_path(dir_fd, hidden)):
                self._permit(dir_fd, hidden, directory + b"/" + hidden)  # which becomes opaque
        elif self._obsolete(found):
            self._permit(dir_fd, name, path)

    def _permit(self, dir_fd: int, name: bytes, path: bytes) -> None:
        """Raise LayerError unless this user may change the xattrs of an object."""
        if not os.access(object_path(dir_fd, name), os.W_OK, effective_ids=True, follow_symlinks=False):
            raise self._refuse(path, "this user may not change it, or it is immutable", _ANOTHER_USER)
        if calls.statx_flags(dir_fd, name or b".", calls.AT_SYMLINK_NOFOLLOW) & calls.FS_APPEND:
            raise self._refuse(path, "it is append-only", _ANOTHER_USER)

    def _permit_entries(self, dir_fd: int, path: bytes) -> None:
        """The same for the names in a directory, whose times are restored afterwards."""
        self._permit(dir_fd, b"", path)
        st = os.stat(dir_fd)
        if os.geteuid() not in (0, st.st_uid) or not os.access(
            object_path(dir_fd, b""), os.X_OK, effective_ids=True
        ):
            raise self._refuse(path, f"it belongs to uid {st.st_uid}", _ANOTHER_USER)

    def _obsolete(self, found: dict[bytes, bytes]) -> list[bytes]:
        """The xattrs that a rewrite removes, among ``found``."""
        raise NotImplementedError

    def _is_opaque(self, found: dict[bytes, bytes]) -> bool:
        """Whether a directory with these xattrs gets a name that says so."""
        raise NotImplementedError

    def _is_rewritten(self, name: bytes, st: os.stat_result, found: dict[bytes, bytes]) -> bool:
        """Whether the name is removed for a marker in the new form."""
        raise NotImplementedError

    def _judge(
        self, name: bytes, st: os.stat_result, path: bytes, found: dict[bytes, bytes]
    ) -> None:
        raise NotImplementedError

    def rewrite(self, place: Place) -> bool:
        """Rewrite the markers in a directory, and its own xattrs. Returns whether anything was changed."""
        raise NotImplementedError

    def _refuse(self, path: bytes, cause: str, cure: str) -> LayerError:
        where = quoted(self._layers.path(path))
        return LayerError(f"{where} cannot be converted to the form of {self.form}: {cause}; {cure}.")

    def _remove_xattr(self, path: bytes, name: bytes) -> None:
        os.removexattr(path, name, follow_symlinks=False)
        self.converted.xattrs += 1


class _ToOverlay(_Conversion):
    """`.wh.` names become whiteouts and xattrs; xattrs under the other prefix come under the mount's own."""

    form = "overlay"

    def __init__(self, layers: Resting) -> None:
        super().__init__(layers)
        self._prefix = layers.markers.prefix
        self._other = USER if self._prefix == TRUSTED else TRUSTED

    def _judge(
        self, name: bytes, st: os.stat_result, path: bytes, found: dict[bytes, bytes]
    ) -> None:
        if name == OPAQUE and path == b"/" + OPAQUE:
            raise self._refuse(
                path, "the root is opaque, which overlayfs ignores", "remove it, and mount without the lowers"
            )
        if hidden_name(name) is not None and stat.S_ISDIR(st.st_mode):
            raise self._refuse(path, "a whiteout that is a directory", "remove it or rename it")
        for xattr in found:
            if xattr.startswith(self._other + _ESCAPE):
                raise self._refuse(
                    path,
                    f"the user's own xattr {quoted(xattr)} would become a marker",
                    "remove that xattr",
                )

    def _obsolete(self, found: dict[bytes, bytes]) -> list[bytes]:
        return [
            xattr
            for xattr in found
            if (xattr.startswith(FUSE_OVERLAYFS) and not xattr.startswith(FUSE_OVERLAYFS + _ESCAPE))
            or (xattr.startswith(self._other) and xattr[len(self._other) :] in KNOWN)
        ]

    def _is_opaque(self, found: dict[bytes, bytes]) -> bool:
        return False

    def _is_rewritten(self, name: bytes, st: os.stat_result, found: dict[bytes, bytes]) -> bool:
        return name == OPAQUE or hidden_name(name) is not None

    def rewrite(self, place: Place) -> bool:
        before = (self.converted.whiteouts, self.converted.opaque)
        dir_fd = os.dup(self._gate.fd(place))
        with Owned(dir_fd):
            if place.parent is None:
                self._own_xattrs(dir_fd, b"")
            for name, st in self._layers.entries(place):
                self._layers.may_change()
                if name == OPAQUE:
                    self._markers.set_opaque(dir_fd)
                    os.unlink(name, dir_fd=dir_fd)
                    self.converted.opaque += 1
                elif (hidden := hidden_name(name)) is not None:
                    self._whiteout(dir_fd, name, hidden)
                elif not name.startswith(INTERNAL):
                    self._own_xattrs(dir_fd, name, st)
        return before != (self.converted.whiteouts, self.converted.opaque)

    def _whiteout(self, dir_fd: int, name: bytes, hidden: bytes) -> None:
        try:
            self._markers.make_whiteout(dir_fd, hidden, (dir_fd, self._layers.upper.root_fd))
        except FileExistsError:
            # What stands beside its whiteout is visible, and hides the lowers' as a whole.
            with suppress(NotADirectoryError), Owned(os.open(hidden, _DIRECTORY, dir_fd=dir_fd)) as fd:
                self._markers.set_opaque(fd)
        os.unlink(name, dir_fd=dir_fd)
        self.converted.whiteouts += 1

    def _own_xattrs(self, dir_fd: int, name: bytes, st: os.stat_result | None = None) -> None:
        path = object_path(dir_fd, name)
        found = xattrs(path)
        for xattr in self._obsolete(found):
            value, own = found[xattr], None
            if xattr == FUSE_OVERLAYFS + b"opaque":
                own = self._markers.opaque
            elif xattr.startswith(self._other):
                own = self._prefix + xattr[len(self._other) :]
            if own is not None and (own not in found or (own == self._markers.opaque and value == b"y")):
                os.setxattr(path, own, value, follow_symlinks=False)
            self._remove_xattr(path, xattr)


class _ToNames(_Conversion):
    """Whiteouts and opaque directories become `.wh.` names; overlayfs's own xattrs go.

    fuse-overlayfs's opaque directories have an xattr as well, as it makes them without root.
    """

    def __init__(self, layers: Resting, form: str) -> None:
        super().__init__(layers)
        self.form = form

    def _judge(
        self, name: bytes, st: os.stat_result, path: bytes, found: dict[bytes, bytes]
    ) -> None:
        prefix = self._markers.prefix
        for xattr in found:
            if xattr.startswith((prefix + _ESCAPE, FUSE_OVERLAYFS + _ESCAPE)):
                shown = quoted(self._markers.shown_names([xattr])[0])
                raise self._refuse(path, f"the user's own xattr {shown} is stored escaped", "remove it")
            key = xattr[len(prefix) :] if xattr.startswith(prefix) else b""
            if key in _LOST and (key != b"redirect" or stat.S_ISDIR(st.st_mode)):
                raise self._refuse(path, _LOST[key], "copy it within a mount of the union first")
        if len(PREFIX + name) > _NAME_MAX and self._is_rewritten(name, st, found):
            raise self._refuse(path, "a whiteout needs a name with four more bytes", "remove it")

    def _obsolete(self, found: dict[bytes, bytes]) -> list[bytes]:
        drops = (self._markers.prefix, FUSE_OVERLAYFS) if self.form == "oci" else (self._markers.prefix,)
        return [xattr for xattr in found if xattr.startswith(drops)]

    def _is_opaque(self, found: dict[bytes, bytes]) -> bool:
        return b"y" in (found.get(self._markers.opaque), found.get(FUSE_OVERLAYFS + b"opaque"))

    def _is_rewritten(self, name: bytes, st: os.stat_result, found: dict[bytes, bytes]) -> bool:
        is_empty = stat.S_ISREG(st.st_mode) and st.st_size == 0
        return is_device_whiteout(st) or (is_empty and self._markers.whiteout in found)

    def rewrite(self, place: Place) -> bool:
        before = (self.converted.whiteouts, self.converted.opaque)
        dir_fd = os.dup(self._gate.fd(place))
        with Owned(dir_fd):
            if place.parent is not None and markers_of(self._markers, self._gate, place)[0]:
                self._opaque(dir_fd)
            self._drop_xattrs(object_path(dir_fd, b""))
            for name, st in self._layers.entries(place):
                self._layers.may_change()
                if is_device_whiteout(st) or self._markers.is_whiteout(st, dir_fd, name):
                    _make(dir_fd, PREFIX + name)
                    os.unlink(name, dir_fd=dir_fd)
                    self.converted.whiteouts += 1
                elif not stat.S_ISDIR(st.st_mode):
                    self._drop_xattrs(object_path(dir_fd, name))
        return before != (self.converted.whiteouts, self.converted.opaque)

    def _opaque(self, dir_fd: int) -> None:
        made = _make(dir_fd, OPAQUE)
        if self.form == "fuse-overlayfs":
            try:
                os.setxattr(object_path(dir_fd, b""), FUSE_OVERLAYFS + b"opaque", b"y")
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
        self.converted.opaque += made

    def _drop_xattrs(self, path: bytes) -> None:
        for xattr in self._obsolete(xattrs(path)):
            self._remove_xattr(path, xattr)


def _make(dir_fd: int, name: bytes) -> bool:
    """Make an empty file unless the name exists. Returns whether it did not."""
    try:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=dir_fd))
    except FileExistsError:
        return False
    return True
