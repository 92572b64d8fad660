"""What is done only for speed, each with a switch. A union without them must show the same; tests run both.

A shortcut is a fact that the union remembers instead of asking a layer again, or work that it leaves out or
does ahead.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from unionfs.union.xattrs import CAPABILITY

if TYPE_CHECKING:
    from unionfs.union.node import Node

_CAPABILITY: Final = os.fsdecode(CAPABILITY)


@dataclass(frozen=True, slots=True)
class Shortcuts:
    """Which shortcuts a union takes."""

    capabilities: bool = True
    """It remembers which files have no file capabilities; see `Capabilities`."""
    unread_files: bool = True
    """A lower's file is not opened while the kernel has its data in the page cache; see `UnreadFile`."""
    empty_places: bool = True
    """A copied-up directory into which nothing was put is not searched; see `Place.empty`."""
    ahead: bool = True
    """Listings are prepared for whoever walks a tree; see `fuse.direct.ahead`."""


NO_SHORTCUTS: Final = Shortcuts(capabilities=False, unread_files=False, empty_places=False, ahead=False)


class Capabilities:
    """Which nodes are known to have no ``security.capability``, for which the kernel asks before each write
    and chown. Of bound storage, which others change too, nothing is known."""

    def __init__(self, shortcuts: Shortcuts) -> None:
        self._remembers = shortcuts.capabilities

    def seen(self, node: Node, names: Iterable[str]) -> None:
        """These are all xattrs of the node's object."""
        node.note_capability(none=self._remembers and _CAPABILITY not in names)

    def none(self, node: Node) -> None:
        """The node's object has none."""
        node.note_capability(none=self._remembers and node.territory.lasting)

    def changed(self, node: Node) -> None:
        """The node's object may have some now."""
        node.note_capability(none=False)
