"""The activity of all mounts, look by look."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unionfs.daemon import overview
from unionfs.daemon.overview import FACTS, Activity, Overview
from unionfs.daemon.stats import Sample, Span
from unionfs.errors import UserError
from unionfs.fuse.latency import Histogram


def _sample(seconds: int, requests: int, *times: int) -> Sample:
    latency = Histogram()
    for ns in times:
        latency.record(ns)
    figures = {
        "read_bytes": requests * 10, "written_bytes": requests * 20, "copy_ups": requests, "copying_up": 2,
        "resident_bytes": 4096,
    }  # fmt: skip
    return Sample(seconds * 10**9, "direct", "hybrid", {"lookup": requests}, figures, {"lookup": latency})


def _mount(name: str, upper: str | None = None) -> Any:
    return SimpleNamespace(
        name=name, pid=len(name), settings=SimpleNamespace(mountpoint=f"/{name}", upper=upper)
    )


def test_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates need the look before; a daemon that is silent once has none at the next look."""
    asked: list[tuple[str, float]] = []
    answers: list[Sample | None] = []

    def sample(mount: Any, watch_seconds: float) -> Sample:
        asked.append((mount.name, watch_seconds))
        if (answer := answers.pop(0)) is None:
            raise UserError("it is silent.")
        return answer

    one, other = _mount("one"), _mount("other")
    monkeypatch.setattr(overview, "sample", sample)
    monkeypatch.setattr(overview, "live_mounts", lambda: [one, other])
    looks = Overview(7)
    answers[:] = [_sample(10, 4), _sample(20, 100)]
    first = looks.look()
    assert [(found.mount, found.free) for found in first] == [(one, None), (other, None)]
    assert asked == [("one", 7), ("other", 7)]
    assert [found.facts()["requests"] for found in first] == [None, None]
    answers[:] = [_sample(12, 10), None]
    facts = [found.facts() for found in looks.look()]
    assert [found["requests"] for found in facts] == [3, None]
    assert (facts[0]["read"], facts[0]["written"], facts[0]["copy_ups"]) == (30, 60, 10)
    assert (facts[0]["copying_up"], facts[0]["memory"]) == (2, 4096)
    silent = dict.fromkeys(FACTS) | {"mountpoint": "/other", "pid": 5}
    assert facts[1] == silent
    answers[:] = [_sample(13, 11), _sample(22, 200)]
    assert [found.facts()["requests"] for found in looks.look()] == [1, None]


def test_latencies() -> None:
    """In seconds; their classes are a few percent wide."""
    facts = Activity(_mount("one"), Span(_sample(1, 1), _sample(2, 101, *[1000] * 99, 10**9)), 5).facts()
    assert 0.9e-6 < facts["p50"] < 1.1e-6
    assert 0.9e-6 < facts["p99"] < 1.1e-6
    slow = Activity(_mount("one"), Span(_sample(1, 1), _sample(2, 5, 1000, 1000, 1000, 10**9)), 5).facts()
    assert 0.9e-6 < slow["p50"] < 1.1e-6
    assert 0.9 < slow["p99"] < 1.1
    assert slow["upper_free"] == 5


def test_the_space_of_an_upper(tmp_path: Path) -> None:
    found = overview._free(_mount("one", str(tmp_path)))
    space = os.statvfs(tmp_path)
    assert found is not None
    assert abs(found - space.f_bavail * space.f_frsize) < 1 << 30
    assert overview._free(_mount("one", str(tmp_path / "none"))) is None
    assert overview._free(_mount("one")) is None
