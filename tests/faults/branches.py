"""Faults in commands of branches: a commit to a base or a parent, a merge, a commit of a part, an undo.

After an error the tree below is the old or the new one, as the command says, and the branch is there or gone
with it. After a kill it may be between them until the same command is repeated. That then succeeds, the tree
is the new one, and an undo restores the old one; nothing else is left in the base and the store.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.branches.branching import Branching, Tree, differing, tree
from tests.faults import commands
from tests.faults.batch import LASTING, Report
from tests.faults.commands import Outcome
from tests.faults.injecting import KILL, Fault
from tests.faults.plan import ALL, Selection
from tests.support import areas, mounting
from unionfs.branches.undo import undo
from unionfs.errors import UserError
from unionfs.storage import jsonfiles

_FILL: Final = """
mkdir -p d/e gone/deep ren; echo 1 > d/f1; echo 2 > d/f2; echo g > gone/deep/g; echo a > ren/a; ln d/f2 d/l2
seq 9 > text; setfattr -n user.one -v 1 d; touch -d 2001-01-01 d/f1 text ren/a ren gone d
"""
_CHANGES: Final = """
echo more >> d/f1; rm -r gone; mkdir -p new/er; echo n > new/er/n; echo x > x; ln x new/x; mv ren d/moved
chmod 0711 d; sed -i 's/^9/nine/' text
"""
_BELOW: Final = "sed -i 's/^1/one/' text"
_BETWEEN: Final = "cannot be taken back"
_DONE: Final = "are in place|is undone"
"""What a command says that could not put everything back, and one that fails after its change."""
_NOTHING_LEFT: Final = "has no changes in|there is no branch|was undone already"
"""What the same command says after a killed one that had done all, and keeps no record for an undo of all."""
_MODULES: Final = (
    "unionfs.cli.branch.committing", "unionfs.branches.commit", "unionfs.branches.undo",
    "unionfs.branches.merging", "unionfs.daemon.service",
)  # fmt: skip
_COMMIT: Final = ("branch", "commit", "br")
_PART: Final = (*_COMMIT, "--only", "d", "--only", "ren", "--only", "gone")


@dataclass(frozen=True)
class Scenario:
    """A command on the branch ``br``. ``below``: what changes the base after the branch was made."""

    name: str
    words: tuple[str, ...]
    undoes: bool = False
    #: Whether the branch lies over another one, which the command changes.
    nested: bool = False
    #: Whether the base is on another filesystem than the store, so that no commit can be undone.
    apart: bool = False
    below: str = ""
    #: The commit that is undone.
    undone: tuple[str, ...] = _COMMIT

    @property
    def commit(self) -> tuple[str, ...]:
        return self.undone if self.undoes else self.words

    def __str__(self) -> str:
        return self.name


SCENARIOS: Final = [
    Scenario("branch commit", _COMMIT),
    Scenario("branch commit --merge", (*_COMMIT, "--merge"), below=_BELOW),
    Scenario("branch commit --only", _PART),
    Scenario("branch commit to another filesystem", _COMMIT, apart=True),
    Scenario("branch commit to a parent", _COMMIT, nested=True),
    Scenario("branch undo", ("branch", "undo"), undoes=True),
    Scenario("branch undo of a part", ("branch", "undo"), undoes=True, undone=_PART),
    Scenario("branch undo in a parent", ("branch", "undo"), undoes=True, nested=True),
]


class Stage:
    """A base, a store with the branch, and for a nested scenario its parent."""

    def __init__(self, place: Path, scenario: Scenario) -> None:
        place.mkdir()
        self.place, self.scenario = place, scenario
        self._resources = ExitStack()
        self._resources.callback(areas.remove, place)
        self._resources.callback(areas.detach, place)
        self.branching = made = Branching(place)
        if scenario.apart:
            made.base.rmdir()
            made.base = self._resources.enter_context(areas.filesystem("tmpfs")) / "base"
            made.base.mkdir()
        _sh(_FILL, made.base)
        if scenario.nested:
            made.tries("echo parent > parent; echo p >> d/f2", "parent")
        made.tries(_CHANGES, "br", *(("--from", "parent") if scenario.nested else ()))
        _sh(scenario.below, made.base)
        if scenario.apart:
            _sh(f"cp -a {made.base} copy; cp -a {made.root}/branches/br kept", place)
        else:
            self._commit()
            undo(made.store)
        self.old, self.layer = self.below(), self._layer()
        self._commit()
        self.new, self.files = self.below(), self._files()
        self.restore()
        self.files_before = self._files()

    def close(self) -> None:
        self._resources.close()

    def below(self) -> Tree:
        """The tree that is changed: the base, or the parent, read by the kernel, as another lies over it."""
        if not self.scenario.nested:
            found = tree(self.branching.base)
            if "--only" in self.scenario.commit:  # not the root, whose time is that of the changes in it
                del found[b"."]
            return found
        lowers = [self.branching.root / "branches/parent/upper", self.branching.base]
        with mounting.kernel_mounted(
            self.place, lowers=lowers, options=["redirect_dir=follow"], name="view"
        ) as view:
            return tree(view.mountpoint, links=False)

    def _layer(self) -> Tree:
        """The layer of the branch; empty without it."""
        upper = self.branching.root / "branches/br/upper"
        return tree(upper, links=False) if upper.exists() else {}

    def _files(self) -> list[str]:
        """What the store has, whatever the commits are called."""
        names = [
            str(path.relative_to(self.branching.root)) for path in self.branching.root.rglob("*")
            if not any(one in str(path) for one in ("lock", "upper/", "/new/", "/.removed-"))
        ]  # fmt: skip
        waste = [f"commits/{one}" for one in self._waste()]
        return sorted(re.sub(r"\d{20}", "ID", one) for one in names if not one.startswith(tuple(waste)))

    def _waste(self) -> set[str]:
        """Commits without a journal, which the next command removes."""
        ids = self.branching.store.commit_ids()
        return {one for one in ids if not Path(self.branching.store.commits, one, "journal.json").exists()}

    def _commit(self) -> None:
        outcome, _ = self.run(self.scenario.commit)
        assert outcome.code == 0, outcome.text

    def run(self, words: Sequence[str], fault: Fault | None = None) -> tuple[Outcome, list[str]]:
        """Run `unionfs` with a fault; returns also its points."""
        return commands.run(self.place, words, fault, modules=_MODULES)

    def prepare(self) -> None:
        """Bring everything into the state before the command, from that of `restore`."""
        if self.scenario.undoes:
            self._commit()

    def restore(self) -> None:
        """Bring everything into the state before the commit, from that after it."""
        if not self.scenario.apart:
            undo(self.branching.store)
            return
        made = self.branching
        shutil.rmtree(made.base)
        shutil.rmtree(made.root / "commits")
        _sh(f"cp -a copy {made.base}; cp -a kept {made.root}/branches/br", self.place)
        record = f"{made.root}/branches/br/branch.json"
        values = {**jsonfiles.read(record), "base_inode": os.stat(made.base).st_ino, "session": 2**62}
        jsonfiles.write(record, values)
        Path(f"{made.root}/branches/br/seen.json").unlink(missing_ok=True)

    def points(self) -> list[str]:
        """The points of the command."""
        self.prepare()
        _, points = self.run(self.scenario.words, Fault(0, 0))
        if not self.scenario.undoes:
            self.restore()
        return points

    # -- a fault --------------------------------------------------------------------------------------------

    def try_fault(self, fault: Fault) -> Iterator[str]:
        """Run the command with a fault, and bring everything into the former state; what does not hold."""
        before, after = (self.new, self.old) if self.scenario.undoes else (self.old, self.new)
        waste = self._waste()
        self.prepare()
        outcome, _ = self.run(self.scenario.words, fault)
        if outcome.code == 0 and waste & self._waste():
            yield f"still there: {waste}"
        if not fault.hit and outcome.code != 0:
            yield f"without a fault: {outcome.text}"
        if fault.hit and fault.error != KILL:
            yield from self._judge(outcome, fault, before, after, self.below())
        if outcome.code != 0:
            again, _ = self.run(self.scenario.words)
            is_done = fault.error == KILL and re.search(_NOTHING_LEFT, again.text) is not None
            if again.code != 0 and not is_done:
                yield f"again: {again.text} (first: {outcome.text})"
                return
        difference = differing(after, self.below())
        if fault.error == KILL and self.scenario.apart:  # before it restored the time of the base
            difference.pop(b".", None)
        if difference:
            yield f"at the end: {_short(difference)} ({outcome.text})"
        yield from self._end(fault)

    def _judge(
        self, outcome: Outcome, fault: Fault, before: Tree, after: Tree, found: Tree
    ) -> Iterator[str]:
        if outcome.code == 0:
            if difference := differing(after, found):
                yield f"success, but {_short(difference)}"
            return
        yield from commands.message(outcome, fault)
        done = re.search(_DONE, outcome.text) is not None
        if done or fault.lasts:
            found, before, after = _at_end(found), _at_end(before), _at_end(after)
        if re.search(_BETWEEN, outcome.text) is not None and fault.lasts:
            return
        if difference := differing(after if done else before, found):
            yield f"{outcome.text.rstrip()} But {_short(difference)}"

    def _end(self, fault: Fault) -> Iterator[str]:
        """Compare what is left with what the command leaves, and restore what was before the commit."""
        expected = self.files_before if self.scenario.undoes else self.files
        if (files := self._files()) != expected:
            yield f"left {[*{*files} - {*expected}]}, missing {[*{*expected} - {*files}]}"
        if not self.scenario.undoes:
            try:
                self.restore()
            except UserError as error:
                yield f"undo: {error}"
                return
        difference = differing(self.old, self.below())
        if fault.hit.startswith("utimensat") or (fault.error == KILL and self.scenario.nested):
            difference.pop(b".", None)  # the time of the directory that has the commit's own is lost
        if difference:
            yield f"undone: {_short(difference)}"
        if not self.scenario.apart and (difference := differing(self.layer, self._layer())):
            yield f"undone, the layer: {_short(difference)}"


def _at_end(found: Tree) -> Tree:
    """A tree without the directory of a commit that has to end, and without links to files of the layer."""
    found = {path: entry for path, entry in found.items() if path != b"." and b".unionfs-" not in path}
    shared = {entry[8] for path, entry in found.items() if entry[8] and entry[8] != path}
    return {
        path: (*entry[:8], entry[8] if entry[8] in shared else b"", *entry[9:])
        for path, entry in found.items()
    }


def _sh(script: str, where: Path) -> None:
    subprocess.run(["sh", "-ec", script], cwd=where, check=True)


def _short(difference: object) -> str:
    return str(difference)[:400]


@contextmanager
def staged(place: Path, scenario: Scenario) -> Iterator[Stage]:
    """A stage in a directory that does not exist, which is removed."""
    stage = Stage(place, scenario)
    try:
        yield stage
    finally:
        stage.close()


def run_all(
    area: Path,
    *,
    scenarios: Sequence[Scenario] = SCENARIOS,
    some: Selection = ALL,
    told: Callable[[str], object] = lambda line: None,
) -> Report:
    """Try all faults, or some."""
    report = Report()
    for scenario in scenarios:
        done, number = Report(), 0
        with staged(area / "points", scenario) as stage:
            points = len(stage.points())
        pending = list(some.of(commands.faults_of(points, lasting=LASTING)))
        while pending:
            number += 1
            with staged(area / f"s{number}", scenario) as stage:
                while pending:
                    fault = pending.pop(0)
                    found = [f"{scenario}: {fault}: {one}" for one in stage.try_fault(fault)]
                    done.tried += bool(fault.hit)
                    done.problems += found
                    for one in found:
                        told(f"  {one}")
                    if found:
                        break  # the next one begins anew
        report.add(done)
        told(f"{scenario}: {points} points, {done.tried} faults, {len(done.problems)} problems")
    return report
