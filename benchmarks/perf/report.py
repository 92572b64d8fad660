"""What a run found, as tables and as JSON."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.perf.contestants import FUSE_OVERLAYFS, OVERLAYFS
from benchmarks.perf.figures import Daemon, Figure, Results
from benchmarks.perf.workloads import Workload

_TITLES = {
    "fio": "Throughput",
    "files": "Small cached files",
    "metadata": "Metadata, cold",
    "nodes": "A large tree",
}
_TOP_KINDS = 4


def shown(value: float) -> str:
    """Three significant digits, and no fewer digits than there are before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def make_console() -> Console:
    """For standard output; wide enough for all columns where no terminal tells its width."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 150)


def machine() -> dict[str, object]:
    """What figures depend on."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "cpu": model,
    }


def print_contestants(console: Console, versions: Mapping[str, str], missing: Mapping[str, str]) -> None:
    """Who took part in which version, who did not and why."""
    facts = machine()
    console.print(f"Linux {facts['kernel']}, Python {facts['python']}, {facts['cpus']} x {facts['cpu']}")
    for name, version in versions.items():
        console.print(f"  {name:16}{version}")
    for name, reason in missing.items():
        console.print(Text(f"  {name:16}missing: {reason}", style="yellow"))


def _table(title: str, heading: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_lines=False)
    table.add_column(heading, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _cell(results: Results, figure: Figure, name: str) -> Text:
    median = results.median(figure, name)
    if median is None:
        return Text("-", style="dim")
    ratios = [results.ratio(figure, name, other) for other in (OVERLAYFS, FUSE_OVERLAYFS)]
    text = Text(shown(median))
    if any(ratio is not None for ratio in ratios):
        words = ("-" if ratio is None else f"x{shown(ratio)}" for ratio in ratios)
        text.append("\n" + " ".join(words), style="dim")
    return text


def print_results(
    console: Console, results: Results, workloads: Sequence[Workload], columns: Sequence[str], rounds: int
) -> None:
    """The tables: a group each, then what it cost in the daemons, then what failed."""
    console.print(
        f"\nMedians of up to {rounds} rounds. Below each: how many times as good as {OVERLAYFS}, and as "
        f"{FUSE_OVERLAYFS} (above 1 is better)."
    )
    for group, title in _TITLES.items():
        figures = [
            figure
            for workload in workloads
            for figure in workload.figures
            if figure.group == group and figure in results.samples
        ]
        if not figures:
            continue
        table = _table(title, "", columns)
        for figure in figures:
            label = Text(figure.name).append(f"\n{figure.unit}", style="dim")
            table.add_row(label, *(_cell(results, figure, name) for name in columns))
        console.print(table)
    _print_daemons(console, results, workloads, columns)
    for (workload, name), reason in results.failures.items():
        console.print(Text(f"{workload} on {name} failed: {reason}", style="yellow"))


def _daemon_cell(daemon: Daemon | None, entries: int) -> Text:
    if daemon is None or not daemon.cpu_seconds:
        return Text("-", style="dim")
    text = Text(f"{shown(daemon.milliseconds())} ms")
    each = daemon.microseconds_each()
    if each is None:
        return text
    kinds = daemon.request_medians()
    total = sum(kinds.values())
    text.append(f"\n{shown(each)} µs each\n{total:,} requests")
    if entries > 1:
        text.append(f"\n{shown(total / entries)} an entry")
    for kind, count in list(kinds.items())[:_TOP_KINDS]:
        if count:
            text.append(f"\n{kind} {count:,}", style="dim")
    return text


def _print_daemons(
    console: Console, results: Results, workloads: Sequence[Workload], columns: Sequence[str]
) -> None:
    present = [name for name in columns if any(name in by_name for by_name in results.daemons.values())]
    if not present:
        return
    table = _table("CPU time of the daemon, and its requests", "", present)
    for workload in workloads:
        daemons = results.daemons.get(workload.name)
        if daemons:
            cells = (_daemon_cell(daemons.get(name), workload.entries) for name in present)
            table.add_row(workload.name, *cells, end_section=True)
    console.print(table)
