"""Two mounts over copies of the same layers, and workers that do every operation on both.

One pair of mounts serves many examples: every lower holds several equal trees ("arenas"), one for each
example. When they are used up, or a side is broken, the uppers are emptied and both sides are mounted again
over the same lowers.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.oracle import layers, normalise, operations
from tests.oracle.operations import Op
from tests.support import mounting, snapshot
from tests.support.mounting import Mount
from tests.support.snapshot import Tree
from tests.support.worker import Worker, WorkerFailed, WorkerHung

ARENAS = 24
"""The default number of arenas of a pair: creating them takes longer than an example."""
REMOVING = frozenset({"unlink", "rmdir", "rename"})
"""Operations that may remove the name of an open file."""
COPYING_HANDLE = frozenset({"h_chmod", "h_chown", "h_setxattr"})
"""Operations that copy up an open directory."""


class Difference(AssertionError):
    """The two sides are not equal, or a rule of the union is broken."""


@dataclass
class Side:
    """One of the two: its layers, its mount and a worker for each identity."""

    name: str
    home: Path
    count: int
    arenas: int
    options: Sequence[str] = ()
    mount: Mount | None = None
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    workers: dict[str, Worker] = field(default_factory=dict)

    def build(self) -> None:
        """Create the lowers, with all arenas."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        for lower in self.lowers:
            lower.mkdir()
        for index in range(self.arenas):
            layers.build([lower / arena_name(index) for lower in self.lowers])

    @property
    def lowers(self) -> list[Path]:
        return [self.home / f"lower{index}" for index in range(1, self.count + 1)]

    @property
    def upper(self) -> Path:
        return self.home / "upper"

    @property
    def work(self) -> Path:
        return self.home / "work"

    def open(self, session: str) -> None:
        """Mount with an empty upper and start missing workers."""
        for path in (self.upper, self.work):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        self.enter(session)
        for who, (uid, gid, groups) in operations.IDENTITIES.items():
            if who not in self.workers or not self.workers[who].alive:
                self.workers[who] = Worker(uid, gid, groups, modules=["tests.oracle.operations"])

    def enter(self, session: str) -> Mount:
        """Mount the layers with their present content; ``leave`` undoes it."""
        home, lowers, upper, work, options = self.home, self.lowers, self.upper, self.work, self.options
        context = (
            mounting.kernel_mounted(home, lowers=lowers, upper=upper, work=work, options=options)
            if session == "kernel"
            else mounting.mounted(
                home, lowers=lowers, upper=upper, work=work, options=options, session=session
            )
        )
        self.mount = self.stack.enter_context(context)
        return self.mount

    def leave(self) -> None:
        """Unmount; raises MountFailed if the daemon does not end correctly."""
        for worker in self.workers.values():
            if worker.alive:
                worker.call(operations.end)
        self.mount = None
        self.stack.close()

    def destroy(self) -> None:
        """End everything by force."""
        if self.mount is not None:
            mounting.destroy(self.mount)
        for worker in self.workers.values():
            worker.kill()
            worker.close()
        self.workers.clear()
        self.mount = None
        with contextlib.suppress(AssertionError, OSError):
            self.stack.close()


def arena_name(index: int) -> str:
    """The directory of one arena."""
    return f"arena-{index:02}"


