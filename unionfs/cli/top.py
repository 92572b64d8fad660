"""`unionfs top`: the activity of all mounts."""

from __future__ import annotations

import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import click

from unionfs.cli.common import on_terminal, print_json, print_table, terminal_table
from unionfs.daemon.described import copying_up
from unionfs.daemon.overview import Activity, Overview
from unionfs.daemon.stats_tables import tables
from unionfs.errors import quoted
from unionfs.settings.words import shown_bytes, shown_duration

_SPARE_SECONDS: Final = 5.0
_SORTS: Final = {
    "n": "mountpoint", "r": "requests", "l": "p99", "i": "read", "o": "written", "c": "copy_ups",
    "m": "memory", "f": "upper_free",
}  # fmt: skip
_ASCENDING: Final = ("mountpoint", "upper_free")
_OTHER_COLUMNS: Final = 76
"""The width of all columns but the mountpoint's, with the space between them."""
_KEYS: Final = "sort: n r l i o c m f   up, down, Enter: one mount   Esc: back   q: quit"
_UP, _DOWN, _ENTER, _ESCAPE = "\x1b[A", "\x1b[B", ("\r", "\n"), "\x1b"


@click.command(
    epilog="""\b
Examples:
  unionfs top
  unionfs top --sort memory
  unionfs top --once --json
""",
)
@click.option("--sort", type=click.Choice(list(_SORTS.values())), default="requests", show_default=True,
              help="The column to sort by, the busiest first.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0.1, 600), default=1.0, show_default=True,
              help="The measured span.")  # fmt: skip
@click.option("--once", is_flag=True, help="Print one table and end; as if stdout is not a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def top(sort: str, seconds: float, once: bool, as_json: bool) -> None:
    """Show the activity of all mounts of this user, continuously.

    \b
    REQ/S      requests a second         P50, P99  their latency
    READ/S     bytes through the daemon  WRITE/S   (not passed through)
    COPY-UPS   since the mount           MEMORY    of the daemon
    FREE       space of the upper's filesystem

    Below the table: large files that are being copied up, how far, and the time left.

    A container with another storage driver than union has no daemon and none of these figures: `unionfs ps`
    lists it.

    Keys sort: n (name), r (requests), l (latency), i (read), o (written), c (copy-ups), m (memory), f (free).
    The arrows and Enter look into one mount, as `unionfs stats --watch`; Esc goes back, q ends.
    """
    overview = Overview(seconds + _SPARE_SECONDS)
    overview.look()
    if once or as_json or not (on_terminal() and sys.stdin.isatty()):
        time.sleep(seconds)
        found = _sorted(overview.look(), sort)
        if as_json:
            print_json([one.facts() for one in found])
        else:
            print_table(_HEADINGS, [_row(one.facts()) for one in found])
            for line in _copying_up(found):
                print(line)
        return
    with _single_keys():
        _Screen(overview, sort, seconds).run()


_HEADINGS: Final = (
    "MOUNTPOINT", "REQ/S", "P50", "P99", "READ/S", "WRITE/S", "COPY-UPS", "MEMORY", "FREE",
)  # fmt: skip


def _row(facts: Mapping[str, Any]) -> list[str]:
    def size(name: str) -> str:
        return "-" if facts[name] is None else shown_bytes(facts[name])

    return [
        quoted(facts["mountpoint"]),
        "-" if facts["requests"] is None else f"{facts['requests']:.0f}",
        *(shown_duration(None if facts[name] is None else facts[name] * 1e9) for name in ("p50", "p99")),
        size("read"),
        size("written"),
        "-" if facts["copy_ups"] is None else str(int(facts["copy_ups"])),
        size("memory"),
        size("upper_free"),
    ]


def _copying_up(found: Sequence[Activity]) -> list[str]:
    """A line for each file that is being copied up."""
    return [
        f"{quoted(one.mount.settings.mountpoint)}: copying up {line}"
        for one in found
        if one.span is not None
        for line in copying_up(one.span.now.figures)
    ]


def _sorted(found: Sequence[Activity], key: str) -> list[Activity]:
    """The busiest first; what is not known last."""

    def order(one: Activity) -> tuple[bool, Any]:
        value = one.facts()[key]
        if value is None or isinstance(value, str):
            return value is None, value or ""
        return False, value if key in _ASCENDING else -value

    return sorted(found, key=order)


@contextmanager
def _single_keys() -> Iterator[None]:
    """Let each key arrive at once, without echo."""
    before = termios.tcgetattr(0)
    try:
        tty.setcbreak(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


class _Screen:
    """The live table, and what was chosen in it."""

    def __init__(self, overview: Overview, sort: str, seconds: float) -> None:
        self._overview = overview
        self._sort = sort
        self._seconds = seconds
        self._found: list[Activity] = []
        self._chosen: str | None = None
        self._inside = False

    def run(self) -> None:
        """Show, until q or Ctrl-C."""
        # For start-up time: only a terminal needs it.
        from rich.live import Live

        with Live(auto_refresh=False, screen=True, vertical_overflow="ellipsis") as live:
            due = time.monotonic() + self._seconds
            while True:
                live.update(self._shown(), refresh=True)
                keys = self._keys(max(0.0, due - time.monotonic()))
                if "q" in keys:
                    return
                for key in keys:
                    self._pressed(key)
                if keys:
                    continue
                due = time.monotonic() + self._seconds
                self._found = list(self._overview.look())

    @staticmethod
    def _keys(seconds: float) -> list[str]:
        """Wait at most `seconds` for keys; an arrow is a sequence of three characters."""
        try:
            if not select.select([0], [], [], seconds)[0]:
                return []
            return re.findall(r"\x1b\[.|.|\n", os.read(0, 64).decode(errors="replace")) or ["q"]
        except KeyboardInterrupt:
            return ["q"]

    def _pressed(self, key: str) -> None:
        names = [one.mount.name for one in _sorted(self._found, self._sort)]
        at = names.index(self._chosen) if self._chosen in names else -1
        if key in _SORTS:
            self._sort = _SORTS[key]
        elif key in (_UP, _DOWN) and names:
            self._chosen = names[max(0, min(len(names) - 1, at + (1 if key == _DOWN else -1)))]
        elif key in _ENTER and at >= 0:
            self._inside = True
        elif key == _ESCAPE:
            self._inside = False

    def _shown(self) -> Any:
        # For start-up time: only a terminal needs it.
        from rich.console import Group
        from rich.text import Text

        rows = _sorted(self._found, self._sort)
        inside = next((one for one in rows if self._inside and one.mount.name == self._chosen), None)
        if inside is not None and inside.span is not None:
            parts = [terminal_table(*table) for table in tables(inside.mount, inside.span)]
            return Group(*parts, Text(_KEYS, style="dim"))
        room = max(os.get_terminal_size(1).columns - _OTHER_COLUMNS, 12)
        cells = [_row(one.facts()) for one in rows]
        for row in cells:
            row[0] = row[0] if len(row[0]) <= room else f"…{row[0][1 - room :]}"
        table = terminal_table(_HEADINGS, cells)
        for column in table.columns:
            column.no_wrap = True
        for number, one in enumerate(rows):
            if one.mount.name == self._chosen:
                table.rows[number].style = "reverse"
        told = f"{len(rows)} mounts, sorted by {self._sort.replace('_', ' ')}" if rows else "no mounts"
        more = [Text(line) for line in _copying_up(rows)]
        return Group(Text(told), table, *more, Text(_KEYS, style="dim"))
