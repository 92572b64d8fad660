"""Two mounts over copies of the same layers, and workers that do every operation on both.

One pair of mounts serves many examples: every lower holds several equal trees ("arenas"), one for each
example. When they are used up, or a side is broken, the uppers are emptied and both sides are mounted again
over the same lowers.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from pathlib import Path

from tests.oracle import normalise, operations
from tests.oracle.opened import Opened
from tests.oracle.operations import Op
from tests.oracle.side import Layers, Side, arena_name
from tests.support import mounting, snapshot
from tests.support.mounting import Mount
from tests.support.snapshot import Tree
from tests.support.worker import WorkerFailed, WorkerHung

ARENAS = 24
"""The default number of arenas of a pair: creating them takes longer than an example."""
PUSHED = 20
"""So many uppers may have become lowers when an example begins: mount(2) takes a page of options."""
REMOVING = frozenset({"unlink", "rmdir", "rename"})
"""Operations that may remove the name of an open file."""
COPYING_HANDLE = frozenset({"h_chmod", "h_chown", "h_setxattr"})
"""Operations that copy up an open directory."""
NAMING = frozenset({"unlink", "rename", "mkdir", "rmdir", "mknod", "symlink", "link"})
"""Operations that may assign a name to another object."""
OPENING = frozenset({"open", "h_reopen", "create", "write"})
"""Operations that may open a file for writing without a change of it."""
LAYERS = frozenset({"remount", "push", "swap"})
"""Operations on the mounts: mount again, with the upper as the topmost lower below a new one, or with the
other side's layers."""


class Difference(AssertionError):
    """The two sides are not equal, or a rule of the union is broken."""


