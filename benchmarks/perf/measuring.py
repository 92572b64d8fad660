"""The run itself: which contestants can mount, warming up, and all turns in all rounds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.perf.area import Area
from benchmarks.perf.contestants import Contestant
from benchmarks.perf.figures import Results
from benchmarks.perf.processes import CommandFailed
from benchmarks.perf.workloads import Workload

#: What a turn may raise; ValueError if a program prints unexpected output.
_FAILURES = (CommandFailed, OSError, ValueError)
#: Called with a text before each turn, and with nothing after it.
Say = Callable[[str | None], None]


@contextmanager
def progress(total: int) -> Iterator[Say]:
    """A progress bar of the turns on standard error; nothing if that is not a terminal."""
    if not (sys.stderr.isatty() and sys.stdout.isatty()):
        yield lambda _text: None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    # Drawn once a second: on few CPUs more would be measured along.
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=1) as bar:
        task = bar.add_task("", total=total)

        def say(text: str | None) -> None:
            if text is None:
                bar.advance(task)
            else:
                bar.update(task, description=text)

        yield say


def try_all(
    contestants: Sequence[Contestant], area: Area, versions: dict[str, str], missing: dict[str, str]
) -> None:
    """Mount each once: the versions of those that can, the reasons of the others."""
    for contestant in contestants:
        try:
            version = contestant.version()
            with area.layers() as layers, contestant.mounted(layers):
                pass
            versions[contestant.name] = version
        except (CommandFailed, OSError) as error:
            missing[contestant.name] = str(error)


def turns(workloads: Sequence[Workload], contestants: Sequence[Contestant], rounds: int) -> int:
    """The number of turns, including the warm-up."""
    total = 0
    for workload in workloads:
        suitable = sum(workload.reason_against(contestant) is None for contestant in contestants)
        total += suitable * (1 if workload.once else rounds)
        total += suitable > 0 and not workload.once
    return total


def measure(
    workloads: Sequence[Workload],
    contestants: Sequence[Contestant],
    area: Area,
    rounds: int,
    seconds: float,
    results: Results,
    say: Say,
) -> None:
    """Run all rounds. All contestants run a workload in sequence, each time in another order."""
    for number in range(rounds):
        for index, workload in enumerate(workloads):
            if workload.once and number > 0:
                continue
            suitable = _suitable(workload, contestants, area, results)
            if not suitable:
                continue
            if number == 0 and not workload.once:
                _warm_up(workload, suitable[0], area, seconds, say)
            shift = (number + index) % len(suitable)
            for contestant in (*suitable[shift:], *suitable[:shift]):
                say(f"round {number + 1} of {rounds}: {workload.name} on {contestant.name}")
                if (workload.name, contestant.name) not in results.failures:
                    try:
                        workload.take_turn(contestant, area, seconds, results)
                    except _FAILURES as error:
                        results.failures[workload.name, contestant.name] = str(error)
                say(None)


def _suitable(
    workload: Workload, contestants: Sequence[Contestant], area: Area, results: Results
) -> list[Contestant]:
    nobody = workload.unless(area)
    if nobody is not None:
        results.skipped[workload.name, None] = nobody
        return []
    suitable = []
    for contestant in contestants:
        reason = workload.reason_against(contestant)
        if reason is None:
            suitable.append(contestant)
        else:
            results.skipped[workload.name, contestant.name] = reason
    return suitable


def _warm_up(workload: Workload, contestant: Contestant, area: Area, seconds: float, say: Say) -> None:
    """Run a turn that does not count: it creates the parts, and loads programs and layers into memory."""
    say(f"warming up: {workload.name}")
    with suppress(*_FAILURES):  # the turns that count will report it
        workload.take_turn(contestant, area, seconds, None)
    say(None)
