"""Runs that nobody measured, for tests of what is made of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.perf.figures import Figure, Results
from benchmarks.perf.results import ContestantFacts, Run, WorkloadFacts

UNTAR = Figure("metadata", "untar", "ms")
READ = Figure("fio", "lower-seqread cold", "MiB/s", more_is_better=True)


def run_of(
    samples: Mapping[Figure, Mapping[str, Sequence[float]]],
    *,
    requests: Sequence[Mapping[str, int]] = (),
    operations: Sequence[float] = (),
    **more: object,
) -> Run:
    """A run with these samples; `requests` and `operations` are those of `hybrid` in untar."""
    results = Results()
    for figure, by_name in samples.items():
        for name, values in by_name.items():
            for value in values:
                results.add(figure, name, value)
    for index, sample in enumerate(requests):
        results.add_daemon(
            "untar", "hybrid", 0.25, dict(sample), operations[index] if index < len(operations) else None
        )
    run = Run(
        results,
        [
            ContestantFacts("plain", "no union", "plain", "6.18"),
            ContestantFacts("overlayfs", "the kernel's", "kernel", "6.18"),
            ContestantFacts("fuse-overlayfs", "a peer", "peer", "1.10"),
            ContestantFacts("mergerfs", "another peer", "peer", "2.33"),
            ContestantFacts("hybrid", "ours", "ours", "0.1"),
            ContestantFacts("cached", "ours, too", "ours", "0.1"),
        ],
        [
            WorkloadFacts("untar", "metadata", "tar -x", ("untar",), "entry"),
            WorkloadFacts("lower-seqread", "fio", "fio", ("lower-seqread cold",), "read", "lower-read"),
        ],
        {"fio": "Throughput", "metadata": "Names"},
        {"kernel": "6.18", "cpus": 2, "cpu": "a CPU", "python": "3.11"},
        {"rounds": 3},
        made="2026-01-02T03:04:05+00:00",
        seconds=90.0,
    )
    vars(run).update(more)
    return run
