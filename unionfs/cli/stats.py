"""`unionfs stats`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import click

from unionfs.cli.completing import complete_mountpoints
from unionfs.cli.finding import find_mount
from unionfs.cli.run import complain, moment, on_terminal, print_table, terminal_table
from unionfs.daemon.exposition import SCRAPE_SECONDS, exposition
from unionfs.daemon.live import LiveMount
from unionfs.daemon.stats import COUNTERS, Kind, MountGoneError, NoAnswerError, Snapshot, Span, snapshot
from unionfs.errors import quoted

_Table = tuple[Sequence[str], Sequence[Sequence[str]]]
# The daemon measures this much longer than the span, in case this process is delayed.
_SPARE_SECONDS = 5.0


@click.command(
    epilog="""\b
Examples:
  unionfs stats /mnt
  unionfs stats --watch /mnt
  unionfs stats --prometheus /mnt
""",
)
@click.option("--watch", is_flag=True, help="Repeat, until Ctrl-C or unmounting.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object; with --watch one per line.")
@click.option("--prometheus", is_flag=True, help="Print Prometheus's text format immediately.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, 600),
    default=1.0,
    show_default=True,
    help="The measured span; 0: only totals since the mount.",
)
@click.argument("mountpoint", shell_complete=complete_mountpoints)
def stats(mountpoint: str, watch: bool, as_json: bool, prometheus: bool, seconds: float) -> int:
    """Show the activity of the mount at MOUNTPOINT: requests by kind, latency, bytes, copy-ups, state.

    REQUESTS and TOTAL count since the mount. PER SECOND, P50 and P99 cover one second (or --seconds), which
    the daemon measures on demand. Half (P50) and 99 % (P99) of the requests in that second took at most that
    long, from the kernel's request to the daemon's answer; accurate to 6.25 %. Bytes count data that passes
    through the daemon, without passthrough and page cache hits.

    With --prometheus the daemon measures for the next 150 seconds, so that regular calls within that time
    return the latency of all requests, as a histogram.
    """
    if prometheus and (watch or as_json):
        raise click.UsageError("--prometheus cannot be combined with --watch or --json")
    if watch and seconds < 0.1:
        raise click.UsageError("--watch needs --seconds of at least 0.1")
    mount = find_mount(mountpoint)
    if prometheus:
        sys.stdout.buffer.write(exposition(mount, snapshot(mount, SCRAPE_SECONDS)).encode("utf-8"))
        sys.stdout.buffer.flush()
        return 0
    if watch:
        return _watch(mount, seconds, as_json=as_json)
    span = _span(mount, seconds)
    if as_json:
        print(json.dumps(_json(mount, span), indent=2))
        return 0
    for index, table in enumerate(tables(mount, span)):
        if index:
            print()
        print_table(*table)
    return 0


def _span(mount: LiveMount, seconds: float) -> Span:
    if seconds == 0:
        return Span(None, snapshot(mount, 0))
    earlier = snapshot(mount, seconds + _SPARE_SECONDS)
    time.sleep(seconds)
    return Span(earlier, snapshot(mount, 0))


# -- --watch ------------------------------------------------------------------------------------------


def _watch(mount: LiveMount, seconds: float, *, as_json: bool) -> int:
    """Repeat until Ctrl-C, which is not an error (as with watch(1) and top(1))."""
    try:
        if as_json:
            _follow(mount, seconds, lambda span: print(json.dumps(_json(mount, span)), flush=True))
        elif on_terminal():
            _on_terminal(mount, seconds)
        else:
            _follow(mount, seconds, lambda span: _print_block(mount, span))
    except KeyboardInterrupt:
        return 0
    except MountGoneError as gone:
        return complain("unionfs", str(gone), 0)
    return 0


def _follow(mount: LiveMount, seconds: float, show: Callable[[Span], None]) -> None:
    """Show every span; ends only by an exception."""
    earlier = _ask_until_answered(mount, seconds)
    due = time.monotonic() + seconds
    while True:
        time.sleep(max(0.0, due - time.monotonic()))
        due = max(due + seconds, time.monotonic())
        now = _ask_until_answered(mount, seconds)
        show(Span(earlier, now))
        earlier = now


def _ask_until_answered(mount: LiveMount, seconds: float) -> Snapshot:
    """Return a snapshot; retry while the daemon does not answer."""
    told = False
    while True:
        try:
            return snapshot(mount, seconds + _SPARE_SECONDS)
        except NoAnswerError as error:
            if not told:
                complain("unionfs", f"{error} Retrying.")
            told = True
            time.sleep(0.2)


def _on_terminal(mount: LiveMount, seconds: float) -> None:
    # For start-up time: only a terminal needs it.
    from rich.console import Group
    from rich.live import Live

    with Live(auto_refresh=False, vertical_overflow="ellipsis") as screen:
        _follow(
            mount,
            seconds,
            lambda span: screen.update(
                Group(*(terminal_table(*table) for table in tables(mount, span))), refresh=True
            ),
        )


def _print_block(mount: LiveMount, span: Span) -> None:
    for table in tables(mount, span):
        print_table(*table)
        print()
    sys.stdout.flush()


# -- output -------------------------------------------------------------------------------------------


def _json(mount: LiveMount, span: Span) -> dict[str, Any]:
    return {
        "mountpoint": mount.settings.mountpoint,
        "pid": mount.pid,
        "since": moment(mount.since, "milliseconds"),
        "time": moment(time.time(), "milliseconds"),
        **span.to_json(),
    }


def tables(mount: LiveMount, span: Span) -> list[_Table]:
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
    ]
    return [
        (("REQUEST", "REQUESTS", "PER SECOND", "P50", "P99"), requests),
        (("COUNTER", "TOTAL", "PER SECOND"), counters),
        (("STATE", "NOW"), states),
    ]


def _row(name: str, kind: Kind) -> tuple[str, ...]:
    rate = "-" if kind.per_second is None else f"{kind.per_second:.1f}"
    return name, str(kind.total), rate, *(shown_duration(kind.latency.quantile(part)) for part in (0.5, 0.99))


def shown_duration(ns: float | None) -> str:
    """Format a duration with three digits, the accuracy of the measurement."""
    if ns is None:
        return "-"
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size:
            value = ns / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    return f"{ns:.0f} ns"


def shown_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _amount(name: str, value: float, *, rate: bool = False) -> str:
    if name.endswith("bytes"):
        return shown_bytes(value)
    if name.endswith("seconds"):
        return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.1f} s"
    return f"{value:.1f}" if rate else f"{value:.0f}"


def _states(states: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in states.items():
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
