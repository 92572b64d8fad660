"""A run as a JSON file: saved with all samples, loaded again for reports and comparisons.

Schema 2 has every sample, including the daemons' CPU time and requests, and describes contestants and
workloads, so a file can be read without the program that wrote it. Values that follow from the samples
(median, spread, ratios) are written for other readers, and ignored on loading. Schema 1, which has no
`schema` key and only medians of the daemons, can also be loaded.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from benchmarks.perf.figures import Daemon, Figure, Results

SCHEMA = 2
OVERLAYFS = "overlayfs"

#: What a contestant is: a directory with no union, overlayfs of the kernel, another FUSE union, unionfs.
Kind = Literal["plain", "kernel", "peer", "ours"]
Scalar = str | int | float | bool | None

#: Schema 1 does not record a contestant's kind; these are all it had.
_KINDS_OF_SCHEMA_1: dict[str, Kind] = {
    "plain": "plain", "overlayfs": "kernel", "fuse-overlayfs": "peer", "unionfs-fuse": "peer",
    "hybrid": "ours", "passthrough": "ours", "cached": "ours", "pyfuse3": "ours",
}  # fmt: skip


class BadResults(Exception):
    """The file cannot be used; the text is one sentence with the cause and the cure."""


@dataclass(frozen=True)
class ContestantFacts:
    """A contestant, mounted or missing."""

    name: str
    what: str = ""
    kind: Kind = "peer"
    version: str = ""


@dataclass(frozen=True)
class WorkloadFacts:
    """A workload and its figures."""

    name: str
    group: str
    what: str = ""
    figures: tuple[str, ...] = ()
    operation: str = "entry"
    """What one operation is, in the singular: entry, file, read ..."""
    family: str = ""
    """Workloads of one family share a line of a summary; empty: it has its own line."""


@dataclass
class Run:
    """One run."""

    results: Results
    contestants: list[ContestantFacts]
    """In display order, including missing ones."""
    workloads: list[WorkloadFacts]
    groups: dict[str, str] = field(default_factory=dict)
    """Title by name, in display order."""
    machine: dict[str, Scalar] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    """The options of the run."""
    missing: dict[str, str] = field(default_factory=dict)
    """Contestants that could not mount, and why."""
    complete: bool = True
    """False after an interruption."""
    made: str = ""
    """The start: ISO 8601 with the offset from UTC; empty in schema 1."""
    seconds: float | None = None
    """The duration."""

    def present(self) -> list[ContestantFacts]:
        """Those with at least one sample."""
        names = {name for by_name in self.results.samples.values() for name in by_name}
        return [each for each in self.contestants if each.name in names]

    def named(self, kind: Kind) -> list[str]:
        """Names of all contestants of a kind."""
        return [each.name for each in self.contestants if each.kind == kind]

    def best(self, figure: Figure, names: Sequence[str]) -> str | None:
        """The one with the best median; None if none has one."""
        medians = {name: self.results.median(figure, name) for name in names}
        known = {name: median for name, median in medians.items() if median is not None}
        if not known:
            return None
        return (max if figure.more_is_better else min)(known, key=lambda name: known[name])

    def best_peer(self, figure: Figure) -> str | None:
        """The best FUSE union other than unionfs."""
        return self.best(figure, self.named("peer"))

    def best_ours(self, figure: Figure) -> str | None:
        """The best contestant of unionfs."""
        return self.best(figure, self.named("ours"))

    def round_ratios(self, figure: Figure, name: str, reference: str) -> list[float]:
        """Ratios within the rounds; none if Results.ratio returns None.

        Both have their turns of a round in sequence, so a slow period of the machine affects both: the ratio
        within a round is steadier than its parts. The ratio of medians lies between the smallest and the
        largest of them. If the numbers of samples differ, each sample is divided by the other's median.
        """
        if self.results.ratio(figure, name, reference) is None:
            return []
        own, other = (self.results.samples[figure][each] for each in (name, reference))
        if len(own) != len(other):
            other = [statistics.median(other)] * len(own)
        pairs = [(mine, its) for mine, its in zip(own, other, strict=True) if mine > 0 and its > 0]
        return [mine / its if figure.more_is_better else its / mine for mine, its in pairs]

    def workload_of(self, figure: Figure) -> WorkloadFacts | None:
        """The workload of a figure; None if the file does not say."""
        for workload in self.workloads:
            if workload.group == figure.group and figure.name in workload.figures:
                return workload
        return None


def join(runs: Sequence[Run]) -> Run:
    """Merge runs of different workloads on one machine. Raises BadResults for other runs.

    Every ratio stays within one run, since each figure comes from one of them alone.
    """
    machine: dict[str, Scalar] = {}
    results = Results()
    for run in runs:
        # Files of single benchmarks do not say where the layers are.
        if any(machine.get(name, value) != value for name, value in run.machine.items()):
            raise BadResults("the files are of different machines, whose figures can't stand side by side")
        machine |= run.machine
        for figure, by_name in run.results.samples.items():
            if figure in results.samples:
                raise BadResults(f"more than one of the files has the figure {figure.name}: take one of them")
            results.samples[figure] = by_name
        results.daemons |= run.results.daemons
        results.failures |= run.results.failures
        results.skipped |= run.results.skipped
    took = [run.seconds for run in runs]
    return Run(
        results,
        list({each.name: each for run in runs for each in run.contestants}.values()),
        list({(each.group, each.name): each for run in runs for each in run.workloads}.values()),
        {name: title for run in runs for name, title in run.groups.items()},
        machine,
        {
            name: _together([run.settings[name] for run in runs if name in run.settings])
            for run in runs for name in run.settings
        },
        {name: reason for run in runs for name, reason in run.missing.items()},
        complete=all(run.complete for run in runs),
        made=min(run.made for run in runs),
        seconds=None if None in took else math.fsum(each for each in took if each is not None),
    )


def _together(values: Sequence[object]) -> object:
    """A setting of several runs: the concatenated lists, or differing values side by side."""
    if all(isinstance(value, list) for value in values):
        return [each for value in values if isinstance(value, list) for each in value]
    different = list(dict.fromkeys(map(str, values)))
    return values[0] if len(different) == 1 else ", ".join(different)


# The file's content. msgspec checks types, and reports the place of a wrong one; unknown keys are ignored.


@dataclass
class _Series:
    samples: list[float]


@dataclass
class _Figure:
    group: str
    name: str
    unit: str
    better: Literal["more", "less"]
    contestants: dict[str, _Series]


@dataclass
class _Daemon:
    cpu_ms: float | None = None
    requests: dict[str, int] | None = None
    # since schema 2
    cpu_seconds: list[float] | None = None
    request_samples: list[dict[str, int]] | None = None
    operations: list[float] | None = None


@dataclass
class _Failure:
    workload: str
    contestant: str
    reason: str


@dataclass
class _Skipped:
    workload: str
    contestant: str | None
    reason: str


@dataclass
class _File:
    machine: dict[str, Scalar]
    versions: dict[str, str]
    figures: list[_Figure]
    settings: dict[str, object] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    daemons: dict[str, dict[str, _Daemon]] = field(default_factory=dict)
    failures: list[_Failure] = field(default_factory=list)
    complete: bool = True
    schema: int = 1
    # since schema 2
    made: str = ""
    seconds: float | None = None
    contestants: list[ContestantFacts] = field(default_factory=list)
    workloads: list[WorkloadFacts] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)
    skipped: list[_Skipped] = field(default_factory=list)


def spread(samples: Sequence[float]) -> tuple[float, float]:
    """The minimum and maximum; so few rounds support nothing finer."""
    return min(samples), max(samples)


def load(path: Path) -> Run:
    """A run from a file. Raises BadResults, with a sentence that names the file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadResults(f"{path} can't be read: {error.strerror}") from error
    return parse(content, str(path))


