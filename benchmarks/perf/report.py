"""The results of a run, as tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.perf.figures import Daemon, Figure, shown
from benchmarks.perf.results import OVERLAYFS, Run, Scalar, spread

_TOP_KINDS = 4


def make_console() -> Console:
    """A console for standard output; wide enough for all columns if it is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 170)


def print_contestants(
    console: Console, machine: Mapping[str, Scalar], versions: Mapping[str, str], missing: Mapping[str, str]
) -> None:
    """The host, the contestants' versions, and the missing ones with reasons."""
    console.print(Text(
        f"{machine['system']}, Linux {machine['kernel']}, {machine['cpus']} x {machine['cpu']}, "
        f"{machine['memory_mib']} MiB; layers on {machine['filesystem']}\n"
        f"Python {machine['python']}, {machine['tools']}"
    ))  # fmt: skip
    for name, version in versions.items():
        console.print(Text(f"  {name:16}{version}"))
    for name, reason in missing.items():
        console.print(Text(f"  {name:16}missing: {reason}", style="yellow"))


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_lines=False)
    table.add_column("", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _cell(run: Run, figure: Figure, name: str, peer: str | None) -> Text:
    median = run.results.median(figure, name)
    if median is None:
        return Text("-", style="dim")
    samples = run.results.samples[figure][name]
    text = Text(shown(median))
    if len(samples) > 1:
        low, high = spread(samples)
        text.append(f"\n{shown(low)}-{shown(high)}", style="dim")
    ratios = [
        None if other is None else run.results.ratio(figure, name, other) for other in (OVERLAYFS, peer)
    ]
    if any(ratio is not None for ratio in ratios):
        words = ("-" if ratio is None else f"x{shown(ratio)}" for ratio in ratios)
        text.append("\n" + " ".join(words), style="dim")
    return text


def print_results(console: Console, run: Run) -> None:
    """The tables: one per group, then the daemons' costs, then what is missing."""
    columns = [each.name for each in run.present()]
    console.print(
        f"\nMedians of up to {run.settings['rounds']} rounds. Below them the minimum and maximum, and how "
        f"many times as good as {OVERLAYFS}, and as the best of the other FUSE unions, whose name is at the "
        "left (above 1 is better)."
    )
    for group, title in run.groups.items():
        figures = [figure for figure in run.results.samples if figure.group == group]
        if not figures:
            continue
        # A contestant without figures in a group would only make its table wider.
        shows = [name for name in columns if any(name in run.results.samples[figure] for figure in figures)]
        table = _table(title, shows)
        for figure in figures:
            peer = run.best_peer(figure)
            label = Text(figure.name).append(f"\n{figure.unit}", style="dim")
            if peer is not None:
                label.append(f"\n{peer}", style="dim")
            table.add_row(label, *(_cell(run, figure, name, peer) for name in shows), end_section=True)
        console.print(table)
    _print_daemons(console, run)
    _print_missing(console, run)


def _daemon_cell(daemon: Daemon | None, operation: str) -> Text:
    if daemon is None or not daemon.cpu_seconds:
        return Text("-", style="dim")
    text = Text(f"{shown(daemon.milliseconds())} ms")
    each = daemon.microseconds_each()
    if each is None:
        return text
    kinds = daemon.request_medians()
    text.append(f"\n{shown(each)} µs each\n{sum(kinds.values()):,} requests")
    requests = daemon.requests_each()
    if requests is not None:
        text.append(f"\n{shown(requests)} per {operation}")
    for kind, count in list(kinds.items())[:_TOP_KINDS]:
        if count:
            text.append(f"\n{kind} {count:,}", style="dim")
    return text


def _print_daemons(console: Console, run: Run) -> None:
    daemons = run.results.daemons
    named = {name for by_name in daemons.values() for name in by_name}
    present = [each.name for each in run.contestants if each.name in named]
    if not present:
        return
    table = _table("CPU time of the daemon, and its requests", present)
    for workload in run.workloads:
        found = daemons.get(workload.name)
        if found:
            cells = (_daemon_cell(found.get(name), workload.operation) for name in present)
            table.add_row(workload.name, *cells, end_section=True)
    console.print(table)


def _print_missing(console: Console, run: Run) -> None:
    """What has no figure: first what was not measured, then what failed."""
    together: dict[tuple[str, str], list[str]] = {}
    for (workload, name), reason in run.results.skipped.items():
        together.setdefault((name or "all", reason), []).append(workload)
    for (name, reason), workloads in together.items():
        words = ", ".join(workloads) if len(workloads) <= 4 else f"{len(workloads)} workloads"
        console.print(Text(f"Not measured on {name}: {words}: {reason}", style="dim"))
    for (workload, name), reason in run.results.failures.items():
        console.print(Text(f"{workload} on {name} failed: {reason}", style="yellow"))
