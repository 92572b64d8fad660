"""Plans a commit: the changes of a branch as operations on the tree below.

- *put*: an object, with a directory everything in it, gets a name, and takes the place of what had it;
- *drop*: a name is removed, of a directory with everything in it;
- *set*: a directory that stays gets other attributes.

An object that changes its name is dropped and put, unless `renaming` finds that it can be renamed. Nothing
is read here but the changes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from unionfs.branches.selection import Selection
from unionfs.branches.view import View
from unionfs.errors import UserError, quoted
from unionfs.sys.attributes import FileAttributes
from unionfs.union.attributes import SET_IDS
from unionfs.union.diff import Change, Object
from unionfs.union.xattrs import CAPABILITY

_EXECUTABLE = stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH


@dataclass(frozen=True, slots=True)
class Put:
    """`path` begins with a slash."""

    path: bytes
    above: Object
    new: Object
    old: Object | None
    is_whole: bool = True
    """Whether all of it was selected; else it is a new directory."""


@dataclass(frozen=True, slots=True)
class Drop:
    """`path` begins with a slash."""

    path: bytes
    old: Object


@dataclass(frozen=True, slots=True)
class Rename:
    """A directory of the base; both paths begin with a slash."""

    path: bytes
    source: bytes
    new: Object
    old: Object


@dataclass(frozen=True, slots=True)
class Set:
    """`path` begins with a slash, or is empty for the root."""

    path: bytes
    new: FileAttributes
    old: FileAttributes
    former: bytes | None = None
    """Its path before the commit, if it differs."""


@dataclass(slots=True)
class Plan:
    """The operations, in an order in which they can be done."""

    steps: list[Put | Drop | Rename] = field(default_factory=list)
    sets: list[Set] = field(default_factory=list)
    skipped: list[bytes] = field(default_factory=list)
    """Paths of conflicts that stay as they are."""

    @property
    def is_empty(self) -> bool:
        return not self.steps and not self.sets


class Planner:
    """Makes the plan of one commit."""

    def __init__(self, view: View, selection: Selection, stay: Collection[bytes]) -> None:
        """`stay`: paths that keep the version below the branch."""
        self._view = view
        self._selection = selection
        self._stay = sorted(stay)
        self._plan = Plan()

    def plan(self) -> Plan:
        """Raises UserError for a selection that cannot be made, and OSError."""
        root = self._view.root
        waiting = [(b"", root)]
        while waiting:
            path, change = waiting.pop()
            before = len(self._plan.steps)
            for child in sorted(change.children, key=lambda child: child.name):
                below = path + b"/" + child.name
                if self._view.stays(child):
                    waiting.append((below, child))
                else:
                    self._replace(below, change, child)
            # A rename in a directory changes its times, which a change of a file does not.
            self._set(path, change, changes=len(self._plan.steps) > before)
        return self._plan

    def _set(self, path: bytes, change: Change, *, changes: bool) -> None:
        assert change.new is not None
        assert change.old is not None
        if not self._selection.has(path or b"/"):
            return
        if path in self._stay:
            self._plan.skipped.append(path)
            return
        new, old = self._view.both_of(change)
        if self._view.is_anothers(change.old):
            return  # its times are the kernel's affair; others cannot be changed
        if changes or new._replace(atime_ns=0) != old._replace(atime_ns=0):
            self._plan.sets.append(Set(path, new, old))

    def _replace(self, path: bytes, above: Change, change: Change) -> None:
        new, old, chosen = change.new, change.old, self._selection
        assert above.new is not None
        if any(other == path or other.startswith(path + b"/") for other in self._stay):
            self._plan.skipped.append(path)
        elif chosen.is_all or self._is_whole(path, new, old):
            if new is not None:
                self._plan.steps.append(Put(path, above.new, new, old))
            elif old is not None:
                self._plan.steps.append(Drop(path, old))
        elif new is not None and old is not None:
            if self._is_partly(path, new, old):
                raise UserError(
                    f"{quoted(path)} was replaced as a whole, so a part of it cannot be chosen; "
                    "choose all of it, or none."
                )
        elif new is not None:
            if self._is_partly(path, new):
                self._plan.steps.append(Put(path, above.new, new, None, is_whole=False))
        elif old is not None:
            self._drop_chosen(path, old)

    def _drop_chosen(self, path: bytes, old: Object) -> None:
        """Drop the selected entries of a removed directory, which stays with the others."""
        waiting = [(path, old)]
        while waiting:
            above, found = waiting.pop()
            if self._is_whole(above, found):
                self._plan.steps.append(Drop(above, found))
            elif found.is_directory:
                children = [(name, self._view.child(found, name)) for name in self._view.names(found)]
                waiting += [(above + b"/" + name, child) for name, child in children if child is not None]

    def _is_partly(self, path: bytes, *objects: Object) -> bool:
        has = self._selection.has
        return has(path) or any(has(below) for below, _ in all_below(self._view, path, *objects))

    def _is_whole(self, path: bytes, *objects: Object | None) -> bool:
        found = [item for item in objects if item is not None]
        chosen = self._selection
        return chosen.has(path) and all(chosen.has(below) for below, _ in all_below(self._view, path, *found))


def all_below(view: View, path: bytes, *objects: Object) -> Iterator[tuple[bytes, Object]]:
    """Everything below a path, and a non-directory itself."""
    waiting = [(path, found) for found in objects]
    while waiting:
        above, found = waiting.pop()
        if not found.is_directory:
            yield above, found
            continue
        for name in view.names(found):
            child = view.child(found, name)
            if child is not None:
                if child.is_directory:
                    yield above + b"/" + name, child
                waiting.append((above + b"/" + name, child))


class Chosen:
    """Which new directories are selected, or have something selected below them.

    Asked from the top down, it walks the tree below one that is not selected itself only once.
    """

    def __init__(self, view: View, has: Callable[[bytes], bool]) -> None:
        self._view = view
        self._has = has
        self._top: bytes | None = None
        self._above: set[bytes] = set()

    def reaches(self, path: bytes, found: Object) -> bool:
        """Whether a directory is selected, or something below it. Raises OSError."""
        if self._has(path):
            return True
        if self._top is None or not (path + b"/").startswith(self._top + b"/"):
            self._top, self._above = path, set()
            for below, _ in all_below(self._view, path, found):
                if self._has(below):
                    self._add_above(below, path)
        return path in self._above

    def _add_above(self, below: bytes, top: bytes) -> None:
        while below != top and (below := below.rpartition(b"/")[0]) not in self._above:
            self._above.add(below)


def hazards(view: View, plan: Plan, above: bytes) -> list[str]:
    """Sentences about hazards that a list of names does not show; `above`: what belongs before the paths.

    Raises OSError.
    """
    found = []
    for step in plan.steps:
        old = step.old
        if old is not None and old.st is not None and view.is_anothers(old):
            owner = f"uid {old.st.st_uid}" if view.has_shown_owner(old.st) else "another user"
            found.append(f"{_shown(above + step.path)} belongs to {owner}, not to you.")
        if isinstance(step, Put):
            for path, item in all_below(view, step.path, step.new):
                if (what := _danger(view, path, item)) is not None:
                    found.append(f"{_shown(above + path)} is {what}.")
    return found


def with_subordinate_owners(view: View, plan: Plan) -> list[bytes]:
    """The paths of a plan whose new owner or group is a subordinate id of this user. Raises OSError."""
    found = [
        item.path or b"/." for item in plan.sets
        if view.is_mapped and (item.new.uid, item.new.gid) != (item.old.uid, item.old.gid)
    ]  # fmt: skip
    for step in plan.steps:
        if isinstance(step, Put):
            items = all_below(view, step.path, step.new)
            found += [
                path for path, item in [(step.path, step.new), *items]
                if item.st is not None and view.has_subordinate_owner(item.st)
            ]  # fmt: skip
    return sorted(set(found))


def _danger(view: View, path: bytes, item: Object) -> str | None:
    """The kind of a hazardous object; None for others."""
    if item.st is None or item.is_directory:
        return None
    mode = item.st.st_mode
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        return f"the device {os.major(item.st.st_rdev)}:{os.minor(item.st.st_rdev)}"
    if stat.S_ISREG(mode) and mode & SET_IDS:
        return f"a set-id program (mode {stat.S_IMODE(mode):04o})"
    if stat.S_ISREG(mode) and mode & _EXECUTABLE:
        with view.entry(path.rpartition(b"/")[2], item) as entry:
            if CAPABILITY in view.xattrs(entry.where):
                return "a program with capabilities"
    return None


def _shown(path: bytes) -> str:
    return quoted(path[1:])
