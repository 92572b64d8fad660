"""Watches the lowers' parts of known directories, to show changes that others make to them.

inotify(7) does all of it: it needs no privilege, works on every local filesystem and in user namespaces, and
a watch pins its directory, so that one with a changed mode or owner can be told from another one that got its
number. fanotify(7) would save the watch of each directory only by marking whole filesystems: that needs
CAP_SYS_ADMIN and file handles, and wakes the daemon for each write anywhere on the disk. Ordinary users may
mark only single directories there, too.

Rules:
- The kernel asks only for names in directories that it has looked up. So a directory is watched from when it
  becomes a node until the node is forgotten, and what the kernel has cached cannot change unseen.
- The mask leaves out opening and reading, so the daemon's own accesses cause no events.
- A file with several hard links is watched itself, too: others may change it by a name in a directory that is
  not watched.
- Watched are inodes. One may belong to several nodes: the names of a hard link, a lower inside another one.
- Not reported, by any mechanism: stores through a mapping, and changes made by other hosts to a shared
  filesystem (which `daemon.preflight` refuses).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from unionfs.core.node import Node
from unionfs.core.places import Gate, Layer, Place
from unionfs.sys import inotify
from unionfs.sys.inotify import Inotify

log = logging.getLogger(__name__)

_OBJECT: Final = inotify.MODIFY | inotify.ATTRIB
_MASK: Final = (
    _OBJECT | inotify.CREATE | inotify.DELETE | inotify.MOVED_FROM | inotify.MOVED_TO
    | inotify.DELETE_SELF | inotify.MOVE_SELF | inotify.ONLYDIR | inotify.EXCL_UNLINK
)  # fmt: skip
_MOST_NAMES: Final = 100_000
"""With more changed names to look at, looking at all nodes is cheaper."""
_FILE: Final = _OBJECT | inotify.DONT_FOLLOW
ITSELF: Final = b"."
"""Stands for a directory itself."""


class Told(Enum):
    """What is known of a name."""

    NOTHING = 0
    """Anything may have changed."""
    OBJECT = 1
    """Its object has changed, and is still the same."""
    NAME = 2
    """Another object may have it now, or none."""


@dataclass(slots=True)
class Changed:
    """What has changed in the lowers."""

    everything: bool = False
    """The kernel's queue has overflowed: anything."""
    names: dict[Node, dict[bytes, Told]] = field(default_factory=dict)
    """The names in directories."""
    count: int = 0
    """Of names."""

    def __bool__(self) -> bool:
        return self.everything or bool(self.names)

    def add(self, node: Node, name: bytes, told: Told) -> None:
        """Add a name in a directory."""
        names = self.names.setdefault(node, {})
        known = names.get(name)
        if known is None:
            self.count += 1
            if self.count > _MOST_NAMES:
                self.all()
                return
        if known is not Told.NAME:
            names[name] = told

    def all(self) -> None:
        """Anything may have changed."""
        self.everything = True
        self.names.clear()


