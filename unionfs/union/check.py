"""Examines an upper at rest for what no mount leaves there, or what a mount does not understand.

A finding is about one object and usually has a repair, which changes nothing that a mount shows, unless the
finding says so. Findings come one by one: the walk continues with what a repair made.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from functools import partial
from typing import Final

from unionfs.core.places import Place
from unionfs.core.search import PREFIX
from unionfs.errors import quoted, reason
from unionfs.sys.fds import Owned
from unionfs.union.checkwork import Finding, work_findings
from unionfs.union.checkxattrs import KNOWN, problem
from unionfs.union.merge import Found
from unionfs.union.named import INTERNAL, hidden_name
from unionfs.union.redirects import markers_of
from unionfs.union.resting import TRUSTED, USER, Resting, is_device_whiteout, object_path, xattrs

_MARKERS: Final = frozenset({b"opaque", b"redirect", b"metacopy", b"whiteout"})
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def check(layers: Resting) -> Iterator[Finding]:
    """Yield the findings in the upper, then in the work directory. Raises OSError for unreadable objects."""
    yield from _Check(layers).run()
    if layers.work is not None:
        yield from work_findings(*layers.work, layers.markers.prefix)


class _Check:
    """Walks the upper and looks at the lowers below it, with a list of pending directories."""

    def __init__(self, layers: Resting) -> None:
        self._layers = layers
        self._merge = layers.merge
        self._gate = layers.gate
        self._markers = layers.markers
        self._other = USER if layers.markers.prefix == TRUSTED else TRUSTED
        #: Directories of the upper: their parts and paths.
        self._todo: list[tuple[list[Place], bytes]] = []

    def run(self) -> Iterator[Finding]:
        root = self._layers.upper.root
        yield from self._xattrs(root, b"", os.stat(root.fd), b"")
        self._todo.append((self._merge.roots, b""))
        while self._todo:
            parts, path = self._todo.pop()
            try:
                entries = self._layers.entries(parts[0])
            except PermissionError as error:
                yield self._unreadable(path, error)
                continue
            for name, st in entries:
                where = path + b"/" + name
                try:
                    yield from self._entry(parts, name, st, where)
                except PermissionError as error:
                    yield self._unreadable(where, error)

    def _unreadable(self, path: bytes, error: OSError) -> Finding:
        where = self._layers.path(path)
        return Finding(where, f"it cannot be examined ({reason(error)})", "run the check as root")

    def _entry(self, parts: list[Place], name: bytes, st: os.stat_result, path: bytes) -> Iterator[Finding]:
        dir_fd = self._gate.fd(parts[0])
        if name.startswith(PREFIX):
            yield from self._named(parts, name, path)
        elif is_device_whiteout(st) or self._markers.is_whiteout(st, dir_fd, name):
            yield from self._whiteout(parts, name, st, path)
        else:
            yield from self._xattrs(parts[0], name, st, path)
            if stat.S_ISDIR(st.st_mode):
                yield from self._directory(parts, name, path)
            elif stat.S_ISREG(st.st_mode):
                yield from self._file(parts, name, path)

    # -- whiteouts ------------------------------------------------------------------------------------

    def _whiteout(
        self, parts: list[Place], name: bytes, st: os.stat_result, path: bytes
    ) -> Iterator[Finding]:
        where, place = self._layers.path(path), parts[0]
        if not self._merge.is_visible_below(parts, name):
            repair = partial(self._unlink, place, name)
            yield Finding(where, "a whiteout of a name that no lower has", "remove it", repair)
        elif not (
            is_device_whiteout(st)
            or self._merge.hides_xattr_whiteouts(parts, place, self._gate.fd(place))
        ):
            yield Finding(
                where,
                "an xattr whiteout in a directory that is not marked (opaque=x), so listings show it",
                "mark the directory, which makes it invisible",
                partial(self._mark, place),
            )

    def _named(self, parts: list[Place], name: bytes, path: bytes) -> Iterator[Finding]:
        """`.wh.NAME`. AUFS's internal names and `.wh..wh..opq` are as they should be."""
        where, hidden = self._layers.path(path), hidden_name(name)
        if hidden is None:
            if not name.startswith(INTERNAL):
                yield Finding(where, "a whiteout without a name", "rename it", None)
            return
        place = parts[0]
        try:
            st = os.stat(hidden, dir_fd=self._gate.fd(place), follow_symlinks=False)
        except FileNotFoundError:
            if not self._merge.is_visible_below(parts, hidden):
                repair = partial(self._unlink, place, name)
                yield Finding(where, "a whiteout of a name that no lower has", "remove it", repair)
            return
        yield Finding(
            where,
            "a whiteout beside what has its name, which fuse-overlayfs would hide",
            "remove it" + (", and make the directory opaque" if stat.S_ISDIR(st.st_mode) else ""),
            partial(self._separate, place, name, hidden, st),
        )

    # -- directories and files ------------------------------------------------------------------------

    def _directory(self, parts: list[Place], name: bytes, path: bytes) -> Iterator[Finding]:
        where, place = self._layers.path(path), Place(parts[0].layer, parts[0], name)
        repair = partial(self._detach, place)
        try:
            found = self._merge.search(parts, name)
        except OSError as error:
            cause = f"its redirect cannot be followed ({reason(error)})"
            yield Finding(where, cause, "make the directory opaque", repair)
            try:
                found = self._merge.search(parts, name)
            except OSError:
                return
        assert found is not None, "only whiteouts are not found in the first part"
        if len(found[1]) == 1:
            opaque, redirect, *_ = markers_of(self._markers, self._gate, place)
            if redirect is not None and not opaque:
                yield Finding(
                    where, f"its redirect leads to {quoted(os.fsdecode(redirect))}, which no lower has",
                    "make the directory opaque", repair,
                )  # fmt: skip
        self._todo.append((found[1], path))

    def _file(self, parts: list[Place], name: bytes, path: bytes) -> Iterator[Finding]:
        found = xattrs(object_path(self._gate.fd(parts[0]), name))
        if self._markers.metacopy not in found:
            return
        source = self._source(parts, name, found.get(self._markers.redirect))
        if source is None or not stat.S_ISREG(source[0].st_mode):
            yield Finding(
                self._layers.path(path),
                "a file without its data (metacopy), which no lower has",
                "give the lower that it was copied up from, or restore the file from a backup",
            )

    def _source(self, parts: list[Place], name: bytes, redirect: bytes | None) -> Found | None:
        """What a metacopy file takes its data from."""
        below = [part for part in parts if not part.layer.is_upper]
        steps = [name]
        if redirect is not None:
            text = redirect.partition(b"\0")[0]
            steps = text.lstrip(b"/").split(b"/")
            if text.startswith(b"/"):
                below = [part for part in self._merge.roots if not part.layer.is_upper]
        found: Found | None = None
        for step in steps:
            try:
                found = self._merge.search(below, step) if below and step not in (b"", b".", b"..") else None
            except OSError:
                return None
            if found is None:
                return None
            below = found[1] if stat.S_ISDIR(found[0].st_mode) else []
        return found

    # -- xattrs ---------------------------------------------------------------------------------------

    def _xattrs(self, place: Place, name: bytes, st: os.stat_result, path: bytes) -> Iterator[Finding]:
        """The overlay's own xattrs of ``name`` in ``place``, or without a name of ``place``."""
        where = self._layers.path(path)
        found = xattrs(object_path(self._gate.fd(place), name))
        for full, value in sorted(found.items()):
            shown = os.fsdecode(full)
            if self._markers.is_private(full) and full.startswith(self._markers.prefix):
                key = full[len(self._markers.prefix) :]
                cause = problem(key, value, st)
                if cause is not None:
                    repair = partial(self._remove_xattr, place, name, full) if key in KNOWN else None
                    yield Finding(where, f"its xattr {quoted(full)} {cause}", "remove the xattr", repair)
            elif full.startswith(self._other) and full[len(self._other) :] in _MARKERS:
                yield Finding(
                    where,
                    f"its xattr {shown} has no meaning for a mount with {os.fsdecode(self._markers.prefix)}*",
                    "convert the upper (`unionfs convert --to overlay`), or mount it as that xattr wants",
                )

    # -- repairs --------------------------------------------------------------------------------------

    def _unlink(self, place: Place, name: bytes) -> None:
        os.unlink(name, dir_fd=self._gate.fd(place))

    def _remove_xattr(self, place: Place, name: bytes, xattr: bytes) -> None:
        os.removexattr(object_path(self._gate.fd(place), name), xattr, follow_symlinks=False)

    def _mark(self, place: Place) -> None:
        self._markers.allow_xattr_whiteouts(self._gate.fd(place))
        self._markers.allow_xattr_whiteouts(self._layers.upper.root_fd)

    def _detach(self, place: Place) -> None:
        """Make a directory opaque in place of its redirect: no lower is merged into it either way."""
        fd = self._gate.fd(place)
        self._markers.set_opaque(fd)
        os.removexattr(object_path(fd, b""), self._markers.redirect)

    def _separate(self, place: Place, whiteout: bytes, name: bytes, st: os.stat_result) -> None:
        dir_fd = self._gate.fd(place)
        if stat.S_ISDIR(st.st_mode):
            with Owned(os.open(name, _DIRECTORY, dir_fd=dir_fd)) as fd:
                self._markers.set_opaque(fd)
        os.unlink(whiteout, dir_fd=dir_fd)
