"""Plots and the history behind them."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("hypercorn", reason="the extra `web` is not installed")

from hypothesis import given
from hypothesis import strategies as st

from unionfs.web.facts import text_of
from unionfs.web.history import KEPT, SAMPLES, History, Point
from unionfs.web.plots import UNITS, Series, plot, sparkline


def lines(figure: str) -> list[list[tuple[float, float]]]:
    found = ElementTree.fromstring(figure).iter()
    points = [one.get("points", "") for one in found if one.tag == "polyline"]
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split())] for text in points]


def test_a_line_is_to_scale() -> None:
    ((first, second, third),) = lines(plot("T", "rate", Series("s", [(0, 0), (50, 50), (100, 100)])))
    assert first[0] < second[0] < third[0]
    assert first[1] > second[1] > third[1]
    assert math.isclose(second[0] - first[0], third[0] - second[0], abs_tol=0.2)
    assert math.isclose(first[1] - second[1], second[1] - third[1], abs_tol=0.2)


def test_what_is_not_known_is_a_gap() -> None:
    points: list[Point] = [(0, 1), (10, 1), (20, None), (30, 2), (40, 2), (50, None), (60, 3)]
    figure = plot("T", "rate", Series("s", points))
    assert [len(line) for line in lines(figure)] == [2, 2]
    assert figure.count("<circle") == 1
    assert [len(line) for line in lines(sparkline(points))] == [2, 2]


def test_the_caption_has_the_latest_values() -> None:
    figure = plot("Latency", "seconds", Series("p50", [(0, 1e-6), (1, 25.6e-6)]), Series("p99", [(0, None)]))
    assert "p50 <b>25.6 µs</b>" in figure
    assert "p99 <b>-</b>" in figure


def test_words_are_escaped() -> None:
    figure = plot("<i>", "rate", Series("\"'><b>", []))
    assert "<i>" not in figure
    ElementTree.fromstring(figure)


@given(
    st.lists(st.one_of(st.none(), st.floats(0, 1e18)), max_size=30), st.sampled_from(sorted(UNITS)),
    st.floats(0, 4e9),
)  # fmt: skip
def test_everything_is_inside(values: list[float | None], unit: str, begin: float) -> None:
    points = [(begin + 5 * number, value) for number, value in enumerate(values)]
    figures = (plot("T", unit, Series("s", points)), 360, 150), (sparkline(points), 96, 20)
    for figure, width, height in figures:
        ElementTree.fromstring(figure)
        for line in lines(figure):
            assert all(0 <= x <= width and 0 <= y <= height for x, y in line)
        assert not re.search(r"\bnan\b|\binf\b", figure)


def sample(at: float, **requests: float | None) -> dict[str, Any]:
    mounts = [
        {"name": name, "facts": {**dict.fromkeys(KEPT), "requests": value}, "tables": []}
        for name, value in requests.items()
    ]
    return {"at": at, "mounts": mounts, "dead": []}


@pytest.mark.parametrize(("name", "text"), [
    ("plain <b>", "plain <b>"), (b"\xffa", "\\xffa"), ("\udcffa", "\\xffa"), ("\ud800", "\\ud800"),
    ("a\nb", "a\\nb"), ("\u202e", "\\u202e"), ("", ""),
])  # fmt: skip
def test_names_as_text(name: bytes | str, text: str) -> None:
    assert text_of(name) == text


def test_history() -> None:
    history = History()
    history.add(sample(1, a=1, b=2))
    history.add(sample(2, a=3, b=None))
    assert history.mounts["a"].points("requests") == [(1, 1), (2, 3)]
    assert history.sums("requests") == [(1, 3), (2, 3)]
    assert history.sums("memory") == [(1, None), (2, None)]
    history.add({"at": 3, "error": "why"})
    assert history.failure == "why"
    assert list(history.mounts) == ["a", "b"]
    history.add(sample(4, b=1))
    assert (list(history.mounts), history.failure) == (["b"], "")


def test_history_is_bounded() -> None:
    history = History()
    for at in range(SAMPLES + 10):
        history.add(sample(at, a=at))
    assert len(history.mounts["a"].points("requests")) == len(history.sums("requests")) == SAMPLES
    assert history.sums("requests")[0] == (10, 10)
