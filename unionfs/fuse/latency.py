"""Latencies of requests: histograms by kind, filled only on demand.

No I/O: times are nanoseconds, results are JSON-able.

A bucket holds times in (lower, upper]. Up to 16 ns each nanosecond has its own bucket; above, every power of
two is divided into eight buckets of equal width. So a bucket's middle is at most 1/16 (6.25 %) away from
every time in it, which is the maximum error of a quantile. Every power of two from 16 on is the end of a
bucket, so counts up to there are exact.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from time import perf_counter_ns
from typing import Any, Final

ERROR: Final = 1 / 16
"""The maximum error of a quantile, relative to the true one."""

_STEPS: Final = 8  # buckets a power of two
_BITS: Final = 4  # the leading bits of a number that choose its bucket
_NS: Final = 1_000_000_000
LONGEST_WATCH: Final = 3600.0
"""The maximum measuring time, in seconds."""


def _bucket(ns: int) -> int:
    number = ns - 1 if ns > 0 else 0
    shift = number.bit_length() - _BITS
    return number if shift <= 0 else shift * _STEPS + (number >> shift)


def _bounds(bucket: int) -> tuple[int, int]:
    """(lower, upper] in nanoseconds."""
    if bucket < 2 * _STEPS:
        return bucket, bucket + 1
    shift = bucket // _STEPS - 1
    first = bucket % _STEPS + _STEPS
    return first << shift, (first + 1) << shift


class Histogram:
    """Times in nanoseconds, accurate to 1/16."""

    __slots__ = ("buckets", "total_ns")

    def __init__(self, buckets: Mapping[int, int] | None = None, total_ns: int = 0) -> None:
        self.buckets: Counter[int] = Counter(buckets or {})
        self.total_ns = total_ns

    def record(self, ns: int) -> None:
        """Add one time."""
        self.buckets[_bucket(ns)] += 1
        self.total_ns += ns

    @property
    def count(self) -> int:
        """The number of times added."""
        return self.buckets.total()

    def quantile(self, part: float) -> float | None:
        """The nanoseconds not exceeded by ``part`` (0 to 1) of the times, by nearest rank, within ``ERROR``.
        None without times.
        """
        rank = max(1, math.ceil(part * self.count))
        for bucket in sorted(self.buckets):
            rank -= self.buckets[bucket]
            if rank <= 0:
                lower, upper = _bounds(bucket)
                return (lower + 1 + upper) / 2
        return None

    def up_to(self, ns: int) -> int:
        """The number of times up to ``ns``, which is a power of two from 16 on, or the end of any bucket."""
        return sum(count for bucket, count in self.buckets.items() if _bounds(bucket)[1] <= ns)

    def since(self, earlier: Histogram) -> Histogram:
        """The times added since an earlier state of the same histogram."""
        return Histogram(self.buckets - earlier.buckets, self.total_ns - earlier.total_ns)

    def add(self, other: Histogram) -> None:
        """Add the times of another histogram."""
        self.buckets.update(other.buckets)
        self.total_ns += other.total_ns

    def to_json(self) -> dict[str, Any]:
        """Returns JSON-able values for `from_json`."""
        return {"buckets": sorted(self.buckets.items()), "total_ns": self.total_ns}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Histogram:
        """Raises KeyError, TypeError or ValueError for values that `to_json` cannot return."""
        buckets = {int(bucket): int(count) for bucket, count in values["buckets"]}
        return cls(buckets, int(values["total_ns"]))


class Latencies:
    """The latencies of one mount's requests, by kind. They only grow, and are measured only on demand.

    A session measures while :attr:`watched`, and calls :meth:`goes_on` with each request: it clears the
    attribute when the requested time is over.
    """

    def __init__(self, clock: Callable[[], int] = perf_counter_ns) -> None:
        self.clock = clock
        #: Whether to measure.
        self.watched = False
        self._until = 0
        self._kinds: dict[str, Histogram] = {}
        # Requests being measured, by kernel id: the times of reading and answering them.
        self._begun: dict[int, int] = {}
        self._written: dict[int, int] = {}

    def watch(self, seconds: float) -> None:
        """Measure for that long from now, or longer if another caller requested it."""
        if not 0 < seconds < math.inf:
            return
        self._until = max(self._until, self.clock() + int(min(seconds, LONGEST_WATCH) * _NS))
        self.watched = True

    def goes_on(self, now: int) -> bool:
        """Whether to measure a request that starts now (by the clock)."""
        if now > self._until:
            self.watched = False
        return self.watched

    def record(self, kind: str, ns: int) -> None:
        """Add the time of a request of that kind."""
        histogram = self._kinds.get(kind)
        if histogram is None:
            histogram = self._kinds[kind] = Histogram()
        histogram.record(ns)

    def begin(self, unique: int, now: int) -> None:
        """The request was read."""
        self._begun[unique] = now

    def written(self, unique: int) -> None:
        """An answer was just written, though :meth:`end` follows later; callable from any thread."""
        if unique in self._begun:
            self._written[unique] = self.clock()

    def end(self, unique: int, kind: str) -> None:
        """The answer to a request is written. Ignores a request without :meth:`begin`."""
        began = self._begun.pop(unique, None)
        if began is not None:
            self.record(kind, (self._written.pop(unique, None) or self.clock()) - began)

    def to_json(self) -> dict[str, Any]:
        """The histogram of each measured kind."""
        return {kind: histogram.to_json() for kind, histogram in sorted(self._kinds.items())}
