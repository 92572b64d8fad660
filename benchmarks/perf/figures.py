"""Samples, their medians, and the ratios of medians."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import cycle


def shown(value: float) -> str:
    """Three significant digits, two below 0.1, and no fewer digits than there are before the point."""
    size = abs(value)
    if size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.0995 or not value else f"{value:.2g}"


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of nothing."""
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
    """What a workload cost in the daemon: one sample a round."""

    cpu_seconds: list[float] = field(default_factory=list)
    requests: list[dict[str, int]] = field(default_factory=list)
    """By kind; empty for daemons that do not count."""
    operations: list[float] = field(default_factory=list)
    """How many operations of the workload each of `requests` was for; empty when that is not known."""

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
        """CPU time a request, median of the rounds; None when requests are not known."""
        each = [
            cpu * 1e6 / total
            for cpu, sample in zip(self.cpu_seconds, self.requests, strict=False)
            if (total := sum(sample.values()))
        ]
        return statistics.median(each) if each else None

    def requests_each(self) -> float | None:
        """Requests an operation, median of the rounds; None when requests are not known."""
        each = [
            sum(sample.values()) / operations
            for sample, operations in zip(self.requests, self.operations, strict=False)
            if operations
        ]
        return statistics.median(each) if each else None

    def rates(self) -> dict[str, float] | None:
        """Requests an operation by kind, the most frequent first: median of the turns. None when not counted.

        Where the number of operations is not known, a turn is one.
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
        """(workload, contestant): why it has no figure there."""
        self.skipped: dict[tuple[str, str | None], str] = {}
        """(workload, contestant, or None for all of them): why it was not tried."""

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
        """CPU time (seconds) and requests of one turn, and the operations that they were for."""
        daemon = self.daemons.setdefault(workload, {}).setdefault(contestant, Daemon())
        daemon.cpu_seconds.append(cpu)
        if requests is not None:
            daemon.requests.append(requests)
            if operations is not None:
                daemon.operations.append(operations)

    def median(self, figure: Figure, contestant: str) -> float | None:
        """None when there is no sample."""
        samples = self.samples.get(figure, {}).get(contestant)
        return statistics.median(samples) if samples else None

    def ratio(self, figure: Figure, contestant: str, reference: str) -> float | None:
        """How many times as good as the reference: above 1 is better, whether more or less is wanted."""
        own, other = self.median(figure, contestant), self.median(figure, reference)
        if not own or not other or own < 0 or other < 0:
            return None
        return own / other if figure.more_is_better else other / own
