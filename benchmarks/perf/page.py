"""The HTML report of a run: one self-contained file with plots, tables and the data itself.

It has no scripts, and its Content-Security-Policy allows nothing to be loaded: text from the results (names,
messages of programs) is escaped, and would be harmless if it were not.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from benchmarks.perf import plots
from benchmarks.perf.figures import Daemon, Figure, geometric_mean, shown
from benchmarks.perf.results import OVERLAYFS, ContestantFacts, Run, WorkloadFacts, spread, to_json

_TEMPLATES = Path(__file__).parent / "templates"
_PALETTE = 6
"""The number of colours and shapes for unionfs, and for the others."""
_KNOWN_OURS = ("hybrid", "passthrough", "cached", "pyfuse3")
_KNOWN_OTHERS = ("plain", "overlayfs", "fuse-overlayfs", "unionfs-fuse", "mergerfs")
_PARTS = 9
"""The number of request kinds with their own colour; all others share one more."""
#: A ratio above this (or below its inverse) counts as a difference; smaller ones are the machine's.
_ALIKE = 1.05
#: Printed for a missing value.
NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """A contestant's value of one figure."""

    median: str
    spread: str
    ratios: tuple[str, ...]
    """To kernel overlayfs and to the best peer; `-` if missing. Empty if neither has the figure."""
    leads: bool
    """Whether no other union is better."""


@dataclass(frozen=True)
class Line:
    """A line of a table."""

    name: str
    unit: str
    what: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Section:
    """A group of workloads."""

    anchor: str
    title: str
    plot: plots.Plot | None
    plot_label: str
    """What the ratios of the plot are to; empty: it has the medians."""
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    whats: tuple[tuple[str, str], ...]
    """Workloads and their descriptions."""


@dataclass(frozen=True)
class Tile:
    """A sentence of the summary with its number."""

    number: str
    words: str
    detail: str


@dataclass(frozen=True)
class Means:
    """A contestant's geometric means of the ratios to one reference, one per group."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """A workload's cost in one daemon."""

    workload: str
    operation: str
    contestant: str
    per_operation: str
    requests: str
    kinds: str
    cpu: str
    each: str


