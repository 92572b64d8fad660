"""The statistics of a mount as tables of words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unionfs.daemon.described import copying_up
from unionfs.daemon.live import LiveMount
from unionfs.daemon.stats import COUNTERS, Kind, Span
from unionfs.errors import quoted
from unionfs.settings.words import shown_bytes, shown_duration

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Headings and rows."""


def tables(mount: LiveMount, span: Span) -> list[Table]:
    """Return requests by kind, counters and the state."""
    # Most frequent first: a small terminal shows only the beginning.
    kinds = sorted(
        span.kinds().items(), key=lambda item: (-(item[1].per_second or 0), -item[1].total, item[0])
    )
    requests = [_row(name, kind) for name, kind in [("all", span.all_kinds()), *kinds]]
    counters = [
        (COUNTERS[name], _amount(name, total), "-" if rate is None else _amount(name, rate, rate=True))
        for name, (total, rate) in span.counters().items()
    ]
    states = [
        ("mountpoint", quoted(mount.settings.mountpoint)),
        ("daemon", f"pid {mount.pid}, session {span.now.session}, io {span.now.io}"),
        *_states(span.states()),
        *(("copying up", line) for line in copying_up(span.now.figures)),
    ]
    return [
        (("REQUEST", "REQUESTS", "PER SECOND", "P50", "P99"), requests),
        (("COUNTER", "TOTAL", "PER SECOND"), counters),
        (("STATE", "NOW"), states),
    ]


def _row(name: str, kind: Kind) -> tuple[str, ...]:
    rate = "-" if kind.per_second is None else f"{kind.per_second:.1f}"
    return name, str(kind.total), rate, *(shown_duration(kind.latency.quantile(part)) for part in (0.5, 0.99))


def _amount(name: str, value: float, *, rate: bool = False) -> str:
    if name.endswith("bytes"):
        return shown_bytes(value)
    if name.endswith("seconds"):
        return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.1f} s"
    return f"{value:.1f}" if rate else f"{value:.0f}"


def _states(states: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in states.items():
        if isinstance(value, list):
            continue  # a row for each
        if isinstance(value, dict):
            shown = ", ".join(f"{_words(key)} {_state(key, item)}" for key, item in value.items())
        else:
            shown = _state(name, value)
        rows.append((_words(name), shown))
    return rows


def _words(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _state(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return shown_bytes(value) if name.endswith("bytes") and isinstance(value, int | float) else str(value)
