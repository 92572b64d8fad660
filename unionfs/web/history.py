"""The figures of the last while, in memory: a ring of samples for each mount."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

KEPT: Final = ("requests", "p50", "p99", "read", "written", "copy_ups", "memory", "upper_free")
"""The facts of a mount that are kept over time; see `Activity.facts`."""
SAMPLES: Final = 360
_SUMS: Final = ("requests", "read", "written", "memory")

Point = tuple[float, float | None]
"""Seconds since the epoch, and a value; None if it was not known."""


class Followed:
    """One mount."""

    def __init__(self) -> None:
        self.facts: Mapping[str, Any] = {}
        """The latest ones."""
        self.tables: Sequence[Any] = ()
        self._points: deque[tuple[float, tuple[float | None, ...]]] = deque(maxlen=SAMPLES)

    def add(self, at: float, facts: Mapping[str, Any], tables: Sequence[Any]) -> None:
        self.facts, self.tables = facts, tables
        self._points.append((at, tuple(facts[name] for name in KEPT)))

    def points(self, name: str) -> list[Point]:
        """Return the course of one of `KEPT`, the oldest first."""
        index = KEPT.index(name)
        return [(at, values[index]) for at, values in self._points]


class History:
    """All mounts that are there now."""

    def __init__(self) -> None:
        self.mounts: dict[str, Followed] = {}
        """By the name of their registry entry, in the order of their making."""
        self.dead: Sequence[str] = ()
        """Mountpoints whose daemon has died."""
        self.failure = ""
        """Why there are no new figures; empty if there are."""
        self._sums: deque[tuple[float, tuple[float | None, ...]]] = deque(maxlen=SAMPLES)

    def add(self, sample: Mapping[str, Any]) -> None:
        """Take a line of `sample_forever`; forget mounts that are gone."""
        self.failure = sample.get("error", "")
        if self.failure:
            return
        at, found = sample["at"], {}
        for one in sample["mounts"]:
            followed = self.mounts.get(one["name"]) or Followed()
            followed.add(at, one["facts"], one["tables"])
            found[one["name"]] = followed
        self.mounts, self.dead = found, sample["dead"]
        sums = (_sum(one["facts"][name] for one in sample["mounts"]) for name in _SUMS)
        self._sums.append((at, tuple(sums)))

    def fail(self, sentence: str) -> None:
        """Remember why no samples arrive any more."""
        self.failure = sentence

    def sums(self, name: str) -> list[Point]:
        """Return the course of one of `_SUMS` over all mounts."""
        index = _SUMS.index(name)
        return [(at, values[index]) for at, values in self._sums]


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
