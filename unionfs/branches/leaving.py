"""What a commit of a part takes out of the branch's layer, so that the branch changes only the rest.

The layer's entries of what is committed go to the directory of the commit, where `undo` finds them: see
`journal`. A directory of the layer that has no other change goes with them; one of the branch's own, of which
the base now has a part, is merged with that. Names of one file stay together (`links`), and a directory that
the branch has renamed, whose content is the base's, with its former name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from unionfs.branches import links
from unionfs.branches.plan import Chosen, Drop, Plan, Put, all_below
from unionfs.branches.selection import Selection
from unionfs.branches.view import View
from unionfs.core.places import Place
from unionfs.errors import UserError, quoted
from unionfs.sys.fds import names_in
from unionfs.union.diff import Change, Object, in_order
from unionfs.union.merge import path_of

UPPER, INDEX = b"/upper", b"/work/index"


@dataclass(slots=True)
class _Level:
    """A directory of the layer; the next name is the last."""

    path: bytes
    found: Object
    change: Change | None
    children: dict[bytes, Change]
    names: list[bytes]
    is_new: bool
    """Whether the branch has added it, and the base gets a part of it."""
    gone: list[bytes] = field(default_factory=list)
    stays: bool = False
    """Whether something in it remains a change of the branch."""


class Leaving:
    """What leaves the layer. Paths are those below the branch's directory, with a leading slash."""

    def __init__(self, view: View, plan: Plan, selection: Selection, above: bytes) -> None:
        """`above`: what belongs before paths for messages. Raises UserError for a part that cannot be
        committed without the rest, and OSError.
        """
        self._view = view
        self._has = selection.has
        self._chosen = Chosen(view, selection.has)
        self._above = above
        self._puts = {step.path: step for step in plan.steps if isinstance(step, Put)}
        self._drops = {step.path for step in plan.steps if isinstance(step, Drop)}
        self._sets = {change.path for change in plan.sets}
        #: The entries.
        self.paths: list[bytes] = []
        #: Directories that stay, and whether they are opaque no longer.
        self.directories: dict[bytes, bool] = {}
        self._find()
        self._refuse_separated_links()
        self._refuse_moved_content(plan)

    def _find(self) -> None:
        root = self._view.root
        assert root.new is not None
        levels = [self._level(b"", root.new, root)]
        while levels:
            level = levels[-1]
            if level.names:
                deeper = self._look(level, level.names.pop())
                if deeper is not None:
                    levels.append(deeper)
            else:
                levels.pop()
                self._end(level, levels[-1] if levels else None)

    def _level(self, path: bytes, found: Object, change: Change | None, *, is_new: bool = False) -> _Level:
        names = sorted(map(os.fsencode, names_in(self._view.merge.gate.fd(found.parts[0]))))
        children = {} if change is None else {child.name: child for child in change.children}
        return _Level(path, found, change, children, names, is_new)

    def _look(self, level: _Level, name: bytes) -> _Level | None:
        """Note what becomes of one entry; returns a directory that must be looked through."""
        path = level.path + b"/" + name
        if level.is_new:
            return self._look_in_new(level, name, path)
        put, change = self._puts.get(path), level.children.get(name)
        if path in self._drops or (put is not None and put.is_whole):
            level.gone.append(name)
        elif put is not None:
            return self._partly(path, put.new)
        elif change is None or self._view.stays(change):
            found = self._view.child(level.found, name) if change is None else change.new
            if found is not None and found.is_directory and self._is_merged_place(found.parts[0]):
                return self._level(path, found, change)
            level.stays |= found is not None
        else:
            level.stays = True
        return None

    def _look_in_new(self, level: _Level, name: bytes, path: bytes) -> _Level | None:
        found = self._view.child(level.found, name)
        if found is None:
            level.gone.append(name)  # a whiteout of nothing
        elif found.is_directory and self._chosen.reaches(path, found):
            if self._has(path) and all(self._has(below) for below, _ in all_below(self._view, path, found)):
                level.gone.append(name)
            else:
                return self._partly(path, found)
        elif not found.is_directory and self._has(path):
            level.gone.append(name)
        else:
            level.stays = True
        return None

    def _partly(self, path: bytes, found: Object) -> _Level:
        if len(found.parts) > 1 or not found.parts[0].layer.is_upper:
            raise UserError(
                f"{self._shown(path)} was renamed in the branch, so a part of it cannot be chosen; choose "
                "all of it, or none."
            )
        return self._level(path, found, None, is_new=True)

    def _is_merged_place(self, place: Place) -> bool:
        return place.layer.is_upper and not self._view.merge.is_opaque(place)

    def _end(self, level: _Level, above: _Level | None) -> None:
        """Decide on a directory all of whose entries were looked at."""
        is_own = level.is_new or level.path in self._sets
        if not is_own and level.change is not None and above is not None:
            level.stays |= self._view.differs(level.change)
        name = level.path.rpartition(b"/")[2]
        if above is not None and not level.stays and (level.gone or is_own):
            above.gone.append(name)
            return
        if above is not None and (level.stays or level.gone or is_own):
            above.stays = True
        self.paths += [UPPER + level.path + b"/" + one for one in level.gone]
        if level.gone or level.is_new:
            is_opaque = level.is_new and self._view.merge.is_opaque(level.found.parts[0])
            self.directories[UPPER + level.path] = is_opaque

    # -- what belongs together ----------------------------------------------------------------------------

    def is_taken(self, path: bytes) -> bool:
        """Whether a path that the branch changes is committed."""
        above = path
        while above:
            if above in self._drops:
                return True
            if (put := self._puts.get(above)) is not None:
                return put.is_whole or self._has(path)
            above = above.rpartition(b"/")[0]
        return False

    def _refuse_separated_links(self) -> None:
        for group in links.groups(self._view):
            taken = [path for path in group.paths if self.is_taken(path)]
            if not taken:
                continue
            if len(taken) < len(group.paths):
                other = next(path for path in group.paths if path not in taken)
                raise UserError(
                    f"{self._shown(taken[0])} and {self._shown(other)} are names of one file (hard links), "
                    f"and only {self._shown(taken[0])} was chosen; choose all of its names, or none: "
                    f"{', '.join(map(self._shown, group.paths))}."
                )
            if group.entry is not None:
                self.paths.append(INDEX + b"/" + group.entry)

    def _refuse_moved_content(self, plan: Plan) -> None:
        """Refuse to change a directory of the base whose content the rest of the branch shows elsewhere."""
        for path, change in in_order(self._view.root):
            new = change.new
            if new is None or not new.is_directory or len(new.parts) < 2 or self.is_taken(path):
                continue
            if change.old is not None and not self._view.is_replaced(change):
                continue
            for step in plan.steps:
                if step.old is not None and any(_meet(step.old, place) for place in new.parts[1:]):
                    raise UserError(
                        f"{self._shown(path)} was renamed in the branch from a directory that a commit of "
                        f"{self._shown(step.path)} alone would change; choose {self._shown(path)}, too, or "
                        f"leave out {self._shown(step.path)}."
                    )

    def _shown(self, path: bytes) -> str:
        return quoted((self._above + path)[1:])


def _meet(old: Object, place: Place) -> bool:
    """Whether an object below is that directory, is above it, or is in it."""
    path = path_of(place)
    for part in old.parts:
        other = path_of(part)
        if part.layer is not place.layer:
            continue
        # Of a non-directory it is the directory that contains it.
        if _is_in(other, path) or (old.is_directory and _is_in(path, other)):
            return True
    return False


def _is_in(path: bytes, above: bytes) -> bool:
    return (path + b"/").startswith(above + b"/")
