"""What changed between two runs, and whether that is more than the spread of both.

Two things are compared for each figure and contestant: the figure itself, and its ratio to kernel overlayfs
in the same run and round, which does not depend on the machine's speed.

Samples are few and of unknown distribution, so the test is one of ranks: the exact two-sided Mann-Whitney
test. A difference is clear if p is at most 5 % or, with too few samples to reach that, if no sample of one
run lies among those of the other (three against three: one in ten by chance). With fewer than three samples
nothing is decided. Differences below a threshold are ignored.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.perf.figures import Figure
from benchmarks.perf.results import OVERLAYFS, Run

CHANCE = 0.05
FEWEST = 3
"""Samples of each run below which nothing is decided."""

#: better, worse: clear by itself and beside overlayfs. gained, lost: clear beside overlayfs alone, since the
#: machine changed, too. alike: clear by itself, but not beside overlayfs. same: within the spread.
#: unknown: too few samples.
Verdict = Literal["better", "worse", "gained", "lost", "alike", "same", "unknown"]
REQUESTS = "requests"


@dataclass(frozen=True)
class Change:
    """One figure of one contestant in both runs. Ratios are "how many times as good": above 1 is better."""

    figure: Figure
    contestant: str
    old: float
    new: float
    """Medians."""
    ratio: float | None
    clear: bool | None
    """None: too few samples."""
    relative: float | None = None
    """The same for the ratio to overlayfs; None where there is none."""
    relative_clear: bool | None = None
    limit: float = CHANCE
    """The maximum probability to look clear if nothing had changed."""

    @property
    def size(self) -> float:
        """How far from no change, for sorting."""
        ratio = self.ratio if self.relative is None else self.relative
        return abs(math.log(ratio)) if ratio else 0.0

    @property
    def verdict(self) -> Verdict:
        """The verdict, as a word."""
        if self.clear is None or self.ratio is None:
            return "unknown"
        better = self.ratio > 1
        if self.relative is None:
            return ("better" if better else "worse") if self.clear else "same"
        if not self.relative_clear:
            return "alike" if self.clear else "same"
        gained = self.relative > 1
        if self.clear and gained == better:
            return "better" if gained else "worse"
        return "gained" if gained else "lost"


@dataclass(frozen=True)
class Comparison:
    """The comparison of two runs."""

    changes: list[Change]
    """The largest first."""
    only_old: list[tuple[str, str]]
    """(figure, contestant); an empty contestant stands for all of them."""
    only_new: list[tuple[str, str]]
    machine: list[tuple[str, str, str]]
    """Facts of the host that differ: name, old, new."""
    settings: list[tuple[str, str, str]]
    versions: list[tuple[str, str, str]]

    def by_chance(self) -> float:
        """The maximum expected number of clear changes if nothing had changed."""
        return math.fsum(change.limit for change in self.changes if change.clear is not None)


def chance(old: Sequence[float], new: Sequence[float]) -> float:
    """The exact two-sided p of the Mann-Whitney test.

    That is, of all ways to assign the samples to two runs, the share in which the ranks of one lie at least
    as far from the middle as here. Equal samples share their rank.
    """
    both = sorted([*old, *new])
    # doubled, so that shared ranks are integers
    ranks = {value: 2 * both.index(value) + both.count(value) + 1 for value in both}
    ways = [{0: 1}, *({} for _ in new)]  # by number of samples: the number of ways by sum of ranks
    for value in both:
        for number in range(len(new), 0, -1):
            for total, count in list(ways[number - 1].items()):
                ways[number][total + ranks[value]] = ways[number].get(total + ranks[value], 0) + count
    middle = len(new) * (len(both) + 1)
    far = abs(sum(ranks[value] for value in new) - middle)
    return sum(count for total, count in ways[-1].items() if abs(total - middle) >= far) / math.comb(
        len(both), len(new)
    )


def smallest_chance(old: int, new: int) -> float:
    """The smallest p for these numbers of samples: if the runs do not overlap."""
    return 2 / math.comb(old + new, new)


def is_clear(
    old: Sequence[float], new: Sequence[float], ratio: float | None, threshold: float
) -> bool | None:
    """Whether the difference is larger than the spread of both; None with too few samples."""
    if min(len(old), len(new)) < FEWEST or ratio is None:
        return None
    if max(ratio, 1 / ratio) < 1 + threshold:
        return False
    # rounding may put a p of exactly the limit slightly above it
    limit = max(CHANCE, smallest_chance(len(old), len(new)))
    return chance(old, new) <= limit * (1 + 1e-9)


def compare(old: Run, new: Run, *, threshold: float = 0.05) -> Comparison:
    """Compare everything that both have. `threshold`: ignore smaller differences (0.05: five percent)."""
    changes: list[Change] = []
    only_old: list[tuple[str, str]] = []
    only_new: list[tuple[str, str]] = []
    before, after = _measured(old), _measured(new)
    for figure in before.keys() | after.keys():
        mine, its = before.get(figure, {}), after.get(figure, {})
        if not mine or not its:
            (only_old if mine else only_new).append((figure.name, ""))
            continue
        only_old += [(figure.name, name) for name in mine.keys() - its.keys()]
        only_new += [(figure.name, name) for name in its.keys() - mine.keys()]
        for name in mine.keys() & its.keys():
            change = _change(figure, name, mine[name], its[name], threshold)
            if figure in old.results.samples and name != OVERLAYFS:
                change = _beside(change, old, new, threshold)
            changes.append(change)
    changes.sort(key=lambda change: (-change.size, change.figure.name, change.contestant))
    return Comparison(
        changes, sorted(only_old), sorted(only_new), _differing(old.machine, new.machine),
        _differing(old.settings, new.settings), _differing(_versions(old), _versions(new)),
    )  # fmt: skip


def _measured(run: Run) -> dict[Figure, dict[str, list[float]]]:
    """The figures, including requests per operation."""
    found = dict(run.results.samples)
    operations = {workload.name: workload.operation for workload in run.workloads}
    for workload, by_name in run.results.daemons.items():
        for name, daemon in by_name.items():
            if daemon.requests and len(daemon.requests) == len(daemon.operations):
                figure = Figure(REQUESTS, workload, f"requests per {operations.get(workload, 'operation')}")
                found.setdefault(figure, {})[name] = [
                    sum(sample.values()) / number
                    for sample, number in zip(daemon.requests, daemon.operations, strict=True)
                    if number
                ]
    return {figure: {name: own for name, own in by_name.items() if own} for figure, by_name in found.items()}


def _better(figure: Figure, old: float, new: float) -> float | None:
    if old <= 0 or new <= 0:
        return 1.0 if old == new else None
    return new / old if figure.more_is_better else old / new


def _change(
    figure: Figure, name: str, old: Sequence[float], new: Sequence[float], threshold: float
) -> Change:
    medians = statistics.median(old), statistics.median(new)
    ratio = _better(figure, *medians)
    limit = max(CHANCE, smallest_chance(len(old), len(new)))
    return Change(figure, name, *medians, ratio, is_clear(old, new, ratio, threshold), limit=limit)


def _beside(change: Change, old: Run, new: Run, threshold: float) -> Change:
    """The change with the ratios to overlayfs, if both runs have them."""
    figure, name = change.figure, change.contestant
    ratios = [run.results.ratio(figure, name, OVERLAYFS) for run in (old, new)]
    before, after = (run.round_ratios(figure, name, OVERLAYFS) for run in (old, new))
    if ratios[0] is None or ratios[1] is None or not before or not after:
        return change
    relative = ratios[1] / ratios[0]
    return Change(
        figure, name, change.old, change.new, change.ratio, change.clear, relative,
        is_clear(before, after, relative, threshold), change.limit,
    )  # fmt: skip


def _versions(run: Run) -> dict[str, object]:
    return {each.name: each.version for each in run.contestants if each.version}


def _differing(old: Mapping[str, object], new: Mapping[str, object]) -> list[tuple[str, str, str]]:
    """Facts that both have and that differ."""
    return [(name, str(old[name]), str(new[name])) for name in old if name in new and old[name] != new[name]]


def to_json(found: Comparison) -> dict[str, object]:
    """The comparison as JSON values."""

    def differing(facts: Sequence[tuple[str, str, str]]) -> dict[str, object]:
        return {name: {"old": old, "new": new} for name, old, new in facts}

    return {
        "changes": [
            {
                "group": change.figure.group, "figure": change.figure.name, "unit": change.figure.unit,
                "better": "more" if change.figure.more_is_better else "less",
                "contestant": change.contestant, "old": change.old, "new": change.new,
                "ratio": change.ratio, "clear": change.clear, "relative": change.relative,
                "relative_clear": change.relative_clear, "verdict": change.verdict,
            }
            for change in found.changes
        ],
        "clear_by_chance_at_most": found.by_chance(),
        "only_old": [{"figure": figure, "contestant": name or None} for figure, name in found.only_old],
        "only_new": [{"figure": figure, "contestant": name or None} for figure, name in found.only_new],
        "machine": differing(found.machine),
        "settings": differing(found.settings),
        "versions": differing(found.versions),
    }  # fmt: skip
