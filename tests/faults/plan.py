"""Which faults are tried, and a run of them: each point of each operation on each session."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar

from tests.faults.batch import (
    ERRORS,
    LASTING,
    Batch,
    Case,
    Errors,
    Expected,
    Kills,
    Layers,
    Report,
    settle,
    wait_announced,
)
from tests.faults.deaths import Deaths
from tests.faults.injecting import KILL, Fault, Injector
from tests.faults.operations import OPERATIONS, Operation
from tests.support import areas, mounting
from tests.support.mounting import Mount

SESSIONS: Final = [
    *mounting.SESSIONS, "direct-hybrid" + mounting.STEPS, "pyfuse3" + mounting.STEPS,
    "direct-hybrid" + mounting.PLAIN,
]  # fmt: skip
"""Those of all mount tests, two without bundles, which hide the steps that follow them, and one without
shortcuts, where threads make the calls on lowers."""

OUTLIVING: Final = ["direct-hybrid", "direct-passthrough", "direct-cached", "direct-hybrid" + mounting.PLAIN]
"""Those whose mounts may outlive their daemons."""

Kind = Literal["errors", "kills", "deaths"]
"""Errors of system calls, kills of the daemon, and kills of a daemon whose mount outlives it."""
KINDS: Final[tuple[Kind, ...]] = ("errors", "kills", "deaths")

Tried = TypeVar("Tried", Case, Fault)


@dataclass(frozen=True)
class Selection:
    """Some of all faults: one of ``every``, from the ``first``-th on, and only those ``errors``."""

    first: int | None = None
    every: int = 10
    errors: tuple[int, ...] = ()

    def of(self, faults: Sequence[Tried]) -> Sequence[Tried]:
        """Those of them that are tried."""
        found = [one for one in faults if not self.errors or _fault(one).error in self.errors]
        return found if self.first is None else found[self.first % self.every :: self.every]


def _fault(one: Case | Fault) -> Fault:
    return one if isinstance(one, Fault) else one.fault


ALL: Final = Selection()

_AT_ONCE: Final = 400
"""Cases of one union."""
_MORE: Final = 4
"""Points after an error that there are not without one: a change is undone, or made in another way."""


def errors_of(points: int) -> Iterator[Fault]:
    """Each errno at each point; the lasting ones also from there on."""
    for number in range(1, points + _MORE + 1):
        yield from (Fault(number, error) for error in ERRORS)
        yield from (Fault(number, error, lasts=True) for error in LASTING)


def kills_of(points: int) -> Iterator[Fault]:
    """A kill at each point."""
    return (Fault(number, KILL) for number in range(1, points + 1))


def run(
    area: Path,
    session: str,
    *,
    operations: Sequence[Operation] = OPERATIONS,
    kind: Kind = "errors",
    some: Selection = ALL,
    told: Callable[[str], object] = lambda line: None,
) -> Report:
    """Try faults of one kind in operations on one session. ``told``: called with a line for each batch."""
    batches: dict[Kind, type[Batch]] = {"errors": Errors, "kills": Kills, "deaths": Deaths}
    report, numbers, expected = Report(), itertools.count(), Expected(area)
    operations = [operation for operation in operations if _has(session, operation)]
    for options in dict.fromkeys(operation.options for operation in operations):
        same = [operation for operation in operations if operation.options == options]
        cases: list[Case] = []
        counted = _counts(area / f"n{next(numbers)}", session, same, answers=kind == "deaths")
        for operation, points in zip(same, counted, strict=True):
            faults = errors_of(points) if kind == "errors" else kills_of(points)
            cases += [Case(operation, fault) for fault in faults]
        for batch in _batched(some.of(cases)):
            place = area / f"b{next(numbers)}"
            done = batches[kind](place, session, batch, expected).run()
            areas.remove(place)
            report.add(done)
            told(f"{session}: {batch[0].operation} to {batch[-1].operation}: {done.tried} faults")
            for problem in done.problems:
                told(f"  {problem}")
    return report


def _has(session: str, operation: Operation) -> bool:
    """Whether the session offers the operation: pyfuse3 knows no TMPFILE."""
    return operation.name != "tmpfile" or not session.startswith("pyfuse3")


def _batched(cases: Sequence[Case]) -> Iterator[Sequence[Case]]:
    for start in range(0, len(cases), _AT_ONCE):
        yield cases[start : start + _AT_ONCE]


def _counts(
    place: Path, session: str, operations: Sequence[Operation], *, answers: bool = False
) -> list[int]:
    """How many points each operation has without a fault. All have the same options. ``answers``: as of
    `Injector`."""
    layers = Layers(place)
    for index, operation in enumerate(operations):
        layers.add(operation, f"c{index:04d}")
    layers.finish()
    with mounting.mounted(
        place, lowers=[layers.lower], upper=layers.upper, work=layers.work, session=session,
        options=("index=on", *operations[0].options),
    ) as mount:  # fmt: skip
        wait_announced(mount)
        with Injector(mount.pid, answers=answers) as injector:
            counts = [
                _count(operation, f"{mount.mountpoint}/c{index:04d}", mount, injector)
                for index, operation in enumerate(operations)
            ]
    areas.remove(place)
    return counts


def _count(operation: Operation, top: str, mount: Mount, injector: Injector) -> int:
    injector.arm()
    operation.act(top)
    settle(mount)
    return sum(not point.startswith("fstatfs") for point in injector.disarm())
