"""The real directories merged under one name, including redirects.

As in kernel overlayfs (fs/overlayfs/namei.c: ovl_lookup_single, ovl_lookup_layer, ovl_check_redirect; util.c:
ovl_get_redirect_xattr). A redirect is a C string, so it ends at its first NUL. Reading an empty one, a
relative one with a slash, or an absolute one with an empty step is EINVAL. A step `.` or `..` is EACCES when
the search reaches it, which does not happen below a missing directory. A name too long for a filesystem is
missing there. A redirect never leaves its layer.

Redirects in `user.*` xattrs, which overlayfs never follows, are followed only in an ordinary user's own mount
(`daemon.settle`), and there only in that user's directories.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Final

from unionfs.core import layercalls
from unionfs.core.places import Gate, Layer, Place
from unionfs.union.markers import Markers, Marks
from unionfs.union.named import NamedWhiteouts

_NEVER: Final = (b"", b".", b"..")

Searched = Iterator[tuple[Place, bytes]]
"""Real directories still to be searched, topmost first, each with the name to search for in it."""


class PartSearch:
    """Finds the real directories merged under one name, topmost layer first."""

    def __init__(
        self, layers: Sequence[Layer], markers: Markers, named: NamedWhiteouts, gate: Gate
    ) -> None:
        self.layers = layers
        self._markers = markers
        self._named = named
        self._gate = gate
        self._lowest = len(layers) - 1

    def has_layers(self, layers: Sequence[Layer]) -> None:
        """Set the layers, topmost first."""
        self.layers = layers

    def parts(
        self, above: list[Place], part: Place, name: bytes, st: os.stat_result, below: list[Place]
    ) -> list[Place]:
        """The real directories merged under `name`; the topmost is in `part`.

        `above`: the parts of the parent directory; `below`: those further down that may have the name. Raises
        OSError: EINVAL or EACCES for a broken redirect, EPERM for a redirect that is not followed.
        """
        place = Place(part.layer, part, name, key=part.layer.key(st))
        found = [place]
        remaining: Searched = iter([(part, name) for part in below])
        redirected = False
        while place.layer.index != self._lowest:
            opaque, redirect, impure, copied = markers_of(self._markers, self._gate, place)
            place.marked(impure=impure, copied=copied)
            if opaque:
                break
            if redirect is not None:
                if not redirected:  # another name may be in any part
                    redirected = True
                    index = place.layer.index
                    remaining = iter([(part, name) for part in above if part.layer.index > index])
                remaining = self._redirected(redirect, place, remaining)
            next_place = self._next_directory(remaining)
            if next_place is None or self._named.cut(place):
                break
            place = next_place
            found.append(place)
        return found

    def _next_directory(self, remaining: Searched) -> Place | None:
        """The topmost existing directory; removes it and the ones above it from `remaining`."""
        for part, here in remaining:
            st = self._stat(part, here)
            if st is None:
                if part.layer.index != self._lowest and self._named.hides(part, self._gate.fd(part), here):
                    return None
            else:
                if not stat.S_ISDIR(st.st_mode):
                    return None
                place = Place(part.layer, part, here, key=part.layer.key(st))
                place.is_object(st)
                return place
        return None

    def redirected(self, redirect: bytes, index: int, remaining: Searched) -> Searched:
        """Where to continue below layer `index`: a sibling's name, or a path from each layer's root."""
        steps = _steps(redirect)
        if steps is None:
            name = c_string(redirect)
            return ((part, name) for part, _ in remaining)
        return self._from_roots(steps, index)

    def _redirected(self, redirect: bytes, place: Place, remaining: Searched) -> Searched:
        """The same for the redirect of the directory `place`. Raises EPERM unless it is followed."""
        found = self.redirected(redirect, place.layer.index, remaining)
        self._check(place)
        return found

    def _check(self, place: Place) -> None:
        """Raise EPERM unless the redirect of the directory `place` is followed."""
        markers = self._markers
        if not markers.follows_redirects:
            raise OSError(errno.EPERM, "a layer holds a redirect, and these are not followed")
        owner = markers.redirects_of
        if owner is not None and layercalls.call(os.fstat, self._gate.fd(place)).st_uid != owner:
            raise OSError(errno.EPERM, "a layer holds a redirect in another user's directory")

    def _stat(self, place: Place, name: bytes) -> os.stat_result | None:
        try:
            return stat_step(self._gate.fd(place), name)
        except PermissionError as error:
            if name in _NEVER:
                raise
            return self._gate.stat_refused(place, name, error)

    def _from_roots(self, steps: list[bytes], index: int) -> Searched:
        """The path `steps` in the layers below `index`.

        On the way, a whiteout, an opaque directory or a non-directory hides the layers further down, and a
        redirect applies to them.
        """
        for layer in [layer for layer in self.layers if layer.index > index]:
            place = layer.root
            goes_on = True
            below = steps
            for position, step in enumerate(steps[:-1]):
                st = self._stat(place, step)
                if st is None:
                    if self._named.hides(place, self._gate.fd(place), step):
                        return
                    break
                if not stat.S_ISDIR(st.st_mode):
                    return
                place = Place(layer, place, step, key=layer.key(st))
                if layer.index == self._lowest:
                    continue
                opaque, further, *_ = markers_of(self._markers, self._gate, place)
                if opaque or self._named.cut(place):
                    goes_on = False
                elif further is not None:
                    absolute = _steps(further)
                    self._check(place)
                    middle = [*steps[:position], c_string(further)] if absolute is None else absolute
                    below = [*middle, *steps[position + 1 :]]
                    goes_on = goes_on or absolute is not None
            else:
                yield place, steps[-1]
            if not goes_on:
                return
            steps = below


def markers_of(markers: Markers, gate: Gate, place: Place) -> Marks:
    """The markers of a real directory, even if its mode denies reading them."""
    fd = gate.fd(place)
    try:
        return markers.directory(fd)
    except PermissionError as error:
        refused, upper = error, place.layer.is_upper
        return markers.directory(fd, lambda name: gate.rights.getxattr(fd, name, refused, upper=upper))


def stat_step(dir_fd: int, name: bytes) -> os.stat_result | None:
    """The attributes of one step in a redirect's path; None if missing. Raises OSError."""
    if name in _NEVER:
        raise OSError(errno.EACCES, "a layer holds an invalid redirect")
    try:
        return layercalls.call(os.stat, name, dir_fd=dir_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
            return None
        raise


def c_string(value: bytes) -> bytes:
    """The bytes before the first NUL."""
    return value.partition(b"\0")[0]


def _steps(redirect: bytes) -> list[bytes] | None:
    """The steps of an absolute redirect, None for a relative one. Raises OSError, EINVAL, for others."""
    text = c_string(redirect)
    if not redirect or (b"/" in text and not text.startswith(b"/")):
        raise OSError(errno.EINVAL, "a layer holds an invalid redirect")
    if not text.startswith(b"/"):
        return None
    steps = text[1:].split(b"/")
    if b"" in steps:
        raise OSError(errno.EINVAL, "a layer holds an invalid redirect")
    return steps
