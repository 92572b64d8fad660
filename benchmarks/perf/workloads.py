"""Everything that is measured. Each turn has a mount of its own with an empty upper, so all begins cold.

This process itself never looks into a mount: a daemon that hangs would take it along. What it starts can be
killed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.perf import fio
from benchmarks.perf.area import (
    GIT_ENVIRONMENT,
    REPO_FILES,
    SMALL_FILES,
    TREE_DIRECTORIES,
    TREE_FILES,
    WORD,
    Area,
)
from benchmarks.perf.contestants import Contestant, Layers, Mount
from benchmarks.perf.figures import Figure, Results
from benchmarks.perf.processes import CommandFailed, cpu_seconds, resident_bytes, run

_TREE_ENTRIES = TREE_DIRECTORIES + TREE_FILES
_PASSES_MILLISECONDS = 300


@dataclass(frozen=True)
class Turn:
    """One contestant's turn at one workload."""

    area: Area
    mount: Mount
    seconds: float


@dataclass(frozen=True)
class Workload:
    """Something to measure; `measure` gives a value for each of the figures, by name."""

    name: str
    group: str
    what: str
    figures: tuple[Figure, ...]
    measure: Callable[[Turn], Mapping[str, float]]
    lower: tuple[str, ...] = ()
    """The parts of the lower that are used."""
    upper: tuple[str, ...] = ()
    """The parts of which there is a copy in the upper, as upper-NAME."""
    entries: int = 1
    """What its operation works on, for the number of requests an entry."""
    once: bool = False
    """Long and steady, so that one round is enough; for daemons alone."""

    def suits(self, contestant: Contestant) -> bool:
        """Whether it measures anything there."""
        return not self.once or contestant.command is not None

    def take_turn(self, contestant: Contestant, area: Area, seconds: float, results: Results) -> None:
        """Mount, measure, unmount. Raises CommandFailed, and OSError of a mount that fails."""
        for part in self.lower:
            area.need(part)
        with area.layers() as layers:
            self._fill(contestant, area, layers)
            with contestant.mounted(layers) as mount:
                before = None if mount.pid is None else cpu_seconds(mount.pid)
                values = self.measure(Turn(area, mount, seconds))
                if mount.pid is not None and before is not None:
                    cpu = cpu_seconds(mount.pid) - before
                    try:
                        figures = mount.figures()
                    except (CommandFailed, ValueError) as error:
                        # what was measured counts nevertheless
                        results.failures["counting requests", contestant.name] = str(error)
                        figures = None
                    requests = None if figures is None else figures.requests
                    results.add_daemon(self.name, contestant.name, cpu, requests)
                for figure in self.figures:
                    if figure.name in values:
                        results.add(figure, contestant.name, values[figure.name])

    def _fill(self, contestant: Contestant, area: Area, layers: Layers) -> None:
        upper = layers.merged if contestant.is_plain else layers.upper
        for part in self.upper:
            area.put(part, upper, f"upper-{part}")
        if contestant.is_plain:
            for part in self.lower:
                if part == "big":
                    area.link(part, layers.merged)
                else:
                    area.put(part, layers.merged, part)


def _fio(layer: str, kind: fio.Kind) -> Workload:
    name = f"{layer}-{kind.name}"
    unit = "k/s" if kind.is_random else "MiB/s"
    temperatures = ("write",) if kind.is_write else ("cold", "warm")
    names = {each: name if kind.is_write else f"{name} {each}" for each in temperatures}

    def measure(turn: Turn) -> Mapping[str, float]:
        file = turn.mount.merged / ("big" if layer == "lower" else "upper-big")
        values = fio.measure(file, turn.area.megabytes << 20, kind, turn.seconds)
        return {names[job]: value for job, value in values.items()}

    return Workload(
        name, "fio", f"fio: {kind.pattern} of {kind.block} by {kind.engine}, a file of the {layer}",
        tuple(Figure("fio", each, unit, more_is_better=True) for each in names.values()), measure,
        lower=("big",) if layer == "lower" else (), upper=("big",) if layer == "upper" else (),
    )  # fmt: skip


