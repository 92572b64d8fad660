"""The activity of all mounts at once: one span of statistics for each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from unionfs.daemon.live import LiveMount, live_mounts
from unionfs.daemon.stats import Sample, Span, sample
from unionfs.errors import UserError
from unionfs.sys.child import run_child
from unionfs.sys.fds import Owned

_SPACE_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Activity:
    """A mount, and what it did between two looks."""

    mount: LiveMount
    span: Span | None
    """None: its daemon does not answer."""
    free: int | None
    """Bytes that the upper's filesystem has left; None without an upper, or if it does not answer."""

    def facts(self) -> dict[str, Any]:
        """Return plain values; rates are per second, times in seconds, sizes in bytes. None: not known."""
        found: dict[str, Any] = dict.fromkeys(FACTS)
        found["mountpoint"], found["pid"] = self.mount.settings.mountpoint, self.mount.pid
        found["upper_free"] = self.free
        if self.span is None:
            return found
        every, counters = self.span.all_kinds(), self.span.counters()
        nothing = (None, None)
        return found | {
            "requests": every.per_second,
            "p50": _seconds(every.latency.quantile(0.5)),
            "p99": _seconds(every.latency.quantile(0.99)),
            "read": counters.get("read_bytes", nothing)[1],
            "written": counters.get("written_bytes", nothing)[1],
            "copy_ups": counters.get("copy_ups", nothing)[0],
            "copying_up": self.span.now.figures.get("copying_up"),
            "memory": self.span.states().get("resident_bytes"),
        }


FACTS: Final = (
    "mountpoint", "pid", "requests", "p50", "p99", "read", "written", "copy_ups", "copying_up", "memory",
    "upper_free",
)  # fmt: skip


def _seconds(ns: float | None) -> float | None:
    return None if ns is None else ns / 1e9


class Overview:
    """Looks at all of this user's mounts again and again."""

    def __init__(self, watch_seconds: float) -> None:
        """The daemons measure latencies for `watch_seconds` after each look."""
        self._watch = watch_seconds
        self._before: Mapping[str, Sample] = {}

    def look(self) -> Sequence[Activity]:
        """Return the activity of each mount since the look before, the oldest mount first."""
        found, now = [], {}
        for mount in live_mounts():
            span = None
            with suppress(UserError):
                now[mount.name] = sample(mount, self._watch)
                span = Span(self._before.get(mount.name), now[mount.name])
            found.append(Activity(mount, span, _free(mount)))
        self._before = now
        return found


def _free(mount: LiveMount) -> int | None:
    """In a child, which a filesystem that hangs does not keep."""
    upper = mount.settings.upper
    if upper is None:
        return None
    reader, writer = os.pipe()

    def ask() -> int:
        space = os.statvfs(upper)
        os.write(writer, str(space.f_bavail * space.f_frsize).encode())
        return 0

    with Owned(reader), Owned(writer):
        return int(os.read(reader, 32)) if run_child(ask, _SPACE_SECONDS) == 0 else None
