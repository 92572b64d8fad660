"""Whiteouts by name, as AUFS, OCI image layers and fuse-overlayfs write them.

``.wh.NAME`` hides NAME in the layers below; an object NAME beside it stays visible and hides them too, a
directory as an opaque one (OCI image-spec, layer.md, "Whiteouts"). ``.wh..wh..opq`` makes its directory
opaque. Other names with ``.wh..wh.`` are internal to AUFS. The type of such an entry does not matter, as in
fuse-overlayfs (main.c, do_lookup_file). The merge shows none of these names, and none can be created.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from unionfs.core import layercalls
from unionfs.core.directories import LARGE
from unionfs.core.places import NOT_THERE, Gate, Layer, Place
from unionfs.core.search import PREFIX
from unionfs.sys.fds import Owned

INTERNAL: Final = b".wh..wh."
OPAQUE: Final = b".wh..wh..opq"
_NO_NAMES: Final = (b"", b".", b"..")
#: Lookups in a directory before it is listed: listing takes as many system calls.
_ASKED: Final = 4


def is_reserved(name: bytes) -> bool:
    """Whether a name cannot be an object's: on disk it is a whiteout."""
    return name.startswith(PREFIX)


def hidden_name(name: bytes) -> bytes | None:
    """The name that the entry ``name`` hides in the layers below, or None.

    ``.wh.``, ``.wh..`` and ``.wh...`` hide nothing: no object has the rest as its name.
    """
    if name.startswith(PREFIX) and not name.startswith(INTERNAL):
        hidden = name[len(PREFIX) :]
        return hidden if hidden not in _NO_NAMES else None
    return None


class NamedWhiteouts:
    """Finds them. Most directories have none, which is known after few lookups or one listing."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._opaque_roots: dict[Layer, bool] = {}

    def hides(self, place: Place, dir_fd: int, name: bytes) -> bool:
        """Whether the real directory ``place`` (``dir_fd``: its fd) hides ``name`` in the layers below."""
        asked = place.asked_named
        if asked < 0 or (asked >= _ASKED and not self._may_have(place)):
            return False
        place.ask_named()
        return self._exists(place, PREFIX + name, dir_fd)

    def cut(self, place: Place) -> bool:
        """Whether the directory ``place`` hides those with its name in the layers below."""
        if self._exists(place, OPAQUE, self._gate.fd(place)):
            return True
        above = place.parent
        return above is not None and self.hides(above, self._gate.fd(above), place.name)

    def roots(self, layers: Sequence[Layer]) -> list[Place]:
        """The roots of the layers down to the first opaque one. A layer is asked once: it may not answer."""
        roots = []
        known, self._opaque_roots = self._opaque_roots, {}
        for layer in layers:
            roots.append(layer.root)
            opaque = known.get(layer)
            if opaque is None:
                opaque = self._is_opaque(layer)
            self._opaque_roots[layer] = opaque
            if opaque:
                break
        return roots

    def _is_opaque(self, layer: Layer) -> bool:
        return layer.once("opaque", lambda fd: self._exists(layer.root, OPAQUE, fd))

    def _may_have(self, place: Place) -> bool:
        """List a directory that was asked often, once. One that is large or unreadable may have some."""
        if place.asked_named > _ASKED:
            return True
        try:
            with Owned(self._gate.open_for_listing(place)) as fd:
                if layercalls.call(os.fstat, fd).st_size > LARGE:
                    return True
                names = layercalls.call(os.listdir, fd)
        except OSError:
            return True
        some = any(name.startswith(".wh.") for name in names)
        place.knows_named(some=some)
        return some

    def _exists(self, place: Place, name: bytes, dir_fd: int) -> bool:
        try:
            layercalls.call(os.stat, name, dir_fd=dir_fd, follow_symlinks=False)
        except OSError as error:
            if error.errno in NOT_THERE:
                return False
            try:
                return self._gate.stat_refused(place, name, error) is not None
            except PermissionError:
                return False
        return True