def render(run: Run, *, name: str = "") -> str:
    """The page. `name` of the file of results is for the download."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    view = _View(run)
    return environment.get_template("report.html").render(
        view=view, run=run, styles=Markup(environment.loader and (_TEMPLATES / "report.css").read_text()),
        data=base64.b64encode(json.dumps(to_json(run), ensure_ascii=False).encode()).decode("ascii"),
        file_name=Path(name).name or "results.json",
    )  # fmt: skip


class _View:
    """The template's values."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.results = run.results
        order = ("kernel", "ours", "peer", "plain")  # the most important first, for small screens
        self.present = sorted(run.present(), key=lambda each: order.index(each.kind))
        self.styles = _styles(run.contestants)
        # drawn once in the page, and used next to every name
        self.markers = [Markup(plots.swatch(style)) for style in self.styles.values()]
        self.swatches = {
            name: Markup('<svg class="swatch" viewBox="0 0 12 12" aria-hidden="true">'
                         '<use href="#marker-{}"/></svg>').format(number)
            for number, name in enumerate(self.styles)
        }  # fmt: skip
        names = {each.name for each in self.present}
        self.overlayfs = OVERLAYFS if OVERLAYFS in names else None
        self.ours = [each.name for each in self.present if each.kind == "ours"]
        self.peers = [each.name for each in self.present if each.kind == "peer"]
        self.figures = list(run.results.samples)

    # The summary

    def _best(self, reference: Mapping[Figure, str]) -> dict[Figure, float]:
        """By figure the ratio of the best contestant of unionfs to the reference."""
        found = {}
        for figure, other in reference.items():
            mine = self.run.best_ours(figure)
            ratio = self.results.ratio(figure, mine, other) if mine else None
            if ratio is not None:
                found[figure] = ratio
        return found

    def _references(self) -> list[tuple[str, dict[Figure, str]]]:
        """What unionfs is compared with: a label, and by figure the contestant."""
        found = []
        if self.overlayfs:
            found.append(("kernel overlayfs", dict.fromkeys(self.figures, self.overlayfs)))
        if self.peers:
            best = {figure: peer for figure in self.figures if (peer := self.run.best_peer(figure))}
            found.append(("the best other FUSE union", best))
        return found

    def tiles(self) -> list[Tile]:
        """How often unionfs at its best matches the others, and by how much."""
        tiles = []
        for words, reference in self._references():
            ratios = list(self._best(reference).values())
            mean = geometric_mean(ratios)
            if mean is None:
                continue
            better = sum(ratio >= _ALIKE for ratio in ratios)
            alike = sum(1 / _ALIKE < ratio < _ALIKE for ratio in ratios)
            tiles.append(Tile(
                times(mean), f"of {words}",
                f"better in {better}, within 5 % in {alike}, worse in {len(ratios) - better - alike} "
                f"of {len(ratios)} figures",
            ))  # fmt: skip
        return tiles

    def means(self) -> list[tuple[str, list[Means]]]:
        """For each reference the table of geometric means; the first value is the overall mean."""
        tables = []
        for words, reference in self._references():
            rows = []
            for each in self.present:
                if each.kind in ("ours", "peer") or (each.kind == "plain" and self.overlayfs):
                    values = [self._mean(each.name, reference, group) for group in (None, *self.groups())]
                    if values[0] != NONE:
                        rows.append(Means(each.name, tuple(values)))
            tables.append((words, rows))
        return tables

    def _mean(self, name: str, reference: Mapping[Figure, str], group: str | None) -> str:
        ratios = [
            ratio
            for figure, other in reference.items()
            if group in (None, figure.group)
            and (ratio := self.results.ratio(figure, name, other)) is not None
        ]
        mean = geometric_mean(ratios)
        return NONE if mean is None else times(mean)

    def groups(self) -> list[str]:
        """The names, in order, of contestants with figures."""
        there = dict.fromkeys(figure.group for figure in self.figures)
        return [*(name for name in self.run.groups if name in there),
                *(name for name in there if name not in self.run.groups)]  # fmt: skip

    def title(self, group: str) -> str:
        """A group's heading."""
        return self.run.groups.get(group) or group

    def summary(self) -> list[tuple[str, str, plots.Plot, list[str]]]:
        """The plots of all workloads: title, alternative text, plot, and its contestants."""
        found = []
        for words, reference in self._references():
            names = list(self.ours)
            if words == "kernel overlayfs" and self.peers:
                names += self.peers
            rows = self._summary_rows(names, reference)
            if rows:
                text = f"Ratios to {words} of {', '.join(names)}, one row per workload; the tables have them."
                plot = plots.ratios(rows, self._chosen(names), words.replace("the ", ""), text)
                found.append((f"Against {words}", text, plot, names))
        return found

    def _chosen(self, names: Sequence[str]) -> dict[str, plots.Style]:
        return {name: self.styles[name] for name in names}

    def _summary_rows(self, names: Sequence[str], reference: Mapping[Figure, str]) -> list[plots.Row]:
        rows = []
        for group in self.groups():
            lines: dict[str, list[Figure]] = {}
            for figure in self.figures:
                if figure.group == group:
                    lines.setdefault(self._family(figure), []).append(figure)
            found = []
            for label, figures in lines.items():
                dots = [dot for name in names if (dot := self._dot(label, figures, name, reference))]
                if dots:
                    found.append(plots.Row(label if len(figures) == 1 else f"{label} ({len(figures)})", dots))
            if found:
                rows += [plots.Row(self.title(group), ()), *found]
        return rows

    def _family(self, figure: Figure) -> str:
        """A figure's line of the summary. Cold and warm reads are not averaged with each other."""
        workload = self.run.workload_of(figure)
        if workload is None or not workload.family or not figure.name.startswith(workload.name):
            return figure.name
        return workload.family + figure.name.removeprefix(workload.name)

    def _dot(
        self, label: str, figures: Sequence[Figure], name: str, reference: Mapping[Figure, str]
    ) -> plots.Dot | None:
        """One figure with the spread of its rounds, or the mean of several with the worst and the best."""
        known = [
            (figure, ratio)
            for figure in figures
            if figure in reference
            and (ratio := self.results.ratio(figure, name, reference[figure])) is not None
        ]
        if not known:
            return None
        if len(figures) > 1:
            ratios = [ratio for _, ratio in known]
            mean = geometric_mean(ratios)
            assert mean is not None
            low, high = spread(ratios)
            text = f"{name}, {label}: {times(mean)}, in {len(ratios)} figures {_between(low, high)}"
            return plots.Dot(name, mean, low, high, text)
        figure, ratio = known[0]
        low, high = spread(self.run.round_ratios(figure, name, reference[figure]) or [ratio])
        median = self.results.median(figure, name)
        assert median is not None
        text = (
            f"{name}, {figure.name}: {times(ratio)} ({_between(low, high)}) of {reference[figure]}, "
            f"{shown(median)} {figure.unit}"
        )
        return plots.Dot(name, ratio, low, high, text)

    # The sections

    def sections(self) -> list[Section]:
        """One section per group."""
        sections = []
        for number, group in enumerate(self.groups()):
            figures = [figure for figure in self.figures if figure.group == group]
            there = {name for figure in figures for name in self.results.samples[figure]}
            columns = [each.name for each in self.present if each.name in there]
            label, plot = "", None
            for words, reference in self._references()[:1]:
                names = [name for name in columns if name != self.overlayfs]
                dots = [
                    plots.Row(figure.name, [dot for name in names
                                            if (dot := self._dot(figure.name, [figure], name, reference))])
                    for figure in figures
                ]  # fmt: skip
                rows = [row for row in dots if row.dots]
                if rows:
                    text = f"{self.title(group)}: ratios to {words}; the table below has them."
                    plot = plots.ratios(rows, self._chosen(names), words.replace("the ", ""), text)
                    label = words
            compared = any(self._compared(figure) for figure in figures)
            if not compared:
                plot = self._medians(group, figures, columns)
            sections.append(Section(
                f"group-{number}", self.title(group), plot, label, tuple(columns),
                tuple(self._line(figure, columns) for figure in figures),
                tuple((each.name, each.what) for each in self.run.workloads
                      if each.group == group and each.what),
            ))  # fmt: skip
        return sections

    def _compared(self, figure: Figure) -> bool:
        """Whether kernel overlayfs or another FUSE union has the figure."""
        return any(name in self.results.samples[figure] for name in (self.overlayfs, *self.peers))

    def _medians(self, group: str, figures: Sequence[Figure], columns: Sequence[str]) -> plots.Plot:
        stacks = []
        for figure in figures:
            known = {name: median for name in columns
                     if (median := self.results.median(figure, name)) is not None}  # fmt: skip
            bars = [plots.Bar(name, {"median": value}, shown(value)) for name, value in known.items()]
            stacks.append(plots.Stack(figure.name, figure.unit, bars))
        text = f"{self.title(group)}: medians; the table below has them."
        return plots.stacks(stacks, ["median"], text)

    def _line(self, figure: Figure, columns: Sequence[str]) -> Line:
        workload = self.run.workload_of(figure)
        compared = self._compared(figure)
        unions = [each.name for each in self.present if each.kind != "plain" or not compared]
        leader = self.run.best(figure, unions)
        return Line(
            figure.name, figure.unit, workload.what if workload else "",
            tuple(self._cell(figure, name, name == leader) for name in columns),
        )  # fmt: skip

    def _cell(self, figure: Figure, name: str, leads: bool) -> Cell | None:
        samples = self.results.samples[figure].get(name)
        median = self.results.median(figure, name)
        if not samples or median is None:
            return None
        low, high = spread(samples)
        peer = self.run.best_peer(figure)
        ratios = []
        for other in (self.overlayfs, peer) if self._compared(figure) else ():
            ratio = self.results.ratio(figure, name, other) if other else None
            ratios.append(NONE if ratio is None else times(ratio))
        return Cell(
            shown(median),
            "" if len(samples) == 1 else f"{shown(low)}{NONE}{shown(high)}",
            tuple(ratios),
            leads,
        )

    def failure(self, line: str, name: str) -> str | None:
        """Why a contestant lacks a figure."""
        for figure in self.figures:
            if figure.name == line:
                workload = self.run.workload_of(figure)
                if workload:
                    return self.results.failures.get((workload.name, name))
        return None

    # The daemons

    def costs(self) -> list[list[Cost]]:
        """The daemons' CPU time and requests by workload."""
        found = []
        for workload in self._costly():
            by_name = self.results.daemons[workload.name]
            rows = [self._cost(workload, each.name, by_name[each.name])
                    for each in self.run.contestants if each.name in by_name]  # fmt: skip
            if rows:
                found.append(rows)
        return found

    def _costly(self) -> list[WorkloadFacts]:
        known = {workload.name for workload in self.run.workloads}
        others = [WorkloadFacts(name, "") for name in self.results.daemons if name not in known]
        return [each for each in (*self.run.workloads, *others) if self.results.daemons.get(each.name)]

    def _cost(self, workload: WorkloadFacts, name: str, daemon: Daemon) -> Cost:
        rates = daemon.rates()
        each = daemon.microseconds_each()
        total = sum(daemon.request_medians().values())
        return Cost(
            workload.name, _operation(workload, self.results.daemons[workload.name].values()), name,
            NONE if rates is None else _rate(sum(rates.values())),
            NONE if rates is None else f"{total:,}",
            "" if rates is None else ", ".join(f"{kind} {_rate(rate)}" for kind, rate in rates.items()
                                               if rate >= 0.005 * sum(rates.values())),
            f"{daemon.milliseconds():,.0f}" if daemon.cpu_seconds else NONE,
            NONE if each is None else shown(each),
        )  # fmt: skip

    def requests(self) -> list[tuple[str, plots.Plot, list[str]]]:
        """For each group with counted requests its title, its plot and the kinds in it."""
        found = []
        for group in self.groups():
            workloads = [workload for workload in self._costly() if workload.group == group]
            rates: dict[str, dict[str, dict[str, float]]] = {}
            for workload in workloads:
                daemons = self.results.daemons[workload.name]
                for name in self.ours:
                    if name in daemons and daemons[name].operations and (each := daemons[name].rates()):
                        rates.setdefault(workload.name, {})[name] = each
            if rates:
                operations = {workload.name: workload.operation for workload in workloads}
                kinds = _most_frequent([each for by_name in rates.values() for each in by_name.values()])
                found.append(self._requests_of(group, rates, operations, kinds))
        return found

    def _requests_of(
        self,
        group: str,
        rates: Mapping[str, Mapping[str, Mapping[str, float]]],
        operations: Mapping[str, str],
        kinds: Sequence[str],
    ) -> tuple[str, plots.Plot, list[str]]:
        chosen = list(kinds) if len(kinds) <= _PARTS + 1 else list(kinds[:_PARTS])
        others = len(kinds) > len(chosen)
        stacks = []
        for workload, by_name in rates.items():
            bars = []
            for name, each in by_name.items():
                lengths = {kind: each[kind] for kind in chosen if kind in each}
                if others:
                    lengths["others"] = sum(rate for kind, rate in each.items() if kind not in chosen)
                bars.append(plots.Bar(name, lengths, _rate(sum(each.values()))))
            stacks.append(plots.Stack(workload, f"per {operations[workload]}", bars))
        parts = [*chosen, "others"] if others else chosen
        text = (
            f"{self.title(group)}: requests of the kernel per operation, by kind; the table below has them."
        )
        return self.title(group), plots.stacks(stacks, parts, text), parts

    # The rest

    def facts(self) -> list[tuple[str, str]]:
        """The host and the run, as words."""
        run = self.run
        facts = [(name, str(value)) for name, value in run.machine.items()]
        facts += [(name, _plain(value)) for name, value in run.settings.items()]
        if run.seconds is not None:
            facts.append(("took", f"{run.seconds / 60:.1f} minutes"))
        return facts

    def rounds(self) -> str:
        """The number of samples per figure."""
        numbers = {len(samples) for by_name in self.results.samples.values() for samples in by_name.values()}
        low, high = (min(numbers), max(numbers)) if numbers else (0, 0)
        return str(low) if low == high else f"{low} to {high}"

    def skipped(self) -> list[tuple[str, str, str]]:
        """Contestant (or all), workloads, and why they were not tried."""
        together: dict[tuple[str, str], list[str]] = {}
        for (workload, name), reason in self.results.skipped.items():
            together.setdefault((name or "all", reason), []).append(workload)
        return [(name, ", ".join(names), reason) for (name, reason), names in together.items()]

    def failures(self) -> list[tuple[str, str, str]]:
        """Workload, contestant, reason."""
        return [(*key, reason) for key, reason in self.results.failures.items()]