class Watches:
    """The watches of one union, and the changes that they reported."""

    def __init__(self, source: Inotify, layers: Iterable[Layer], gate: Gate) -> None:
        """``layers``: those to watch."""
        self._source = source
        self._layers = frozenset(layers)
        self._gate = gate
        #: The nodes of a watch, and the watches of a node.
        self._nodes: dict[int, set[Node]] = {}
        self._numbers: dict[Node, dict[Place, int]] = {}
        self._changed = Changed()
        #: The root's first watches must succeed.
        self._begun = False
        #: The number of times that a watch was not possible.
        self._refused = 0
        self._told: set[int] = set()

    @property
    def fd(self) -> int:
        """Readable when there are events."""
        return self._source.fd

    def figures(self) -> dict[str, int]:
        """JSON-able."""
        return {"watches": len(self._nodes), "watches_refused": self._refused}

    # -- coming and going -----------------------------------------------------------------------------

    def known(self, node: Node) -> None:
        """A directory is known, or has other parts than before: watch them. Or a file with several links.

        Raises ``OSError`` if the first directory, the root, cannot be watched.
        """
        before = self._numbers.get(node, {})
        now = {}
        for part in node.parts if node.place is None else [node.place]:
            if part.layer in self._layers:
                number = before.get(part) or self._watch(part, b"" if node.is_dir else node.name)
                if number:
                    now[part] = number
        self._begun = True
        for number in now.values():
            self._nodes.setdefault(number, set()).add(node)
        if now:
            self._numbers[node] = now
        else:
            self._numbers.pop(node, None)
        self._end(node, set(before.values()) - set(now.values()))

    def gone(self, node: Node) -> None:
        """A node is forgotten."""
        numbers = self._numbers.pop(node, None)
        if numbers is not None:
            self._end(node, set(numbers.values()))
        self._changed.names.pop(node, None)

    def is_same(self, node: Node, part: Place, place: Place) -> bool:
        """Whether ``place`` is the directory that is watched as ``part`` of a node."""
        number = self._numbers.get(node, {}).get(part)
        if number is None:
            return False
        try:
            found = self._source.watch(self._path(place), _MASK)
        except OSError:
            return False
        if found not in self._nodes:
            self._source.unwatch(found)
        return found == number

    def _path(self, part: Place, name: bytes = b"") -> bytes:
        path = b"/proc/self/fd/%d" % self._gate.fd(part)
        return path + b"/" + name if name else path

    def _watch(self, part: Place, name: bytes) -> int:
        """Watch a directory, or the file ``name`` in it; returns the number, 0 if that is not possible."""
        try:
            return self._source.watch(self._path(part, name), _FILE if name else _MASK)
        except OSError as error:
            if not self._begun:
                raise
            self._refused += 1
            self._tell(name or part.name, part, error)
            return 0

    def _tell(self, name: bytes, part: Place, error: OSError) -> None:
        """Log the first error of each kind."""
        code = error.errno or 0
        if code in self._told:
            return
        self._told.add(code)
        cure = "`unionfs refresh` shows changes of it"
        if code == errno.ENOSPC:
            cure = f"raise fs.inotify.max_user_watches and mount anew; until then {cure}"
        log.warning(
            "%r in lower %s cannot be watched: %s; %s (more of this kind are only counted)",
            os.fsdecode(name), part.layer.path, error.strerror, cure,
        )  # fmt: skip

    def _end(self, node: Node, numbers: set[int]) -> None:
        for number in numbers:
            nodes = self._nodes.get(number)
            if nodes is None:
                continue  # the kernel ended it
            nodes.discard(node)
            if not nodes:
                del self._nodes[number]
                self._source.unwatch(number)

    # -- events ---------------------------------------------------------------------------------------

    def read(self) -> bool:
        """Take some events from the kernel's queue; returns False if there were none."""
        events = self._source.read()
        for number, mask, name in events:
            if mask & inotify.Q_OVERFLOW:
                self._changed.all()
            elif mask & inotify.IGNORED:
                self._ended(number)
            elif not self._changed.everything:
                told = Told.NAME if mask & ~_OBJECT & _MASK else Told.OBJECT
                for node in self._nodes.get(number, ()):
                    self._add(node, name, told)
        return bool(events)

    def take(self) -> Changed:
        """Take the changes since the last call."""
        changed, self._changed = self._changed, Changed()
        return changed

    def _add(self, node: Node, name: bytes, told: Told) -> None:
        if name:
            self._changed.add(node, name, told)
        elif node.parent is None:
            self._changed.add(node, ITSELF, told)
        elif not node.unlinked:
            self._changed.add(node.parent, node.name, told)

    def _ended(self, number: int) -> None:
        """The kernel ended a watch: its directory was removed, or its filesystem unmounted."""
        for node in self._nodes.pop(number, ()):
            numbers = self._numbers.get(node, {})
            for part in [part for part, known in numbers.items() if known == number]:
                del numbers[part]

    def close(self) -> None:
        """End all watches."""
        self._source.close()
