"""Statistics of a mount: samples from its daemon, and the difference between two of them.

The daemon measures latencies only for the requested time: see `unionfs.fuse.latency`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from unionfs.daemon.live import LiveMount
from unionfs.errors import UserError, quoted
from unionfs.fuse.latency import Histogram, Latencies

COUNTERS: Final = {
    "read_bytes": "read by the daemon",
    "written_bytes": "written by the daemon",
    "copy_ups": "copy-ups",
    "copied_bytes": "copied up",
    "copy_up_seconds": "time of copy-ups",
    "opened_with_backing_file": "opens passed through",
    "backing_files_refused": "pass-throughs refused",
}
"""Figures that only grow, with their labels; all others are gauges. Not every session has all of them."""

_WATCH: Final = "watch_seconds"
_NS: Final = 1_000_000_000


def more_for(question: dict[str, Any], latencies: Latencies) -> dict[str, Any]:
    """Return what the daemon adds to its answer when it is asked for statistics.

    Latencies are measured for the next `watch_seconds` seconds.
    """
    seconds = question.get(_WATCH)
    if not isinstance(seconds, int | float):
        return {}
    latencies.watch(seconds)
    return {"clock_ns": latencies.clock(), "latencies": latencies.to_json()}


class NoAnswerError(UserError):
    """The daemon is alive but does not answer."""


class MountGoneError(UserError):
    """The mount was unmounted."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A daemon's answer at one moment."""

    clock_ns: int
    """The daemon's clock."""
    session: str
    io: str
    requests: dict[str, int]
    """Since the mount, by kind."""
    figures: dict[str, Any]
    latencies: dict[str, Histogram]
    """Of the requests measured since the mount, by kind."""


def sample(mount: LiveMount, watch_seconds: float) -> Sample:
    """Ask the daemon, and let it measure latencies for `watch_seconds` more.

    Raises NoAnswerError, MountGoneError, and UserError if the daemon has died or is too old.
    """
    answer = mount.ask({_WATCH: watch_seconds})
    if answer is None:
        raise _silence(mount)
    try:
        figures = dict(answer["figures"])
        return Sample(
            clock_ns=int(answer["clock_ns"]),
            session=str(answer["settings"]["session"]),
            io=str(answer["settings"]["io"]),
            requests={str(kind): int(count) for kind, count in figures.pop("requests").items()},
            figures=figures,
            latencies={kind: Histogram.from_json(values) for kind, values in answer["latencies"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"the daemon of {quoted(mount.settings.mountpoint)} (pid {mount.pid}) is of another version and "
            "has no statistics; unmount and mount again, or see `unionfs inspect`."
        ) from error


def _silence(mount: LiveMount) -> UserError:
    name = quoted(mount.settings.mountpoint)
    if not mount.mounts():
        return MountGoneError(f"{name} is not mounted any more.")
    if not mount.is_alive():
        return UserError(
            f"the daemon of {name} (pid {mount.pid}) has died; run `unionfs cleanup {name}`, and mount it "
            "again."
        )
    return NoAnswerError(
        f"the daemon of {name} (pid {mount.pid}) does not answer; it is stopped, or waits for a disk that "
        f"hangs: see `ps -o stat,wchan {mount.pid}`."
    )


@dataclass(frozen=True, slots=True)
class Kind:
    total: int
    """Since the mount."""
    per_second: float | None
    """None: only the total is known."""
    latency: Histogram
    """Of the requests that began and ended within the span."""


@dataclass(frozen=True, slots=True)
class Span:
    """A mount's activity between two samples."""

    earlier: Sample | None
    """None: there is only one sample."""
    now: Sample

    @property
    def seconds(self) -> float:
        """The length of the span; 0 with only one sample."""
        return 0.0 if self.earlier is None else (self.now.clock_ns - self.earlier.clock_ns) / _NS

    def kinds(self) -> dict[str, Kind]:
        return {name: self._kind(name) for name in sorted(self.now.requests)}

    def _kind(self, name: str) -> Kind:
        total = self.now.requests[name]
        latency = self.now.latencies.get(name, Histogram())
        if self.earlier is None or self.seconds <= 0:
            return Kind(total, None, Histogram())
        if (before := self.earlier.latencies.get(name)) is not None:
            latency = latency.since(before)
        return Kind(total, (total - self.earlier.requests.get(name, 0)) / self.seconds, latency)

    def all_kinds(self) -> Kind:
        kinds = self.kinds().values()
        latency = Histogram()
        for kind in kinds:
            latency.add(kind.latency)
        rates = [kind.per_second for kind in kinds if kind.per_second is not None]
        return Kind(sum(kind.total for kind in kinds), sum(rates) if self.seconds > 0 else None, latency)

    def counters(self) -> dict[str, tuple[float, float | None]]:
        """Return (total since the mount, rate per second) of each of COUNTERS."""
        found: dict[str, tuple[float, float | None]] = {}
        for name in COUNTERS:
            total = self.now.figures.get(name)
            if total is None:
                continue
            rate = None
            if self.earlier is not None and self.seconds > 0:
                rate = (total - self.earlier.figures.get(name, 0)) / self.seconds
            found[name] = total, rate
        return found

    def states(self) -> dict[str, Any]:
        """Return the current values of all other figures."""
        return {name: value for name, value in self.now.figures.items() if name not in COUNTERS}

    def to_json(self) -> dict[str, Any]:
        """Return plain values; times in seconds, sizes in bytes."""
        return {
            "session": self.now.session,
            "io": self.now.io,
            "seconds": self.seconds,
            "requests": {name: _kind_json(kind) for name, kind in self.kinds().items()},
            "all_requests": _kind_json(self.all_kinds()),
            "counters": {
                name: {"total": total, "per_second": rate}
                for name, (total, rate) in self.counters().items()
            },
            "state": self.states(),
        }


def _kind_json(kind: Kind) -> dict[str, Any]:
    p50, p99 = kind.latency.quantile(0.5), kind.latency.quantile(0.99)
    latency = None
    if p50 is not None and p99 is not None:
        count = kind.latency.count
        latency = {
            "count": count,
            "mean_seconds": kind.latency.total_ns / count / _NS,
            "p50_seconds": p50 / _NS,
            "p99_seconds": p99 / _NS,
        }
    return {"total": kind.total, "per_second": kind.per_second, "latency": latency}