def _opens(layer: str) -> Workload:
    name = f"{layer}-open-read-close"

    def measure(turn: Turn) -> Mapping[str, float]:
        directory = turn.mount.merged / ("small" if layer == "lower" else "upper-small")
        helper = str(turn.area.helper())
        done = run([helper, "read", str(directory), str(SMALL_FILES), str(_PASSES_MILLISECONDS)])
        return {name: float(done.output) / 1e3}

    return Workload(
        name, "files", f"open, read and close each of {SMALL_FILES} cached files of the {layer}",
        (Figure("files", name, "µs each"),), measure,
        lower=("small",) if layer == "lower" else (), upper=("small",) if layer == "upper" else (),
    )  # fmt: skip


def _timed(
    name: str,
    what: str,
    command: Callable[[Turn], Sequence[str]],
    *,
    lower: tuple[str, ...] = ("tree",),
    entries: int = _TREE_ENTRIES,
    lines: int | None = None,
    check: str = "true",
) -> Workload:
    """A command in the merged directory that prints so many `lines`; `check` is a shell test of its work."""

    def measure(turn: Turn) -> Mapping[str, float]:
        words = command(turn)
        done = run(words, cwd=turn.mount.merged, environment=GIT_ENVIRONMENT)
        if lines is not None and done.output.count("\n") != lines:
            raise CommandFailed(f"{words[0]} printed {done.output.count(chr(10))} lines instead of {lines}")
        try:
            run(["sh", "-c", check], cwd=turn.mount.merged)
        except CommandFailed as error:
            raise CommandFailed(f"after {words[0]} this does not hold: {check}") from error
        return {name: done.seconds * 1e3}

    return Workload(
        name, "metadata", what, (Figure("metadata", name, "ms"),), measure, lower=lower, entries=entries
    )


def _metadata() -> tuple[Workload, ...]:
    return (
        _timed("find", "find, which asks for no attributes", lambda turn: ["find", "tree"],
               lines=_TREE_ENTRIES),
        _timed("du", "du -s", lambda turn: ["du", "-s", "tree"]),
        _timed("grep", "grep -r for a word", lambda turn: ["grep", "-r", WORD, "tree"],
               lines=TREE_FILES // 10),
        _timed("git-status", "git status, nothing changed",
               lambda turn: ["git", "-c", "safe.directory=*", "-C", "repo", "status", "--short"],
               lower=("repo",), entries=REPO_FILES, lines=0),
        _timed("untar", f"tar -x of {_TREE_ENTRIES} entries",
               lambda turn: ["tar", "-xf", str(turn.area.archive())],
               lower=(), check="[ -s tree/file0000.txt ]"),
        _timed("create", f"make {SMALL_FILES} files of 1 KiB",
               lambda turn: [str(turn.area.helper()), "create", "new", str(SMALL_FILES)],
               lower=(), entries=SMALL_FILES),
        _timed("chmod", "chmod -R, which copies every file up", lambda turn: ["chmod", "-R", "o-r", "tree"],
               check="[ $(stat -c %a tree/file0000.txt) = 640 ]"),
        _timed("rm", "rm -rf of a tree of the lower", lambda turn: ["rm", "-rf", "tree"],
               check="[ ! -e tree ]"),
    )  # fmt: skip


def _nodes(entries: int) -> Workload:
    growth, duration = "memory an inode", f"find -size, {entries:,} entries"

    def measure(turn: Turn) -> Mapping[str, float]:
        pid = turn.mount.pid
        assert pid is not None
        run(["ls"], cwd=turn.mount.merged)
        before = resident_bytes(pid)
        # A test of the size makes find ask for every entry's attributes, so that each becomes known.
        done = run(["find", "many", "-size", "+9"], cwd=turn.mount.merged)
        grown = resident_bytes(pid) - before
        figures = turn.mount.figures()
        known = entries if figures is None or not figures.nodes else figures.nodes
        return {growth: grown / known, duration: done.seconds * 1e3}

    return Workload(
        "nodes", "nodes", f"memory of the node table, find over {entries:,} entries; one round",
        (Figure("nodes", growth, "bytes"), Figure("nodes", duration, "ms")), measure,
        lower=("many",), entries=entries, once=True,
    )  # fmt: skip


def all_workloads(entries: int) -> tuple[Workload, ...]:
    """Everything, in the order in which it is measured. `entries`: those of the large tree."""
    reads = [kind for kind in fio.KINDS if not kind.is_write]
    return (
        *(_fio("lower", kind) for kind in reads),
        *(_fio("upper", kind) for kind in fio.KINDS),
        _opens("lower"),
        _opens("upper"),
        *_metadata(),
        _nodes(entries),
    )
