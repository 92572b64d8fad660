"""The real directories merged under one name, including redirects.

As in kernel overlayfs (fs/overlayfs/namei.c: ovl_lookup_single, ovl_lookup_layer, ovl_check_redirect; util.c:
ovl_get_redirect_xattr). A redirect is a C string, so it ends at its first NUL. Reading an empty one, a
relative one with a slash, or an absolute one with an empty step is EINVAL. A step `.` or `..` is EACCES when
the search reaches it, which does not happen below a missing directory. A name too long for a filesystem is
missing there. A redirect never leaves its layer.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence

from unionfs.union.markers import Markers
from unionfs.union.places import Gate, Layer, Place

Searched = Iterator[tuple[Place, bytes]]
"""Real directories still to be searched, topmost first, each with the name to search for in it."""


class PartSearch:
    """Finds the real directories merged under one name, topmost layer first."""

    def __init__(self, layers: Sequence[Layer], markers: Markers, gate: Gate) -> None:
        self._layers = layers
        self._markers = markers
        self._gate = gate
        self._lowest = len(layers) - 1

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
            opaque, redirect, impure, copied = self._markers.directory(self._gate.fd(place))
            place.marked(impure=impure, copied=copied)
            if opaque:
                break
            if redirect is not None:
                if not redirected:  # another name may be in any part
                    redirected = True
                    index = place.layer.index
                    remaining = iter([(part, name) for part in above if part.layer.index > index])
                remaining = self._redirected(redirect, place.layer.index, remaining)
            next_place = self._next_directory(remaining)
            if next_place is None:
                break
            place = next_place
            found.append(place)
        return found

    def _next_directory(self, remaining: Searched) -> Place | None:
        """The topmost existing directory; removes it and the ones above it from `remaining`."""
        for part, here in remaining:
            st = stat_step(self._gate.fd(part), here)
            if st is not None:
                if not stat.S_ISDIR(st.st_mode):
                    return None
                place = Place(part.layer, part, here, key=part.layer.key(st))
                place.is_object(st)
                return place
        return None

    def _redirected(self, redirect: bytes, index: int, remaining: Searched) -> Searched:
        """Where to continue below layer `index`: a sibling's name, or a path from each layer's root."""
        steps = _steps(redirect)
        if not self._markers.follows_redirects:
            raise OSError(errno.EPERM, "a layer holds a redirect that any user could have made")
        if steps is None:
            name = _c_string(redirect)
            return ((part, name) for part, _ in remaining)
        return self._from_roots(steps, index)

    def _from_roots(self, steps: list[bytes], index: int) -> Searched:
        """The path `steps` in the layers below `index`.

        On the way, a whiteout, an opaque directory or a non-directory hides the layers further down, and a
        redirect applies to them.
        """
        for layer in self._layers[index + 1 :]:
            place = layer.root
            goes_on = True
            below = steps
            for position, step in enumerate(steps[:-1]):
                st = stat_step(self._gate.fd(place), step)
                if st is None:
                    break
                if not stat.S_ISDIR(st.st_mode):
                    return
                place = Place(layer, place, step, key=layer.key(st))
                if layer.index == self._lowest:
                    continue
                opaque, further, *_ = self._markers.directory(self._gate.fd(place))
                if opaque:
                    goes_on = False
                elif further is not None:
                    absolute = _steps(further)
                    middle = [*steps[:position], _c_string(further)] if absolute is None else absolute
                    below = [*middle, *steps[position + 1 :]]
                    goes_on = goes_on or absolute is not None
            else:
                yield place, steps[-1]
            if not goes_on:
                return
            steps = below


def stat_step(dir_fd: int, name: bytes) -> os.stat_result | None:
    """The attributes of one step in a redirect's path; None if missing. Raises OSError."""
    if name in (b"", b".", b".."):
        raise OSError(errno.EACCES, "a layer holds an invalid redirect")
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
            return None
        raise


def _c_string(value: bytes) -> bytes:
    return value.partition(b"\0")[0]


def _steps(redirect: bytes) -> list[bytes] | None:
    """The steps of an absolute redirect, None for a relative one. Raises OSError, EINVAL, for others."""
    text = _c_string(redirect)
    if not redirect or (b"/" in text and not text.startswith(b"/")):
        raise OSError(errno.EINVAL, "a layer holds an invalid redirect")
    if not text.startswith(b"/"):
        return None
    steps = text[1:].split(b"/")
    if b"" in steps:
        raise OSError(errno.EINVAL, "a layer holds an invalid redirect")
    return steps