class Pair:
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
        #: The session without shortcuts has the same rules.
        self.kind = session.removesuffix(mounting.PLAIN)
        self.clock = normalise.Clock.start()
        self._is_metacopy = normalise.METACOPY in options
        self._separate = self.kind == normalise.SEPARATE and not index
        options = [*(options or ["redirect_dir=on"]), "index=on" if index else "index=off"]
        self.ours = Side("ours", home / "ours", count, arenas, options)
        self.theirs = Side("theirs", home / "theirs", count, arenas, options)
        self.home = home
        self._next = arenas
        self._broken = False  # the mounts are unusable
        self._spoiled = False  # so are the lowers
        self._final: dict[str, Tree] = {}
        self._manifests: dict[tuple[Path, str], dict[bytes, tuple[object, ...]]] = {}
        self.arena = ""
        self.tree: Tree = {}
        self._our_tree: Tree = {}
        self.handles: dict[str, set[int]] = {}
        self._dead: dict[tuple[str, int], bytes] = {}
        self._spoiled = True

    # -- the life of the mounts

    def _renew(self) -> None:
        if self._broken:
            self._final.clear()
            for side in (self.ours, self.theirs):
                side.destroy()
        else:
            self.close()
        if self._spoiled:
            for side in (self.ours, self.theirs):
                side.build()
            for lower in self.ours.lowers:
                for index in range(self.arenas):
                    self._manifests[lower, arena_name(index)] = snapshot.manifest(lower / arena_name(index))
            self._spoiled = False
        for side, session in ((self.ours, self.session), (self.theirs, "kernel")):
            side.open(session)
        self._next, self._broken = 0, False

    def close(self) -> None:
        """Unmount both, then check every finished tree again with the uppers exchanged, writable."""
        if self.ours.mount is None or self._broken:
            return
        for side in (self.ours, self.theirs):
            side.leave()
        final, self._final = self._final, {}
        for side, session in ((self.ours, "kernel"), (self.theirs, self.session)):
            mount = side.enter(session)
            try:
                for self.arena, tree in final.items():
                    arena = self.arena
                    again = side.workers["root"].call(snapshot.take, os.fsencode(mount.mountpoint / arena))
                    self._check(f"{side.name}'s upper under {session}, after the run, {arena}", again, tree)
            finally:
                side.leave()

    def destroy(self) -> None:
        """End both sides by force."""
        for side in (self.ours, self.theirs):
            side.destroy()

    # -- one example

    def begin(self) -> None:
        """Start an example in a fresh arena."""
        if self._broken or self._next >= self.arenas or self.ours.mount is None:
            self._renew()
        self.arena = arena_name(self._next)
        self._next += 1
        self._begin()

    def _begin(self) -> None:
        self.handles = {who: set() for who in operations.IDENTITIES}
        self._dead.clear()
        for side in (self.ours, self.theirs):
            assert side.mount is not None
            for worker in side.workers.values():
                worker.call(operations.begin, os.fsencode(side.mount.mountpoint / self.arena))
        self.look(None)

    def _remount(self) -> None:
        """Unmount both sides and mount them again: the trees must be the same, though not st_ino."""
        for side, session in ((self.ours, self.session), (self.theirs, "kernel")):
            side.leave()
            side.enter(session)
        before = self.tree
        self._begin()
        self._check("after a remount, overlayfs before it", self._our_tree, before, self.theirs)

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
        if op.name == "remount":
            self._guarded(self._remount)
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
        for side in (self.ours, self.theirs):
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
        for side in (self.ours, self.theirs):
            side.workers[who].call(operations.run, "h_forget", 0, (number,))
        self.handles[who].discard(number)
        self._dead.pop((who, number), None)

    def is_copied_up(self, path: bytes, side: Side | None = None) -> bool:
        """Whether a side (by default overlayfs) has the path in its upper (a whiteout there is no copy)."""
        upper = (side or self.theirs).upper / self.arena
        try:
            found = os.lstat(os.path.join(os.fsencode(upper), path))
        except OSError:
            return False
        return not (stat.S_ISCHR(found.st_mode) and found.st_rdev == 0)

    def look(self, op: Op | None) -> None:
        """Compare the whole trees."""
        copied = self._copied_up() if self.kind == normalise.LATE else frozenset()
        for side in (self.ours, self.theirs):
            side.workers["root"].start(operations.take)
        answers: list[Tree] = []
        problem: BaseException | None = None
        for side in (self.ours, self.theirs):
            try:
                answers.append(side.workers["root"].finish())
            except (OSError, WorkerFailed, WorkerHung) as error:
                problem = problem or Difference(f"after {op}: reading {side.name}'s whole tree: {error!r}")
        if problem is not None:
            raise problem
        ours, theirs = answers
        late = self.kind == normalise.LATE and op is not None and op.name in ("truncate", "h_truncate")
        if late or (self._is_metacopy and op is not None and op.name in ("open", "h_reopen")):
            ours = self._with_times(ours, theirs)
        self.tree = theirs
        self._check(f"after {op}", ours, self.tree, copied)
        lines: list[str] = []
        if self.session != "overlay":  # which does not always fulfil the union's rules of d_ino and st_ino
            lines += normalise.strict(ours)
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
        top = os.fsencode(self.ours.upper / self.arena)
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
        for side in (self.ours, self.theirs):
            for worker in side.workers.values():
                worker.call(operations.end)
        for lower in self.ours.lowers:
            if snapshot.manifest(lower / self.arena) != self._manifests[lower, self.arena]:
                self._spoiled = True
                raise Difference(f"{lower.name} was changed: {self._changes(lower)}")
        if not self.index:  # an index is not used when its upper is a lower; `close` compares all the same
            self._cross("kernel", self.ours, self.tree)
            self._cross(self.session, self.theirs, self.tree)
        self._final[self.arena] = self.tree

    def _changes(self, lower: Path) -> list[bytes]:
        before, after = self._manifests[lower, self.arena], snapshot.manifest(lower / self.arena)
        return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))

    def _cross(self, session: str, side: Side, tree: Tree) -> None:
        """One side's upper, read-only under the other's filesystem, must show the same tree."""
        layers_ = [side.upper, *side.lowers]
        context = (
            mounting.kernel_mounted(self.home, lowers=layers_, name="cross", options=side.options)
            if session == "kernel"
            else mounting.mounted(
                self.home, lowers=layers_, session=session, name="cross", options=side.options
            )
        )
        with context as mount:
            again = side.workers["root"].call(snapshot.take, os.fsencode(mount.mountpoint / self.arena))
            self._check(f"{side.name}'s upper read by {session}", again, tree)

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


def _writes(flags: int) -> bool:
    return flags & (os.O_ACCMODE | os.O_TRUNC) != os.O_RDONLY


def _normal(item: object) -> bytes:
    return os.path.normpath(item) if isinstance(item, bytes) else b""


def _touched(op: Op | None) -> tuple[bytes, ...]:
    """The names that a step may assign to another object (through symlinks too, by their last component)."""
    if op is None or op.name not in {
        "create",
        "open",
        "unlink",
        "rename",
        "mkdir",
        "rmdir",
        "mknod",
        "symlink",
        "link",
    }:
        return ()
    if op.name in {"create", "open"}:
        return ()
    names = []
    for item in op.args:
        if isinstance(item, bytes):
            names.append(os.path.normpath(item))
            names.append(os.path.join(b"m", os.path.basename(item.rstrip(b"/"))))  # through the symlink to m
    return tuple(names)
