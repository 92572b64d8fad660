"""Directories that a branch has renamed: a commit renames them, too, and then changes what differs in them.

That is for a directory of the base that has gone from its old name and come to one that was free. All others
are copied, as are renamed ones where the base is a union itself, which may not be able to rename them.
"""

from __future__ import annotations

from dataclasses import replace

from unionfs.branches.plan import Drop, Plan, Put, Rename, Set
from unionfs.branches.view import View
from unionfs.core.places import Place
from unionfs.sys.mountinfo import mount_id_of_path, mount_of_id
from unionfs.union.diff import Object
from unionfs.union.merge import path_of

_UNIONS = ("overlay", "aufs")


def renames_directories(base: str) -> bool:
    """Whether the filesystem of a base surely can rename any directory."""
    mount = mount_of_id(mount_id_of_path(base))
    return mount is not None and mount.fstype not in _UNIONS and not mount.is_fuse


def with_renames(view: View, plan: Plan) -> Plan:
    """The plan with renames instead of copies of whole directories. Raises OSError."""
    dropped = {step.path: step for step in plan.steps if isinstance(step, Drop)}
    found: dict[bytes, Rename] = {}
    for step in plan.steps:
        if isinstance(step, Put) and (rename := _rename(view, step, dropped)) is not None:
            found[step.path] = rename
    if not found or view.linked:
        # What the index keeps together would have to be looked for in all of them.
        return plan
    gone = {rename.source for rename in found.values()}
    steps: list[Put | Drop | Rename] = []
    sets = [*plan.sets]
    for step in plan.steps:
        if step.path in found:
            rename = found[step.path]
            steps.append(rename)
            _Differences(view, rename, steps, sets).find()
        elif step.path not in gone:
            steps.append(step)
    return replace(plan, steps=steps, sets=sets)


def _rename(view: View, step: Put, dropped: dict[bytes, Drop]) -> Rename | None:
    parts = step.new.parts
    if step.old is not None or not step.new.is_directory or len(parts) != 2 or not parts[0].layer.is_upper:
        return None
    source = b"/" + path_of(parts[1])
    drop = dropped.pop(source, None)
    if drop is None or not drop.old.is_directory or not _is_same(drop.old.parts[0], parts[1]):
        return None
    if drop.old.st is None or view.is_anothers(drop.old):
        return None
    return Rename(step.path, source, step.new, drop.old)


def _is_same(one: Place, other: Place) -> bool:
    """Whether two places are one directory."""
    return one.layer is other.layer and path_of(one) == path_of(other)


class _Differences:
    """Finds what differs in a renamed directory, as operations that come after the rename."""

    def __init__(
        self, view: View, rename: Rename, steps: list[Put | Drop | Rename], sets: list[Set]
    ) -> None:
        self._view = view
        self._rename = rename
        self._steps = steps
        self._sets = sets

    def find(self) -> None:
        """Raises OSError."""
        waiting = [(b"", self._rename.new, self._rename.old)]
        while waiting:
            below, new, old = waiting.pop()
            path, before = self._rename.path + below, len(self._steps)
            names = dict.fromkeys([*self._view.names(new), *self._view.names(old)])
            for name in names:
                if (deeper := self._compare(path + b"/" + name, name, new, old)) is not None:
                    waiting.append((below + b"/" + name, *deeper))
            self._set(path, below, new, old, changes=len(self._steps) > before)

    def _compare(self, path: bytes, name: bytes, new: Object, old: Object) -> tuple[Object, Object] | None:
        """Note the operation for one name; returns both sides of a directory that stays and may differ."""
        now, was = self._view.child(new, name), self._view.child(old, name)
        if now is None:
            if was is not None:
                self._steps.append(Drop(path, was))
        elif was is not None and now.is_directory and was.is_directory and self._stays(now, was):
            return (now, was) if now.parts[0].layer.is_upper else None
        elif was is None or now.is_directory or was.is_directory or now.parts[0].layer.is_upper:
            self._steps.append(Put(path, new, now, was))
        return None

    def _stays(self, now: Object, was: Object) -> bool:
        return _is_same(now.parts[-1], was.parts[0])

    def _set(self, path: bytes, below: bytes, new: Object, old: Object, *, changes: bool) -> None:
        now, before = self._view.compared(new, old)
        if self._view.is_anothers(old):
            return
        if changes or now._replace(atime_ns=0) != before._replace(atime_ns=0):
            self._sets.append(Set(path, now, before, self._rename.source + below))