def _most_frequent(samples: Sequence[Mapping[str, float]]) -> list[str]:
    """Kinds by their share in the samples, the largest first."""
    shares: dict[str, float] = {}
    for sample in samples:
        for kind, rate in sample.items():
            shares[kind] = shares.get(kind, 0.0) + rate / sum(sample.values())
    return sorted(shares, key=lambda kind: (-shares[kind], kind))


def times(value: float) -> str:
    """A ratio with its sign."""
    return f"{plots.TIMES}{shown(value)}"


def _between(low: float, high: float) -> str:
    return f"{shown(low)} to {shown(high)}"


def _rate(value: float) -> str:
    """Requests per operation; integers without decimals."""
    if 0 < value < 0.001:
        return "<0.001"
    return f"{value:,.0f}" if value == round(value) else shown(value)


def _operation(workload: WorkloadFacts, daemons: Iterable[Daemon]) -> str:
    return workload.operation if any(daemon.operations for daemon in daemons) else "turn"


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "all"
    return str(value)


def _styles(contestants: Sequence[ContestantFacts]) -> dict[str, plots.Style]:
    """Strong colours for unionfs, quieter ones for the others; known names have the same on every page."""
    ours, others = list(_KNOWN_OURS), list(_KNOWN_OTHERS)
    styles = {}
    for each in contestants:
        names = ours if each.kind == "ours" else others
        if each.name not in names:
            names.append(each.name)
        number = names.index(each.name) % _PALETTE
        if each.kind == "ours":
            styles[each.name] = plots.Style(number, plots.MARKERS_OURS[number])
        else:
            styles[each.name] = plots.Style(_PALETTE + number, plots.MARKERS_OTHERS[number])
    return styles
