"""The figures of one benchmark as a file of `scripts/perf --json`, for `scripts/perf report`.

Such files are of one group each, whose title names the filesystem: so those of several filesystems, and of
`scripts/perf` itself, can be on one page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from benchmarks.perf import host
from benchmarks.perf.figures import Figure, Results
from benchmarks.perf.results import ContestantFacts, Run, Scalar, WorkloadFacts, save

Samples = Mapping[tuple[str, str], Mapping[str, Sequence[float]]]
"""By the name of a figure and its unit, of which less is better: the samples of each contestant."""


def write(
    path: Path,
    group: str,
    title: str,
    contestants: Sequence[ContestantFacts],
    workloads: Mapping[str, str],
    samples: Samples,
    *,
    failures: Mapping[tuple[str, str], str] = {},
    settings: Mapping[str, object] = {},
) -> None:
    """Write the file. `workloads`: what each does, by the name of its figure. `failures`: why, by figure and
    contestant. Raises OSError.
    """
    results = Results()
    for (name, unit), by_name in samples.items():
        for contestant, values in by_name.items():
            for value in values:
                results.add(Figure(group, name, unit), contestant, value)
    results.failures = dict(failures)
    facts = [WorkloadFacts(name, group, what, (name,)) for name, what in workloads.items()]
    made = datetime.now().astimezone().isoformat(timespec="seconds")
    save(
        Run(
            results, list(contestants), facts, {group: title}, machine(), dict(settings), made=made,
        ),
        path,
    )  # fmt: skip


def machine() -> dict[str, Scalar]:
    """Facts of the host; not where the layers are, which is a group's."""
    found = host.machine(Path(), "")
    return {name: value for name, value in found.items() if name not in ("layers", "filesystem")}
