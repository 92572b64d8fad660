"""Latency histograms compared with sorted samples, and the measuring time."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from unionfs.fuse.latency import ERROR, LONGEST_WATCH, Histogram, Latencies

TIMES = st.one_of(st.integers(0, 64), st.integers(0, 10**6), st.integers(0, 10**13))
SOME = st.lists(TIMES, min_size=1, max_size=200)


def _filled(times: list[int]) -> Histogram:
    histogram = Histogram()
    for ns in times:
        histogram.record(ns)
    return histogram


def _nearest_rank(times: list[int], part: float) -> int:
    return sorted(times)[max(1, math.ceil(part * len(times))) - 1]


@given(SOME, st.sampled_from([0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 1.0]))
def test_quantile(times: list[int], part: float) -> None:
    found, wanted = _filled(times).quantile(part), _nearest_rank(times, part)
    assert found is not None
    # with a clock that stands still, 0 ns counts as 1 ns
    assert abs(found - max(1, wanted)) <= ERROR * max(1, wanted)


@example([1 << 10, (1 << 10) + 1], 10)
@given(SOME, st.integers(4, 45))
def test_count_up_to_a_power_of_two_is_exact(times: list[int], power: int) -> None:
    assert _filled(times).up_to(1 << power) == sum(ns <= 1 << power for ns in times)


@given(SOME, SOME)
def test_what_came_since(earlier: list[int], later: list[int]) -> None:
    before, both, only = _filled(earlier), _filled(earlier + later), _filled(later)
    since = both.since(before)
    assert (since.buckets, since.total_ns, since.count) == (only.buckets, sum(later), len(later))
    before.add(since)
    assert (before.buckets, before.total_ns) == (both.buckets, both.total_ns)


@given(SOME)
def test_as_json(times: list[int]) -> None:
    histogram = _filled(times)
    found = Histogram.from_json(json.loads(json.dumps(histogram.to_json())))
    assert (found.buckets, found.total_ns) == (histogram.buckets, histogram.total_ns)


def test_of_nothing() -> None:
    assert Histogram().quantile(0.5) is None
    assert (Histogram().count, Histogram().up_to(1 << 30)) == (0, 0)


class _Clock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


def test_measures_for_as_long_as_was_asked() -> None:
    clock = _Clock()
    latencies = Latencies(clock)
    assert not latencies.watched
    latencies.watch(2)
    latencies.watch(1)  # a shorter request does not shorten the others
    assert latencies.watched
    assert latencies.goes_on(2_000_000_000)
    assert not latencies.goes_on(2_000_000_001)
    assert not latencies.watched
    clock.now = 5_000_000_000
    latencies.watch(1)
    assert latencies.watched


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_a_time_that_is_none(seconds: float) -> None:
    latencies = Latencies(_Clock())
    latencies.watch(seconds)
    assert not latencies.watched


def test_nobody_has_it_measured_for_ever() -> None:
    latencies = Latencies(_Clock())
    latencies.watch(1e18)
    assert not latencies.goes_on(int(LONGEST_WATCH * 1e9) + 1)
