"""Optimizations, each with a switch. A union without them must behave the same; tests run both.

A shortcut is a fact that the union remembers instead of querying a layer again, or work that it skips.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from unionfs.union.xattrs import CAPABILITY

if TYPE_CHECKING:
    from unionfs.core.node import Node

_CAPABILITY: Final = os.fsdecode(CAPABILITY)


@dataclass(frozen=True, slots=True)
class Shortcuts:
    """The shortcuts that a union takes."""

    capabilities: bool = True
    """Remember which files have no file capabilities; see `Capabilities`."""
    unread_files: bool = True
    """Do not open a lower's file while the kernel has its data in the page cache; see `UnreadFile`."""
    empty_places: bool = True
    """Do not search a copied-up directory into which nothing was put; see `Place.empty`."""

    fast_layers: bool = True
    """Call into lowers on ordinary filesystems at once, not as if they might not answer; see `memo`."""


NO_SHORTCUTS: Final = Shortcuts(capabilities=False, unread_files=False, empty_places=False, fast_layers=False)


class Capabilities:
    """Nodes known to have no ``security.capability``, which the kernel requests before each write and chown.
    Excludes bound storage, which other processes change too."""

    def __init__(self, shortcuts: Shortcuts) -> None:
        self._remembers = shortcuts.capabilities

    def seen(self, node: Node, names: Iterable[str]) -> None:
        """Record the names of all xattrs of the node's object."""
        node.note_capability(none=self._remembers and _CAPABILITY not in names)

    def none(self, node: Node) -> None:
        """Record that the node's object has none."""
        node.note_capability(none=self._remembers and node.territory.lasting)

    def changed(self, node: Node) -> None:
        """Record that the node's object may have some."""
        node.note_capability(none=False)