class Pair(Opened):
    """``ours`` and ``theirs``; ``begin``, then ``step`` for each operation, then ``finish``."""

    def __init__(
        self,
        home: Path,
        session: str,
        count: int,
        arenas: int = ARENAS,
        options: Sequence[str] = (),
        *,
        index: bool = False,
    ) -> None:
        """``options``: of both mounts; without any, `redirect_dir=on`. ``index``: whether both have one."""
        self.index = index
        self.session, self.count, self.arenas = session, count, arenas
        self.sessions = [session, "kernel"]
        #: The session without shortcuts has the same rules.
        self.kind = session.removesuffix(mounting.PLAIN)
        self.clock = normalise.Clock.start()
        self._is_metacopy = normalise.METACOPY in options
        self._separate = self.kind == normalise.SEPARATE and not index
        self.options = options or ["redirect_dir=on"]
        options = [*self.options, "index=on" if index else "index=off"]
        super().__init__(
            *(Side(name, home / name, Layers(home / name, count), options) for name in ("ours", "theirs"))
        )
        self.home = home
        self._next = arenas
        self._broken = False  # the mounts are unusable
        self._spoiled = False  # so are the lowers
        self._final: dict[str, Tree] = {}
        self._manifests: dict[tuple[Path, str], dict[bytes, tuple[object, ...]]] = {}
        self._our_tree: Tree = {}
        self._spoiled = True

    # -- the life of the mounts

    def _renew(self) -> None:
        if self._broken:
            self._final.clear()
            self.destroy()
        else:
            self.close()
        if self._spoiled:
            self._manifests.clear()
            for side in self.sides:
                side.layers = Layers(side.home, self.count)
                side.layers.build(self.arenas)
                for lower in side.layers.first:
                    for name in map(arena_name, range(self.arenas)):
                        self._manifests[lower, name] = snapshot.manifest(lower / name)
            self._first, self._spoiled = list(self._manifests), False
        self._manifests = {key: self._manifests[key] for key in self._first}
        for side, session in zip(self.sides, self.sessions, strict=True):
            side.open(session)
        self._next, self._broken = 0, False

    def close(self) -> None:
        """Unmount both, then check every finished tree again with the uppers exchanged, writable."""
        if self.ours.mount is None or self._broken:
            return
        for side in self.sides:
            side.leave()
        final, self._final = self._final, {}
        for side, session in zip(self.sides, reversed(self.sessions), strict=True):
            mount = side.enter(session)
            try:
                for self.arena, tree in final.items():
                    again = self._read(side, mount)
                    when = f"{side.name}'s upper under {session}, after the run, {self.arena}"
                    self._check(when, {path: again[path] for path in again if path in tree}, tree)
            finally:
                side.leave()

    def _read(self, side: Side, mount: Mount) -> Tree:
        tree: Tree = side.workers["root"].call(snapshot.take, os.fsencode(mount.mountpoint / self.arena))
        return tree

    def destroy(self) -> None:
        """End both sides by force."""
        for side in self.sides:
            side.destroy()

    # -- one example

    def begin(self) -> None:
        """Start an example in a fresh arena."""
        full = self._next >= self.arenas or self.ours.layers.pushed >= PUSHED
        if self._broken or full or self.ours.mount is None:
            self._renew()
        self.arena = arena_name(self._next)
        self._next += 1
        self._begin()

    def _begin(self) -> None:
        self.handles = {who: set() for who in operations.IDENTITIES}
        self._dead.clear()
        for side in self.sides:
            assert side.mount is not None
            for worker in side.workers.values():
                worker.call(operations.begin, os.fsencode(side.mount.mountpoint / self.arena))
        self.look(None)

    def _remount(self, name: str) -> None:
        """Unmount both sides and mount them again, with what ``name`` changes in the layers.

        The trees must be the same as before, and each object must have the number that it had.
        """
        if name != "remount":
            self._settle(pushes=name == "push")
        ours, theirs = self._our_tree, self.tree
        linked = self._linked(self.arena, theirs) if name == "push" else frozenset()
        for side in self.sides:
            side.leave()
        if name == "push":
            self._push()
        elif name == "swap":
            self.ours.layers, self.theirs.layers = self.theirs.layers, self.ours.layers
            ours, theirs = theirs, ours
        for side, session in zip(self.sides, self.sessions, strict=True):
            side.enter(session)
        self._begin()
        trees = [(ours, self._our_tree), (theirs, self.tree)]
        for side, (before, after) in zip(self.sides, trees, strict=True):
            when = f"after a {name}, with {side.name} before it"
            if self.index:
                before = {
                    path: replace(entry, nlink=after[path].nlink) if path in linked else entry
                    for path, entry in before.items()
                }
            # What the union shows comes first, as the rules are about it.
            pair = (before, after) if name == "swap" and side is self.theirs else (after, before)
            self._check(when, *pair)
        if self.session == "overlay" or (name == "swap" and self.ours.layers.pushed):
            return  # rule 16
        own = self._shared_numbers(self.arena) if self._separate else frozenset()
        lines = normalise.numbers_lost(*trees, linked, own)
        if name == "swap":
            lines += normalise.numbers_lost(*reversed(trees), linked, own)
        if lines:
            raise Difference(f"after a {name}:\n  " + "\n  ".join(lines[:20]))

    def _shared_numbers(self, arena: str) -> Set[int]:
        """The numbers of files with several hard links in the lowers."""
        return {
            entry[8]  # type: ignore
            for (_, name), manifest in self._manifests.items()
            if name == arena
            for entry in manifest.values()
            if entry[5] > 1 and not stat.S_ISDIR(entry[0])  # type: ignore
        }

    def _push(self) -> None:
        """Make the uppers lowers."""
        for side in self.sides:
            if (side.layers.upper / self.arena).exists():
                manifest = snapshot.manifest(side.layers.upper / self.arena)
                self._manifests[side.layers.upper, self.arena] = manifest
        if self.index:
            for arena, tree in self._final.items():
                self._final[arena] = _without(tree, self._linked(arena, tree))
        for side in self.sides:
            side.layers.push()

    def _linked(self, arena: str, tree: Tree) -> frozenset[bytes]:
        """The files of rule 17: those that have, or had, several names."""
        shared = self._shared_numbers(arena)
        return frozenset(
            path
            for path, entry in tree.items()
            if not stat.S_ISDIR(entry.mode)
            if entry.nlink > 1 or entry.ino in shared or any(s.was_indexed(arena, path) for s in self.sides)
        )

    def _settle(self, *, pushes: bool = False) -> None:
        """Copy up what rule 12 applies to: with the layers exchanged it would apply to overlayfs. ``pushes``:
        and what rule 17 applies to, by each name of a copy, on both sides."""
        tree, names = self.tree, []
        if self.kind == normalise.LATE:
            copied = self._copied_up()
            names = [
                path
                for path, entry in self._our_tree.items()
                if entry.nlink > tree[path].nlink and self._is_late(path, copied)
            ]
        for path in names:
            self.ours.workers["root"].call(operations.touch_up, path)
        if pushes and any(side.has_index_entries() for side in self.sides):
            names += (linked := sorted(self._linked(self.arena, tree)))
            for path in linked:
                for side in self.sides:
                    side.workers["root"].call(operations.touch_up, path)
        if names:
            self.look(None)

    def step(self, op: Op) -> None:
        """Do one operation on both sides and compare; raises Difference. Skipped without the handle."""
        if op.name.startswith("h_") and op.args[0] not in self.handles[op.who]:
            return
        if op.name in COPYING_HANDLE and self._is_dead_directory(op.who, op.args[0]):
            return  # rule 5
        if op.name in ("rename", "link") and self._is_too_long(op):
            return  # rule 14
        if op.name in ("rmdir", "rename") and any(_normal(item) in normalise.KEPT for item in op.args):
            return
        if op.name in LAYERS:
            # Not if some worker could not enter the tree again, after a chmod of its root.
            if all(one.call(os.access, b".", os.X_OK) for s in self.sides for one in s.workers.values()):
                self._guarded(lambda: self._remount(op.name))
            return
        open_lowers = self._open_lowers(op) if self.kind == normalise.KEEPING else set()
        if op.name == "h_reopen" and (op.who, op.args[0]) in open_lowers and _writes(op.args[2]):
            return  # rule 11
        self._guarded(lambda: self._do(op, open_lowers))

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (Difference, WorkerFailed, WorkerHung) as error:
            self._broken = True
            if isinstance(error, Difference):
                raise
            raise Difference(f"{type(error).__name__}: {error}") from error

    def _do(self, op: Op, open_lowers: set[tuple[str, int]]) -> None:
        self._step(op)
        self._close_copied_up(op, open_lowers)
        self.look(op)

    def _step(self, op: Op) -> None:
        umask = op.umask
        if op.name in operations.CREATING and umask:
            path = next(item for item in op.args if isinstance(item, bytes))
            if self.theirs.workers["root"].call(operations.has_default_acl, path):
                umask = 0
        before = self._where(op) if op.name in REMOVING else {}
        for side in self.sides:
            side.workers[op.who].start(operations.run, op.name, umask, op.args)
        ours = self.ours.workers[op.who].finish()
        theirs = self.theirs.workers[op.who].finish()
        dead = op.name.startswith("h_") and (op.who, op.args[0]) in self._dead
        if wrong := normalise.compare_results(
            ours, theirs, dead_lower=dead, late=self.kind == normalise.LATE
        ):
            if (
                op.name in ("chown", "h_chown")
                and op.args[1:] == (-1, -1)
                and theirs == ("errno", errno.EPERM)
            ):
                return  # rule 9
            if not (dead and theirs == ("errno", errno.EEXIST) and ours[0] == "ok"):
                raise Difference(f"{op}: {wrong}")
            if op.name == "h_reopen":
                self.handles[op.who].add(op.args[1])
                self._dead[op.who, op.args[1]] = self._dead[op.who, op.args[0]]
            self._close_dead(self._dead[op.who, op.args[0]])
            return
        self._note_handles(op, ok=theirs[0] == "ok")
        if before:
            self._note_dead(before)

    def _is_too_long(self, op: Op) -> bool:
        names = [name for item in op.args if isinstance(item, bytes) for name in item.split(b"/")]
        return self._is_metacopy and max(map(len, names)) > normalise.LONG_NAME

    def look(self, op: Op | None) -> None:
        """Compare the whole trees."""
        copied = self._copied_up() if self.kind == normalise.LATE else frozenset()
        for side in self.sides:
            side.workers["root"].start(operations.take)
        answers: list[Tree] = []
        problem: BaseException | None = None
        for side in self.sides:
            try:
                answers.append(side.workers["root"].finish())
            except (OSError, WorkerFailed, WorkerHung) as error:
                problem = problem or Difference(f"after {op}: reading {side.name}'s whole tree: {error!r}")
        if problem is not None:
            raise problem
        ours, theirs = answers
        late = self.kind == normalise.LATE and op is not None and op.name in ("truncate", "h_truncate")
        if late or (self._is_metacopy and op is not None and op.name in OPENING):
            ours = self._with_times(ours, theirs)
        self.tree = theirs
        self._check(f"after {op}", ours, self.tree, copied)
        lines: list[str] = []
        if self.session != "overlay":  # which does not always fulfil the union's rules of d_ino and st_ino
            lines += normalise.strict(ours, separate=self._separate)
            if op is not None:
                touched = _touched(op)
                lines += normalise.moved_inodes(self._our_tree, ours, touched, separate=self._separate)
            if op is not None and op.name == "rename":
                lines += normalise.renamed_inodes(self._our_tree, ours, *op.args)
        self._our_tree = ours
        for path, entry in ours.items():
            if entry.mode != self.tree[path].mode:  # rule 9
                self.ours.workers["root"].call(os.chmod, path, stat.S_IMODE(self.tree[path].mode))
        if self.ours.mount is not None:
            lines += [f"in the log: {line}" for line in self.ours.mount.bad_log_lines()]
        if lines:
            raise Difference(f"after {op}:\n  " + "\n  ".join(lines[:20]))

    def _with_times(self, ours: Tree, theirs: Tree) -> Tree:
        """Rules 13 and 14: set overlayfs's time on the file that was truncated to its current size, or whose
        data was copied up."""
        changed = {}
        for path in normalise.truncated_to_same(self.tree, ours, theirs, self.clock):
            self.ours.workers["root"].call(os.utime, path)
            changed[path] = replace(ours[path], mtime=theirs[path].mtime)
        return {**ours, **changed}

    def _copied_up(self) -> frozenset[bytes]:
        """What the union has in its upper now: looking at a file may write it back, and so copy it up."""
        top = os.fsencode(self.ours.layers.upper / self.arena)
        return frozenset(
            os.path.relpath(os.path.join(at, name), top) for at, _, names in os.walk(top) for name in names
        )

    def _check(
        self, when: str, ours: Tree, theirs: Tree, copied: frozenset[bytes] | None = None
    ) -> None:
        """``copied``: what the union had in its upper before ``ours`` was taken, if it may differ now."""
        lines = normalise.compare_trees(
            ours, theirs, self.clock, lambda path: self._is_late(path, copied),
            separate=self._separate,
        )  # fmt: skip
        if lines:
            raise Difference(f"{when}:\n  " + "\n  ".join(lines[:20]))

    def _is_late(self, path: bytes, copied: frozenset[bytes] | None) -> bool:
        """Whether overlayfs has copied the path up, but the union has (or had) not yet (rule 12)."""
        if self.kind != normalise.LATE or not self.is_copied_up(path, self.theirs):
            return False
        return path not in copied if copied is not None else not self.is_copied_up(path, self.ours)

    def finish(self) -> None:
        """End an example: lowers are unchanged, and each side reads the other's changes."""
        try:
            self._finish()
        except (AssertionError, OSError):
            self._broken = True
            raise

    def _finish(self) -> None:
        self._settle()
        for side in self.sides:
            for worker in side.workers.values():
                worker.call(operations.end)
            for lower in side.layers.lowers:
                self._check_lower(lower)
        alone = self._linked(self.arena, self.tree) if self.index else frozenset()  # rule 17
        for side, session in zip(self.sides, reversed(self.sessions), strict=True):
            with side.read_by(session, self.home) as mount:
                again = self._read(side, mount)
            when = f"{side.name}'s upper read by {session}"
            self._check(when, _without(again, alone), _without(self.tree, alone))
        self._final[self.arena] = self.tree

    def _check_lower(self, lower: Path) -> None:
        before = self._manifests.get((lower, self.arena))
        if before is None:
            return  # an upper of an earlier example
        after = snapshot.manifest(lower / self.arena)
        if after != before:
            self._spoiled = True
            changes = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
            raise Difference(f"{lower} was changed: {changes}")

    def replay(self, ops: Sequence[Op], *, full: bool = True) -> str | None:
        """Play a sequence in a fresh arena; the first difference, or None."""
        try:
            self.begin()
            for op in ops:
                self.step(op)
            if full:
                self.finish()
        except AssertionError as error:
            self._broken = True
            return str(error)
        return None


def _without(tree: Tree, paths: Set[bytes]) -> Tree:
    return {path: entry for path, entry in tree.items() if path not in paths}


def _writes(flags: int) -> bool:
    return flags & (os.O_ACCMODE | os.O_TRUNC) != os.O_RDONLY


def _normal(item: object) -> bytes:
    return os.path.normpath(item) if isinstance(item, bytes) else b""


def _touched(op: Op | None) -> tuple[bytes, ...]:
    """The names that a step may assign to another object (through symlinks too, by their last component)."""
    if op is None or op.name not in NAMING:
        return ()
    names = []
    for item in op.args:
        if isinstance(item, bytes):
            names.append(os.path.normpath(item))
            names.append(os.path.join(b"m", os.path.basename(item.rstrip(b"/"))))  # through the symlink to m
    return tuple(names)
