"""Plots over time as SVG, drawn on the server."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from unionfs.settings.words import shown_bytes, shown_duration
from unionfs.web.history import Point

_WIDTH: Final = 360
_HEIGHT: Final = 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 8, 10, 22
_SPARK_WIDTH, _SPARK_HEIGHT = 96, 20
_SHORTEST_SECONDS: Final = 60.0
_LEAST: Final = 1e-9
"""Smaller values are drawn as zero: a nanosecond."""


@dataclass(frozen=True, slots=True)
class Series:
    label: str
    points: Sequence[Point]


def rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def seconds(value: float) -> str:
    return shown_duration(value * 1e9)


UNITS: Final[dict[str, Callable[[float], str]]] = {
    "rate": rate, "count": lambda value: f"{value:.0f}", "bytes": shown_bytes, "seconds": seconds,
}  # fmt: skip


def plot(title: str, unit: str, *series: Series) -> Markup:
    """Return a figure: lines, a scale from 0, and the latest values in its caption. `unit`: of UNITS."""
    shown = UNITS[unit]
    known = [value for one in series for _, value in one.points if value is not None]
    top = _top(max(known, default=0), unit)
    begin, end = _span(series)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(at: float, value: float) -> tuple[float, float]:
        return (
            _LEFT + (at - begin) / (end - begin) * (right - _LEFT),
            bottom - value / top * (bottom - _TOP),
        )

    parts = []
    for value in (0.0, top / 2, top):
        y = place(begin, value)[1]
        parts.append(Markup('<line class="grid" x1="{}" y1="{:.1f}" x2="{}" y2="{:.1f}"/>').format(
            _LEFT, y, right, y
        ))  # fmt: skip
        parts.append(Markup('<text class="y" x="{}" y="{:.1f}">{}</text>').format(
            _LEFT - 6, y + 4, _short(shown(value))
        ))  # fmt: skip
    parts.append(Markup('<text x="{}" y="{}">{}</text>').format(_LEFT, _HEIGHT - 5, _ago(end - begin)))
    parts.append(Markup('<text class="y" x="{}" y="{}">now</text>').format(right, _HEIGHT - 5))
    for number, one in enumerate(series, 1):
        parts += [_line(number, run) for run in _runs(one.points, place)]
    caption = Markup(" ").join(
        Markup('<span class="key k{}">{} <b>{}</b></span>').format(number, one.label, _latest(one, shown))
        for number, one in enumerate(series, 1)
    )
    told = ", ".join(f"{one.label} {_latest(one, shown)}" for one in series)
    return Markup(
        '<figure class="plot"><figcaption><strong>{}</strong> {}</figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}: {}">{}</svg></figure>'
    ).format(title, caption, _WIDTH, _HEIGHT, title, told, Markup("").join(parts))


def sparkline(points: Sequence[Point]) -> Markup:
    """Return a small line without a scale, for a table."""
    begin, end = _span([Series("", points)])
    top = max((value for _, value in points if value is not None), default=0) or 1.0

    def place(at: float, value: float) -> tuple[float, float]:
        return (
            1 + (at - begin) / (end - begin) * (_SPARK_WIDTH - 2),
            _SPARK_HEIGHT - 2 - value / top * (_SPARK_HEIGHT - 4),
        )

    lines = Markup("").join(_line(1, run) for run in _runs(points, place))
    return Markup(
        '<svg class="spark" viewBox="0 0 {} {}" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
    ).format(_SPARK_WIDTH, _SPARK_HEIGHT, lines)


def _span(series: Sequence[Series]) -> tuple[float, float]:
    moments = [at for one in series for at, _ in one.points]
    end = max(moments, default=0.0)
    return min(end - _SHORTEST_SECONDS, min(moments, default=0.0)), end


def _top(most: float, unit: str) -> float:
    """Return a round number that is at least `most`: the end of the scale."""
    if most < _LEAST:
        return {"bytes": 1024.0, "count": 2.0, "seconds": 1e-3}.get(unit, 1.0)
    if unit == "bytes":
        return float(2 ** math.ceil(math.log2(max(most, 2))))
    if unit == "count":
        most = max(most, 2)
    power = 10.0 ** math.floor(math.log10(most))
    return next((step * power for step in (1, 2, 4, 6, 8) if step * power >= most), 10 * power)


def _runs(
    points: Sequence[Point], place: Callable[[float, float], tuple[float, float]]
) -> Iterator[list[tuple[float, float]]]:
    """Yield the stretches without an unknown value."""
    run: list[tuple[float, float]] = []
    for at, value in points:
        if value is not None:
            run.append(place(at, value))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _line(number: int, run: Sequence[tuple[float, float]]) -> Markup:
    if len(run) == 1:
        return Markup('<circle class="s{}" cx="{:.1f}" cy="{:.1f}" r="2"/>').format(number, *run[0])
    dots = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
    return Markup('<polyline class="s{}" points="{}"/>').format(number, dots)


def _latest(one: Series, shown: Callable[[float], str]) -> str:
    value = one.points[-1][1] if one.points else None
    return "-" if value is None else shown(value)


def _short(text: str) -> str:
    """Return a value without trailing zeros: 128 MiB, 0."""
    number, space, unit = text.partition(" ")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return "0" if number == "0" else f"{number}{space}{unit}"


def _ago(span: float) -> str:
    return f"{span / 60:.0f} min ago" if span >= 90 else f"{span:.0f} s ago"
