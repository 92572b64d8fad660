"""What changed between two runs, against counting by hand and published tables."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.perf import commands
from benchmarks.perf.compare import Change, Comparison, chance, compare, smallest_chance
from benchmarks.perf.results import save
from tests.perf.runs import READ, UNTAR, run_of

_REPOSITORY = Path(__file__).parents[2]
FEW = st.lists(st.integers(0, 6), min_size=1, max_size=4)


def _by_hand(old: Sequence[float], new: Sequence[float]) -> float:
    """Mann and Whitney's U of every way to deal: how often a new sample is the larger one, a tie half."""
    both = [*old, *new]

    def distance(chosen: tuple[int, ...]) -> float:
        others = [both[index] for index in range(len(both)) if index not in chosen]
        wins = sum((both[index] > it) + (both[index] == it) / 2 for index in chosen for it in others)
        return abs(wins - len(old) * len(new) / 2)

    seen = distance(tuple(range(len(old), len(both))))
    deals = list(itertools.combinations(range(len(both)), len(new)))
    return sum(distance(deal) >= seen for deal in deals) / len(deals)


@given(FEW, FEW)
def test_chance_is_the_share_of_deals(old: list[int], new: list[int]) -> None:
    assert chance(old, new) == pytest.approx(_by_hand(old, new))


# As textbooks print them for p <= 0.05, two-sided: the largest U that is significant.
@pytest.mark.parametrize(("n", "m", "critical"), [(4, 4, 0), (5, 5, 2), (5, 8, 6), (8, 8, 13), (10, 10, 23)])
def test_chance_agrees_with_tables(n: int, m: int, critical: int) -> None:
    def with_u(u: int) -> tuple[list[float], list[float]]:
        """Samples where `u` pairs have the new one smaller."""
        old = [10.0 * (place + 1) for place in range(n)]
        new = [1000.0 + place for place in range(m)]
        for place in range(m):
            below = min(u, n)  # so many of the old lie above this one
            u -= below
            if below:
                new[place] = old[n - below] - 1 - place / 100
        return old, new

    assert chance(*with_u(critical)) <= 0.05 < chance(*with_u(critical + 1))


def test_smallest_chance_is_that_of_separate_runs() -> None:
    assert smallest_chance(3, 3) == pytest.approx(0.1)
    assert chance([1, 2, 3], [4, 5, 6]) == pytest.approx(0.1)
    assert chance([1, 2, 3, 4, 5], [6, 7, 8]) == pytest.approx(smallest_chance(5, 3))


def _find(found: Comparison, contestant: str) -> Change:
    (change,) = [each for each in found.changes if each.contestant == contestant]
    return change


_OVERLAYFS = [100.0, 102.0, 101.0]


@pytest.mark.parametrize(
    ("hybrid", "overlayfs", "verdict", "ratio", "relative"),
    [
        pytest.param([500.0, 510.0, 505.0], _OVERLAYFS, "better", 1010 / 505, 2.0, id="twice as fast"),
        pytest.param([2000.0, 2040.0, 2020.0], _OVERLAYFS, "worse", 0.5, 0.5, id="half as fast"),
        pytest.param([1001.0, 1021.0, 1009.0], _OVERLAYFS, "same", 1.001, 1.001, id="no change"),
        pytest.param([500.0, 2000.0, 505.0], _OVERLAYFS, "same", 2.0, 2.0, id="one round is odd"),
        pytest.param([2000.0, 2040.0, 2020.0], [200.0, 204.0, 202.0], "alike", 0.5, 1.0, id="slower machine"),
        pytest.param([1000.0, 1020.0, 1010.0], [200.0, 204.0, 202.0], "gained", 1.0, 2.0, id="slower"),
        pytest.param([1000.0, 1020, 1010], [50.0, 51, 50.5], "lost", 1, .5, id="faster"),
        pytest.param([500.0, 510.0], _OVERLAYFS, "unknown", 2.0, 2.0, id="two rounds"),
        pytest.param([975.0, 970.0, 972.0], _OVERLAYFS, "same", 1010 / 972, 1010 / 972, id="clear but small"),
    ],
)  # fmt: skip
def test_verdicts(
    hybrid: list[float], overlayfs: list[float], verdict: str, ratio: float, relative: float
) -> None:
    old = run_of({UNTAR: {"overlayfs": _OVERLAYFS, "hybrid": [1000.0, 1020.0, 1010.0]}})
    new = run_of({UNTAR: {"overlayfs": overlayfs, "hybrid": hybrid}})
    change = _find(compare(old, new), "hybrid")
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(ratio, rel=0.01)
    assert change.relative == pytest.approx(relative, rel=0.01)


