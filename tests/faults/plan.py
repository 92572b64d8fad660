"""Which faults are tried, and a run of them: each point of each operation on each session."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

from tests.faults.batch import ERRORS, LASTING, Batch, Case, Errors, Expected, Kills, Report, count
from tests.faults.deaths import Deaths
from tests.faults.injecting import KILL, Fault
from tests.faults.operations import OPERATIONS, Operation
from tests.support import areas, mounting

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
    tenth: int | None = None,
    told: Callable[[str], object] = lambda line: None,
) -> Report:
    """Try faults of one kind in operations on one session. ``tenth``: only every tenth, from that one on.

    ``told``: called with a line for each batch.
    """
    batches: dict[Kind, type[Batch]] = {"errors": Errors, "kills": Kills, "deaths": Deaths}
    report, numbers, expected = Report(), itertools.count(), Expected(area)
    for options in dict.fromkeys(operation.options for operation in operations):
        same = [operation for operation in operations if operation.options == options]
        cases: list[Case] = []
        counted = count(area / f"n{next(numbers)}", session, same, answers=kind == "deaths")
        for operation, points in zip(same, counted, strict=True):
            faults = errors_of(points) if kind == "errors" else kills_of(points)
            cases += [Case(operation, fault) for fault in faults]
        if tenth is not None:
            cases = cases[tenth % 10 :: 10]
        for some in _batched(cases):
            place = area / f"b{next(numbers)}"
            done = batches[kind](place, session, some, expected).run()
            areas.remove(place)
            report.add(done)
            told(f"{session}: {some[0].operation} to {some[-1].operation}: {done.tried} faults")
    return report


def _batched(cases: Sequence[Case]) -> Iterator[Sequence[Case]]:
    for start in range(0, len(cases), _AT_ONCE):
        yield cases[start : start + _AT_ONCE]
