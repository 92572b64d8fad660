"""The open files of both sides: which there are, and which the rules of ``normalise`` close."""

from __future__ import annotations

import os
import stat

from tests.oracle import operations
from tests.oracle.operations import Op
from tests.oracle.side import Side
from tests.support.snapshot import Tree


class Opened:
    """The sides in the present arena, and the handles that are open on both."""

    def __init__(self, ours: Side, theirs: Side) -> None:
        self.ours, self.theirs = self.sides = ours, theirs
        self.arena = ""
        #: Overlayfs's tree after the last step.
        self.tree: Tree = {}
        #: The numbers of the open handles, by identity.
        self.handles: dict[str, set[int]] = {}
        #: Open lower files without a name, by what that was (rule 5).
        self._dead: dict[tuple[str, int], bytes] = {}

    def _note_handles(self, op: Op, *, ok: bool) -> None:
        if not ok:
            return
        mine = self.handles[op.who]
        if op.name == "h_close":
            mine.discard(op.args[0])
            self._dead.pop((op.who, op.args[0]), None)
        elif op.name == "open":
            mine.add(op.args[0])
            self._dead.pop((op.who, op.args[0]), None)
        elif op.name == "h_reopen":
            mine.add(op.args[1])
            source = self._dead.get((op.who, op.args[0]))
            self._dead.pop((op.who, op.args[1]), None)
            if source is not None:
                self._dead[op.who, op.args[1]] = source

    def _names(self) -> dict[tuple[str, int], bytes]:
        return {
            (who, number): name
            for who, numbers in self.handles.items()
            if numbers
            for number, name in self.theirs.workers[who].call(operations.handle_names).items()
        }

    def _where(self, op: Op) -> dict[tuple[str, int], tuple[bytes, bool]]:
        """The name of each open handle on overlayfs, and whether that is already in the upper."""
        assert self.theirs.mount is not None
        prefix = os.fsencode(self.theirs.mount.mountpoint / self.arena) + b"/"
        found = {}
        for key, name in self._names().items():
            if not name.endswith(b" (deleted)"):
                path = name.removeprefix(prefix)
                found[key] = (path, self.is_copied_up(path))
        return found

    def _note_dead(self, before: dict[tuple[str, int], tuple[bytes, bool]]) -> None:
        for key, name in self._names().items():
            if name.endswith(b" (deleted)") and key in before and not before[key][1]:
                self._dead[key] = before[key][0]

    def _is_dead_directory(self, who: str, number: int) -> bool:
        if (who, number) not in self._dead:
            return False
        _, found = self.theirs.workers[who].call(operations.run, "h_stat", 0, (number,))
        return stat.S_ISDIR(found.mode)

    def _close_dead(self, path: bytes) -> None:
        for who, number in [key for key, name in self._dead.items() if name == path]:
            self._forget(who, number)

    def _open_lowers(self, op: Op) -> set[tuple[str, int]]:
        """The handles on a regular file of a lower."""
        found = set(self._dead)
        for key, (name, copied_up) in self._where(op).items():
            entry = self.tree.get(name)
            if entry is not None and entry.kind == stat.S_IFREG and not copied_up:
                found.add(key)
        return found

    def _close_copied_up(self, op: Op, open_lowers: set[tuple[str, int]]) -> None:
        """Rule 11: close the handles whose file is now in the upper."""
        if not open_lowers:
            return
        new = {"open": 0, "h_reopen": 1}.get(op.name)
        fresh = None if new is None else (op.who, op.args[new])
        for key, (_, copied_up) in self._where(op).items():
            if key in open_lowers and key != fresh and copied_up:
                self._forget(*key)

    def _forget(self, who: str, number: int) -> None:
        for side in self.sides:
            side.workers[who].call(operations.run, "h_forget", 0, (number,))
        self.handles[who].discard(number)
        self._dead.pop((who, number), None)

    def is_copied_up(self, path: bytes, side: Side | None = None) -> bool:
        """Whether a side (by default overlayfs) has the path in its upper (a whiteout there is no copy)."""
        found = (side or self.theirs).has(self.arena, path)
        return found is not None and not (stat.S_ISCHR(found.st_mode) and found.st_rdev == 0)
