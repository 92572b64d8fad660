"""Everything that is measured.

base        a workload, and a turn at one
files       fio, and opening small files
metadata    trees of names and attributes
programs    a database, a build, imports, npm
scale       large files, many lowers, huge directories
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from benchmarks.perf.workloads.base import Measured, Turn, Workload
from benchmarks.perf.workloads.files import matrix, opens, throughput
from benchmarks.perf.workloads.metadata import metadata
from benchmarks.perf.workloads.programs import programs
from benchmarks.perf.workloads.scale import scale

__all__ = ["GROUPS", "Measured", "Turn", "Workload", "all_workloads", "chosen"]

#: Titles, in display order.
GROUPS = {
    "fio": "Throughput",
    "fio-matrix": "Throughput, all other combinations",
    "files": "Small cached files",
    "metadata": "Metadata, cold",
    "programs": "Programs",
    "scale": "What grows",
    "nodes": "A large tree",
}

#: Only measured on request.
MATRIX = "fio-matrix"


def all_workloads(entries: int) -> tuple[Workload, ...]:
    """Everything, in the order of measurement. `entries`: those of the large tree."""
    return (*throughput(), *matrix(), *opens(), *metadata(), *programs(), *scale(entries))


def chosen(
    workloads: Sequence[Workload], patterns: Sequence[str], *, quick: bool = False, full: bool = False
) -> list[Workload]:
    """Those whose name or group matches one of the patterns (fnmatch); without patterns, the default ones.

    Raises ValueError with a pattern that matches nothing.
    """
    if not patterns:
        if quick:
            return [each for each in workloads if each.quick]
        return [each for each in workloads if full or each.group != MATRIX]
    for pattern in patterns:
        if not any(_fits(each, pattern) for each in workloads):
            raise ValueError(pattern)
    return [each for each in workloads if any(_fits(each, pattern) for pattern in patterns)]


def _fits(workload: Workload, pattern: str) -> bool:
    return fnmatchcase(workload.name, pattern) or fnmatchcase(workload.group, pattern)
