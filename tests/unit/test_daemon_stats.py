"""The activity of a mount between two samples, and its tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from unionfs.daemon.live import LiveMount
from unionfs.daemon.overview import FACTS, Activity
from unionfs.daemon.settle import settle
from unionfs.daemon.stats import Sample, Span, more_for
from unionfs.daemon.stats_tables import tables
from unionfs.fuse.latency import Histogram, Latencies


def _histogram(*times: int) -> Histogram:
    found = Histogram()
    for ns in times:
        found.record(ns)
    return found


def _sample(
    seconds: int, requests: dict[str, int], figures: dict[str, Any], **latencies: Histogram
) -> Sample:
    return Sample(seconds * 1_000_000_000, "direct", "hybrid", requests, figures, latencies)


FIRST = _sample(
    10, {"lookup": 10, "read": 5}, {"read_bytes": 100, "copy_ups": 1, "nodes": 3},
    lookup=_histogram(1000, 1000), read=_histogram(50),
)  # fmt: skip
SECOND = _sample(
    12, {"lookup": 30, "write": 4, "read": 5},
    {"read_bytes": 4196, "written_bytes": 7, "copy_ups": 1, "copy_up_seconds": 0.5, "nodes": 4, "open": True,
     "resident_bytes": 2048, "lists": [1], "more": {"kept_bytes": 1024, "full": False, "a_b": 3}},
    lookup=_histogram(1000, 1000, 2_000_000), write=_histogram(2_000_000), read=_histogram(50),
)  # fmt: skip
SPAN = Span(FIRST, SECOND)


def test_requests() -> None:
    """Those of the span, also of a kind that was not there before; latencies of these alone."""
    assert SPAN.seconds == 2
    kinds = SPAN.kinds()
    assert list(kinds) == ["lookup", "read", "write"]
    assert [(kind.total, kind.per_second, kind.latency.count) for kind in kinds.values()] == [
        (30, 10, 1), (5, 0, 0), (4, 2, 1),
    ]  # fmt: skip
    every = SPAN.all_kinds()
    assert (every.total, every.per_second, every.latency.count) == (39, 12, 2)
    assert every.latency.total_ns == 4_000_000


def test_a_short_span() -> None:
    """Of half a second."""
    span = Span(FIRST, replace(SECOND, clock_ns=FIRST.clock_ns + 500_000_000))
    assert span.seconds == 0.5
    assert [kind.per_second for kind in span.kinds().values()] == [40, 0, 8]
    assert span.all_kinds().per_second == 48


@pytest.mark.parametrize("earlier", [None, SECOND, replace(SECOND, clock_ns=SECOND.clock_ns + 1)])
def test_without_a_span(earlier: Sample | None) -> None:
    """Only totals are known, and no latency."""
    span = Span(earlier, SECOND)
    assert [(kind.total, kind.per_second, kind.latency.count) for kind in span.kinds().values()] == [
        (30, None, 0), (5, None, 0), (4, None, 0),
    ]  # fmt: skip
    assert (span.all_kinds().total, span.all_kinds().per_second) == (39, None)
    assert {rate for _, rate in span.counters().values()} == {None}
    assert Span(None, SECOND).seconds == 0


def test_counters_and_states() -> None:
    """A daemon may have begun to count something meanwhile."""
    assert SPAN.counters() == {
        "read_bytes": (4196, 2048), "written_bytes": (7, 3.5), "copy_ups": (1, 0),
        "copy_up_seconds": (0.5, 0.25),
    }  # fmt: skip
    assert set(SPAN.states()) == {"nodes", "open", "resident_bytes", "lists", "more"}


def test_as_plain_values() -> None:
    found = SPAN.to_json()
    assert (found["session"], found["io"], found["seconds"]) == ("direct", "hybrid", 2)
    latency = found["requests"]["lookup"]["latency"]
    assert (latency["count"], latency["mean_seconds"]) == (1, 0.002)
    assert 0.001 <= latency["p50_seconds"] <= latency["p99_seconds"] <= 0.004
    assert found["requests"]["read"] == {"total": 5, "per_second": 0, "latency": None}
    assert found["all_requests"]["latency"]["mean_seconds"] == 0.002
    assert found["counters"]["copy_ups"] == {"total": 1, "per_second": 0}
    assert found["state"] == SPAN.states()


def _mount() -> LiveMount:
    settings = settle("/mnt", lowers=["/"], trusted_xattrs=True)
    return LiveMount(settings, 1, 2, "0:50", 1.0, ())


def test_tables() -> None:
    """The most frequent kinds first; units of bytes and of times."""
    requests, counters, states = (list(rows) for _, rows in tables(_mount(), SPAN))
    assert [row[:3] for row in requests] == [
        ("all", "39", "12.0"), ("lookup", "30", "10.0"), ("write", "4", "2.0"), ("read", "5", "0.0"),
    ]  # fmt: skip
    assert requests[3][3:] == ("-", "-")
    assert "-" not in requests[1][3:]
    assert counters == [
        ("read by the daemon", "4.1 KiB", "2.0 KiB"), ("written by the daemon", "7 B", "4 B"),
        ("copy-ups", "1", "0.0"), ("time of copy-ups", "500.0 ms", "250.0 ms"),
    ]  # fmt: skip
    assert states == [
        ("mountpoint", "/mnt"), ("daemon", "pid 1, session direct, io hybrid"), ("nodes", "4"),
        ("open", "yes"), ("resident", "2.0 KiB"), ("more", "kept 1.0 KiB, full no, a b 3"),
    ]  # fmt: skip


def test_tables_without_a_span() -> None:
    """By totals, then by name."""
    requests, counters, _ = (list(rows) for _, rows in tables(_mount(), Span(None, SECOND)))
    assert [row[0] for row in requests] == ["all", "lookup", "read", "write"]
    assert {row[2] for row in (*requests, *counters)} == {"-"}
    slow = replace(SECOND, figures={"copy_up_seconds": 90.0}, requests={"b": 1, "a": 1})
    requests, counters, _ = (list(rows) for _, rows in tables(_mount(), Span(None, slow)))
    assert [row[0] for row in requests] == ["all", "a", "b"]
    assert counters == [("time of copy-ups", "90.0 s", "-")]
    copies = [{"path": "f", "copied": 1, "size": 2, "seconds": 1}]
    _, _, states = (
        list(rows) for _, rows in tables(_mount(), Span(None, replace(slow, figures={"copying_up": copies})))
    )
    assert states[2][0] == "copying up"
    assert states[2][1].startswith("f: 1 B of 2 B")


def test_the_facts_of_a_mount() -> None:
    """One that does not answer has a name and a pid alone."""
    found = Activity(_mount(), SPAN, 5).facts()
    assert tuple(found) == FACTS
    assert (found["mountpoint"], found["pid"], found["upper_free"]) == ("/mnt", 1, 5)
    assert (found["requests"], found["read"], found["written"], found["copy_ups"]) == (12, 2048, 3.5, 1)
    assert 0.001 <= found["p50"] <= found["p99"] <= 0.004
    assert (found["memory"], found["copying_up"]) == (2048, None)
    silent = Activity(_mount(), None, None).facts()
    assert {name for name, value in silent.items() if value is not None} == {"mountpoint", "pid"}
    idle = Activity(_mount(), Span(FIRST, FIRST), None).facts()
    assert (idle["requests"], idle["p50"], idle["p99"], idle["written"]) == (None, None, None, None)


def test_what_is_asked_for() -> None:
    """Latencies are measured from the first question on."""
    latencies = Latencies()
    assert more_for({}, latencies) == more_for({"watch_seconds": "1"}, latencies) == {}
    answer = more_for({"watch_seconds": 60}, latencies)
    assert answer["latencies"] == {}
    assert answer["clock_ns"] <= latencies.clock()
