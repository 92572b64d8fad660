"""Samples, their medians, and the ratios of medians."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import cycle


def shown(value: float) -> str:
    """Three significant digits, two below 0.1, but all digits before the point."""
    size = abs(value)
    if size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.0995 or not value else f"{value:.2g}"


def geometric_mean(values: Iterable[float]) -> float | None:
    """The median; None without values."""
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else None


@dataclass(frozen=True)
class Figure:
    """What is measured."""

    group: str
    name: str
    unit: str
    more_is_better: bool = False


@dataclass
class Daemon:
    """A workload's cost in the daemon: one sample per round."""

    cpu_seconds: list[float] = field(default_factory=list)
    requests: list[dict[str, int]] = field(default_factory=list)
    """By kind; empty for daemons that do not count."""
    operations: list[float] = field(default_factory=list)
    """The number of operations for each of `requests`; empty if unknown."""

    def milliseconds(self) -> float:
        """Median of the CPU time."""
        return statistics.median(self.cpu_seconds) * 1e3

    def request_medians(self) -> dict[str, int]:
        """Requests by kind, the most frequent first."""
        kinds = {kind for sample in self.requests for kind in sample}
        medians = {
            kind: round(statistics.median(sample.get(kind, 0) for sample in self.requests)) for kind in kinds
        }
        return dict(sorted(medians.items(), key=lambda item: (-item[1], item[0])))

    def microseconds_each(self) -> float | None:
        """CPU time per request, median of the rounds; None if requests are unknown."""
        each = [
            cpu * 1e6 / total
            for cpu, sample in zip(self.cpu_seconds, self.requests, strict=False)
            if (total := sum(sample.values()))
        ]
        return statistics.median(each) if each else None

    def requests_each(self) -> float | None:
        """Requests per operation, median of the rounds; None if requests are unknown."""
        each = [
            sum(sample.values()) / operations
            for sample, operations in zip(self.requests, self.operations, strict=False)
            if operations
        ]
        return statistics.median(each) if each else None

    def rates(self) -> dict[str, float] | None:
        """Requests per operation by kind, the most frequent first: median of the turns. None if not counted.

        If the number of operations is unknown, a turn counts as one.
        """
        if not self.requests:
            return None
        operations = self.operations if len(self.operations) == len(self.requests) else [1.0]
        turns = [
            {kind: count / number for kind, count in sample.items()}
            for sample, number in zip(self.requests, cycle(operations), strict=False)
            if number
        ]
        kinds = {kind for turn in turns for kind in turn}
        rates = {kind: statistics.median(turn.get(kind, 0.0) for turn in turns) for kind in kinds}
        return dict(sorted(((kind, rate) for kind, rate in rates.items() if rate), key=lambda item: -item[1]))


class Results:
    """All samples of a run, by figure (or workload) and contestant."""

    def __init__(self) -> None:
        self.samples: dict[Figure, dict[str, list[float]]] = {}
        self.daemons: dict[str, dict[str, Daemon]] = {}
        self.failures: dict[tuple[str, str], str] = {}
        """(workload, contestant): why it has no figure."""
        self.skipped: dict[tuple[str, str | None], str] = {}
        """(workload, contestant or None for all): why it was not tried."""

    def add(self, figure: Figure, contestant: str, value: float) -> None:
        """One sample."""
        self.samples.setdefault(figure, {}).setdefault(contestant, []).append(value)

    def add_daemon(
        self,
        workload: str,
        contestant: str,
        cpu: float,
        requests: dict[str, int] | None,
        operations: float | None = None,
    ) -> None:
        """CPU time (seconds), requests and operations of one turn."""
        daemon = self.daemons.setdefault(workload, {}).setdefault(contestant, Daemon())
        daemon.cpu_seconds.append(cpu)
        if requests is not None:
            daemon.requests.append(requests)
            if operations is not None:
                daemon.operations.append(operations)

    def median(self, figure: Figure, contestant: str) -> float | None:
        """The median; None without samples."""
        samples = self.samples.get(figure, {}).get(contestant)
        return statistics.median(samples) if samples else None

    def ratio(self, figure: Figure, contestant: str, reference: str) -> float | None:
        """How many times as good as the reference: above 1 is better, whether more or less is wanted."""
        own, other = self.median(figure, contestant), self.median(figure, reference)
        if not own or not other or own < 0 or other < 0:
            return None
        return own / other if figure.more_is_better else other / own
