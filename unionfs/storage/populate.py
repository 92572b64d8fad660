"""First use of an empty volume: copies the union's content at the target into it, as Docker does.

The copy is made in a workspace in the volume and moved out of it at the end. After a crash the next use
discards or finishes it, so a half-filled volume never counts as filled.
"""

from __future__ import annotations

import os
import stat
from contextlib import closing
from typing import Protocol

from unionfs.core.places import Layer, Place
from unionfs.errors import UserError, quoted, reason
from unionfs.storage import locks, workspace
from unionfs.storage.archive.progress import Shown, unseen
from unionfs.storage.copying import Copier, size_of
from unionfs.storage.model import Volume
from unionfs.storage.targets import Names
from unionfs.sys import calls
from unionfs.sys.fds import Owned, open_for_listing
from unionfs.union.listing import real_names
from unionfs.union.markers import Markers
from unionfs.union.merge import Merge

# Entries that mkfs creates in an empty filesystem.
_NOTHING = frozenset({b"lost+found"})


class Layered(Protocol):
    """Layers, topmost first, and how their markers are read: a `LayerStack`, or a mounted tree alone."""

    @property
    def layers(self) -> list[Layer]: ...

    @property
    def markers(self) -> Markers: ...


def populate(
    stack: Layered, names: Names, data: int, volume: Volume, shown: Shown = unseen
) -> bool:
    """Copy the union's directory at `names` into the volume's directory `data` (an fd), if that is empty.

    `shown` shows how far it is. Returns whether it copied. Raises UserError, and then leaves the volume
    empty.
    """
    storage_root = os.path.dirname(os.path.dirname(volume.directory))
    try:
        # Two unions may use a new volume for the first time concurrently.
        with locks.filling(storage_root, volume.name):
            return _is_empty(data, volume) and _fill(stack, names, data, volume, shown)
    except OSError as error:
        path = b"/" + b"/".join(names)
        raise UserError(
            f"volume {quoted(volume.name)} cannot be filled with what the union has at "
            f"{quoted(path)}: {reason(error)}; make room there, or use nocopy."
        ) from error


def _is_empty(data: int, volume: Volume) -> bool:
    with Owned(open_for_listing(data)) as listing:
        held = set(real_names(listing))
    return not held - _NOTHING - workspace.names(volume.directory)


def _fill(stack: Layered, names: Names, data: int, volume: Volume, shown: Shown) -> bool:
    merge = Merge(stack.layers, stack.markers)
    try:
        parts = _find(merge, names)
        if parts is None:
            return False
        with (
            Owned(open_for_listing(data)) as root,
            workspace.workspace(volume.directory, root, "population") as place,
            shown(f"filling volume {quoted(volume.name)}") as progress,
        ):
            progress.measures(lambda: _size(stack, names))
            Copier(merge, place.new, "the volume", progress).tree(parts)
            calls.syncfs(place.new)
            place.commit(keep=True)
        return True
    finally:
        merge.close()


def _size(stack: Layered, names: Names) -> int:
    """The bytes of what is copied. Has a merge of its own, for a thread."""
    with closing(Merge(stack.layers, stack.markers)) as merge:
        return size_of(merge, _find(merge, names) or [])


def _find(merge: Merge, names: Names) -> list[Place] | None:
    """The parts of the directory at a path, or None if it does not exist."""
    parts = merge.roots
    for name in names:
        found = merge.search(parts, name)
        if found is None or not stat.S_ISDIR(found[0].st_mode):
            return None
        parts = found[1]
    return parts