def parse(content: bytes, name: str) -> Run:
    """A run from a file's content; `name` is for the sentences. Raises BadResults."""
    try:
        schema = msgspec.json.decode(content, type=_Schema).schema
        if schema > SCHEMA:
            raise BadResults(
                f"{name} was written by a newer scripts/perf (schema {schema}, and this one knows {SCHEMA}): "
                "use that one, or measure again"
            )
        file = msgspec.json.decode(content, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadResults(f"{name} is no result of scripts/perf --json: {error}") from error
    return _run(file, name)


@dataclass
class _Schema:
    schema: int = 1


def _run(file: _File, name: str) -> Run:
    results = Results()
    for each in file.figures:
        figure = Figure(each.group, each.name, each.unit, more_is_better=each.better == "more")
        if figure in results.samples:
            raise BadResults(f"{name} is damaged: it has the figure {each.name} twice")
        results.samples[figure] = {
            contestant: series.samples for contestant, series in each.contestants.items() if series.samples
        }
    for workload, by_name in file.daemons.items():
        results.daemons[workload] = {contestant: _daemon(told) for contestant, told in by_name.items()}
    results.failures = {(each.workload, each.contestant): each.reason for each in file.failures}
    results.skipped = {(each.workload, each.contestant): each.reason for each in file.skipped}
    return Run(
        results, file.contestants or _contestants(file), file.workloads or _workloads(results),
        file.groups or {figure.group: figure.group for figure in results.samples},
        file.machine, file.settings, file.missing, file.complete, file.made, file.seconds,
    )  # fmt: skip


def _daemon(told: _Daemon) -> Daemon:
    """Load schema 1, with the medians as the only samples."""
    cpu = told.cpu_seconds
    if cpu is None:
        cpu = [] if told.cpu_ms is None else [told.cpu_ms / 1e3]
    requests = told.request_samples
    if requests is None:
        requests = [] if told.requests is None else [told.requests]
    return Daemon(cpu, requests, told.operations or [])


def _contestants(file: _File) -> list[ContestantFacts]:
    return [
        ContestantFacts(name, kind=_KINDS_OF_SCHEMA_1.get(name, "peer"), version=file.versions.get(name, ""))
        for name in {**file.versions, **file.missing}
    ]


def _workloads(results: Results) -> list[WorkloadFacts]:
    """The workloads of schema 1, which has none: a figure's name is, or begins with, its workload's."""
    facts: dict[str, WorkloadFacts] = {}
    for figure in results.samples:
        name = figure.name.removesuffix(" cold").removesuffix(" warm").removesuffix(" write")
        if figure.group == "nodes":
            name = "nodes"
        figures = facts[name].figures if name in facts else ()
        facts[name] = WorkloadFacts(name, figure.group, figures=(*figures, figure.name))
    return list(facts.values())


def to_json(run: Run, references: Sequence[str] = (OVERLAYFS, "fuse-overlayfs")) -> dict[str, object]:
    """The file as values, with ratios to `references`."""
    results = run.results
    figures: list[dict[str, object]] = []
    for figure, by_name in results.samples.items():
        rows: dict[str, object] = {}
        for name, samples in by_name.items():
            low, high = spread(samples)
            ratios = {other: results.ratio(figure, name, other) for other in references}
            peer = run.best_peer(figure)
            rows[name] = {
                "samples": samples, "median": statistics.median(samples), "low": low, "high": high,
                "ratios": ratios, "ratio_to_best_peer": results.ratio(figure, name, peer) if peer else None,
            }  # fmt: skip
        figures.append({
            "group": figure.group, "name": figure.name, "unit": figure.unit,
            "better": "more" if figure.more_is_better else "less", "best_peer": run.best_peer(figure),
            "contestants": rows,
        })  # fmt: skip
    return {
        "schema": SCHEMA,
        "made": run.made,
        "seconds": run.seconds,
        "complete": run.complete,
        "machine": run.machine,
        "settings": run.settings,
        "contestants": [msgspec.to_builtins(each) for each in run.contestants],
        "versions": {each.name: each.version for each in run.contestants if each.name not in run.missing},
        "missing": run.missing,
        "groups": run.groups,
        "workloads": [msgspec.to_builtins(each) for each in run.workloads],
        "figures": figures,
        "daemons": {
            workload: {name: _daemon_json(daemon) for name, daemon in by_name.items()}
            for workload, by_name in results.daemons.items()
        },
        "failures": [
            {"workload": workload, "contestant": name, "reason": reason}
            for (workload, name), reason in results.failures.items()
        ],
        "skipped": [
            {"workload": workload, "contestant": name, "reason": reason}
            for (workload, name), reason in results.skipped.items()
        ],
    }


def _daemon_json(daemon: Daemon) -> Mapping[str, object]:
    return {
        "cpu_ms": daemon.milliseconds() if daemon.cpu_seconds else None,
        "cpu_us_per_request": daemon.microseconds_each(),
        "requests": daemon.request_medians() if daemon.requests else None,
        "requests_per_operation": daemon.requests_each(),
        "cpu_seconds": daemon.cpu_seconds,
        "request_samples": daemon.requests,
        "operations": daemon.operations,
    }


def dumps(run: Run) -> str:
    """The file's text."""
    return json.dumps(to_json(run), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def save(run: Run, path: Path) -> None:
    """Write the file. Raises OSError."""
    path.write_text(dumps(run), encoding="utf-8")