def test_more_is_better_for_throughput_and_the_largest_comes_first() -> None:
    old = run_of({READ: {"hybrid": [100.0, 101, 102]}, UNTAR: {"hybrid": [10.0, 10.1, 10.2]}})
    new = run_of({READ: {"hybrid": [300.0, 303, 306]}, UNTAR: {"hybrid": [20.0, 20.2, 20.4]}})
    first, second = compare(old, new).changes
    assert (first.figure, first.verdict) == (READ, "better")
    assert first.ratio == pytest.approx(3.0)
    assert (second.figure, second.verdict) == (UNTAR, "worse")
    assert second.ratio == pytest.approx(0.5)


def test_requests_an_operation_are_compared() -> None:
    def run(requests: int) -> object:
        return run_of({}, requests=[{"lookup": requests, "open": 10}] * 3, operations=[10.0] * 3)

    found = compare(run(90), run(40))  # type: ignore[arg-type]
    (change,) = found.changes
    assert (change.old, change.new, change.verdict) == (10.0, 5.0, "better")


def test_what_only_one_has_and_what_differs_around() -> None:
    old = run_of({UNTAR: {"hybrid": [1.0] * 3, "cached": [1.0] * 3}})
    new = run_of(
        {UNTAR: {"hybrid": [1.0] * 3}, READ: {"hybrid": [1.0]}},
        machine={"kernel": "6.19", "cpus": 2, "cpu": "a CPU", "python": "3.11"},
        settings={"rounds": 5},
    )
    found = compare(old, new)
    assert found.only_old == [("untar", "cached")]
    assert found.only_new == [("lower-seqread cold", "")]
    assert found.machine == [("kernel", "6.18", "6.19")]
    assert found.settings == [("rounds", "3", "5")]
    console = Console(file=io.StringIO(), width=150)
    commands.print_comparison(console, found, everything=True, threshold=0.05)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "Other hosts: kernel 6.18 -> 6.19",
        "rounds 3 -> 5",
        "untar on cached",
        "lower-seqread cold",
    ):
        assert part in text


def test_zero_and_negative_medians_are_no_ratios() -> None:
    old = run_of({UNTAR: {"hybrid": [0.0, 0.0, 0.0], "cached": [-1.0, -2.0, -3.0]}})
    new = run_of({UNTAR: {"hybrid": [5.0, 5.0, 5.0], "cached": [1.0, 2.0, 3.0]}})
    assert {change.ratio for change in compare(old, new).changes} == {None}
    assert {change.verdict for change in compare(old, new).changes} == {"unknown"}


def test_the_command_ends_with_0_whatever_changed(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    save(run_of({UNTAR: {"hybrid": [100.0, 101.0, 102.0], "overlayfs": [10.0, 11.0, 12.0]}}), old)
    save(run_of({UNTAR: {"hybrid": [300.0, 301.0, 302.0], "overlayfs": [10.0, 11.0, 12.0]}}), new)
    command = [sys.executable, "-m", "benchmarks.perf", "compare", str(old), str(new)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=_REPOSITORY, timeout=60, check=True)
    assert "x0.34" in done.stdout
    assert "worse" in done.stdout
    told = subprocess.run([*command, "--json"], capture_output=True, cwd=_REPOSITORY, timeout=60, check=True)
    changes = {each["contestant"]: each for each in json.loads(told.stdout)["changes"]}
    assert changes["hybrid"]["verdict"] == "worse"
    assert changes["hybrid"]["relative"] == pytest.approx(101 / 301)
    assert changes["overlayfs"]["verdict"] == "same"
