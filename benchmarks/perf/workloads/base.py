"""A workload, and a contestant's turn at it.

Each turn has a fresh mount with an empty upper, so everything starts cold. This process itself never accesses
a mount: a hung daemon would hang it, too. The processes that it starts can be killed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.perf.area import Area
from benchmarks.perf.contestants import Contestant, Layers, Mount
from benchmarks.perf.figures import Figure, Results
from benchmarks.perf.parts import Sizes
from benchmarks.perf.processes import CommandFailed, cpu_seconds, run


@dataclass(frozen=True)
class Turn:
    """One contestant's turn at one workload."""

    area: Area
    mount: Mount
    seconds: float

    @property
    def sizes(self) -> Sizes:
        """The sizes of everything."""
        return self.area.sizes


@dataclass(frozen=True)
class Measured:
    """A value for each of a workload's figures by name, and the number of operations."""

    values: Mapping[str, float]
    operations: float


def never(_area: Area) -> None:
    """For workloads that run everywhere."""


@dataclass(frozen=True)
class Workload:
    """Something to measure."""

    name: str
    group: str
    what: str
    figures: tuple[Figure, ...]
    measure: Callable[[Turn], Measured]
    operation: str = "entry"
    """The repeated operation, for the number of requests per operation."""
    family: str = ""
    """Those of one family share a line of a summary."""
    lower: tuple[str, ...] = ()
    """The parts of the lower that are used."""
    upper: tuple[str, ...] = ()
    """The parts that are copied into the upper, as upper-NAME."""
    writes: bool = True
    """Whether something in the merged tree is changed."""
    once: bool = False
    """Long and steady, so that one round is enough."""
    stacked: bool = False
    """Over the many lowers instead of one."""
    quick: bool = False
    """Part of --quick."""
    unless: Callable[[Area], str | None] = never
    """Why it cannot run here."""
    daemons_only: bool = False
    unions_only: bool = False

    def parts(self) -> set[str]:
        """The parts to create for it."""
        return {*self.lower, *self.upper, *(["lowers"] if self.stacked else [])}

    def reason_against(self, contestant: Contestant) -> str | None:
        """Why there is nothing to measure on a contestant; None if there is."""
        if contestant.is_plain and (self.unions_only or self.stacked):
            return "a plain directory is not a union"
        if self.daemons_only and contestant.command is None:
            return "it has no daemon"
        if self.writes and not contestant.copies_up:
            return "it has no copy-up"
        return None

    def take_turn(self, contestant: Contestant, area: Area, seconds: float, results: Results | None) -> None:
        """Mount, measure, unmount. Raises CommandFailed, and OSError of a mount that fails.

        Without `results` it is a warm-up turn.
        """
        for part in self.lower:
            area.need(part)
        reads_only = not self.writes and not self.upper
        with area.layers(stacked=self.stacked) as layers:
            self._fill(contestant, area, layers, reads_only)
            with contestant.mounted(layers, reads_only=reads_only) as mount:
                before = None if mount.pid is None else cpu_seconds(mount.pid)
                measured = self.measure(Turn(area, mount, seconds))
                if results is None:
                    return
                if mount.pid is not None and before is not None:
                    cpu = cpu_seconds(mount.pid) - before
                    try:
                        figures = mount.figures()
                    except (CommandFailed, ValueError) as error:
                        # keep what was measured
                        results.failures["counting requests", contestant.name] = str(error)
                        figures = None
                    requests = None if figures is None else figures.requests
                    results.add_daemon(self.name, contestant.name, cpu, requests, measured.operations)
                for figure in self.figures:
                    if figure.name in measured.values:
                        results.add(figure, contestant.name, measured.values[figure.name])

    def _fill(self, contestant: Contestant, area: Area, layers: Layers, reads_only: bool) -> None:
        upper = layers.merged if contestant.is_plain else layers.upper
        for part in self.upper:
            area.put(part, upper, f"upper-{part}")
        if contestant.is_plain and not reads_only:
            for part in self.lower:
                area.put(part, layers.merged, part)


def timed(
    name: str,
    group: str,
    what: str,
    command: Callable[[Turn], Sequence[str]],
    operations: Callable[[Sizes], int],
    *,
    operation: str = "entry",
    lower: tuple[str, ...] = ("tree",),
    lines: Callable[[Sizes], int] | None = None,
    check: str = "true",
    environment: Callable[[Turn], Mapping[str, str]] = lambda _turn: {},
    writes: bool = True,
    stacked: bool = False,
    quick: bool = False,
    unions_only: bool = False,
    unless: Callable[[Area], str | None] = never,
) -> Workload:
    """A command in the merged directory that prints `lines` lines; `check` is a shell test of its work."""

    def measure(turn: Turn) -> Measured:
        words = command(turn)
        done = run(words, cwd=turn.mount.merged, environment=environment(turn))
        program = os.path.basename(words[0])
        printed = done.output.count("\n")
        if lines is not None and printed != lines(turn.sizes):
            raise CommandFailed(f"{program} printed {printed} lines instead of {lines(turn.sizes)}")
        try:
            run(["sh", "-c", check], cwd=turn.mount.merged)
        except CommandFailed as error:
            raise CommandFailed(f"after {program} this check fails: {check}") from error
        return Measured({name: done.seconds * 1e3}, operations(turn.sizes))

    return Workload(
        name, group, what, (Figure(group, name, "ms"),), measure, operation=operation, lower=lower,
        writes=writes, stacked=stacked, quick=quick, unions_only=unions_only, unless=unless,
    )  # fmt: skip


def one_byte(path: str) -> list[str]:
    """The command that writes one byte at the start of a file, which copies it up."""
    return ["dd", "if=/dev/zero", f"of={path}", "bs=1", "count=1", "conv=notrunc", "status=none"]
