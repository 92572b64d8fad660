"""`unionfs stats`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import click

from unionfs.cli.common import complain, on_terminal, print_json, print_table, terminal_table
from unionfs.cli.completing import complete_mountpoints
from unionfs.cli.finding import find_mount
from unionfs.daemon.exposition import SCRAPE_SECONDS, exposition
from unionfs.daemon.live import LiveMount
from unionfs.daemon.stats import MountGoneError, NoAnswerError, Sample, Span, sample
from unionfs.daemon.stats_tables import tables
from unionfs.settings.words import moment

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
        sys.stdout.buffer.write(exposition(mount, sample(mount, SCRAPE_SECONDS)).encode("utf-8"))
        sys.stdout.buffer.flush()
        return 0
    if watch:
        return _watch(mount, seconds, as_json=as_json)
    span = _span(mount, seconds)
    if as_json:
        print_json(_json(mount, span))
        return 0
    for index, table in enumerate(tables(mount, span)):
        if index:
            print()
        print_table(*table)
    return 0


def _span(mount: LiveMount, seconds: float) -> Span:
    if seconds == 0:
        return Span(None, sample(mount, 0))
    earlier = sample(mount, seconds + _SPARE_SECONDS)
    time.sleep(seconds)
    return Span(earlier, sample(mount, 0))


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


def _ask_until_answered(mount: LiveMount, seconds: float) -> Sample:
    """Return a sample; retry while the daemon does not answer."""
    told = False
    while True:
        try:
            return sample(mount, seconds + _SPARE_SECONDS)
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
