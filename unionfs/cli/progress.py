"""The progress of long operations on stderr: a bar on a terminal, or lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from unionfs.settings.sizes import shown_size
from unionfs.settings.words import printable, shown_clock
from unionfs.storage.archive.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_F = TypeVar("_F", bound=Callable[..., Any])
_LINE_SECONDS = 1.0


def progress_option(command: _F) -> _F:
    """Add `--progress`; the command receives `progress`, for `shown_progress`."""
    return click.option(
        "--progress", type=click.Choice(("auto", "plain", "none")), default="auto", show_default=True,
        help="A bar if stderr is a terminal; lines, one a second; or nothing.",
    )(command)  # fmt: skip


@contextmanager
def shown_progress(what: str, how: str) -> Iterator[Progress | None]:
    """Show how far an operation is; `how` is one of the words of `--progress`."""
    if how == "plain":
        lines = _Lines(what)
        yield lines
        lines.finish()
    elif how == "none" or not sys.stderr.isatty():
        yield None
    else:
        with ExitStack() as bars:
            yield _OnTerminal(what, bars)


class _Timed(Progress):
    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()

    def words(self) -> str:
        """Return entries, bytes, share, rate and time left."""
        passed = max(time.monotonic() - self._began, 1e-3)
        share = self.share
        parts = [f"{self.entries} entries", shown_size(self.size)]
        if share is not None:
            parts.append(f"{100 * share:.0f} %")
        parts.append(f"{shown_size(int(self.size / passed))}/s")
        if share:
            parts.append(f"{shown_clock(passed * (1 - share) / share)} left")
        return ", ".join(parts)


class _OnTerminal(_Timed):
    """A bar from the first step on: there may be none, as for an image that is in the store."""

    def __init__(self, what: str, bars: ExitStack) -> None:
        super().__init__()
        self._what = what
        self._bars = bars
        self._bar: Bar | None = None

    def show(self) -> None:
        if self._bar is None:
            self._bar = self._bars.enter_context(_bar())
            self._task = self._bar.add_task(printable(self._what), total=None, done="")
        share = self.share
        self._bar.update(
            self._task, done=self.words(), completed=share or 0, total=None if share is None else 1.0
        )


def _bar() -> Bar:
    # For start-up time: only a terminal needs it.
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=20),
        TextColumn("{task.fields[done]}"), TimeElapsedColumn(),
    )  # fmt: skip
    return Bar(*columns, console=Console(stderr=True), transient=True)


class _Lines(_Timed):
    """Prints a line a second, and one at the end."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what
        self._next_line = time.monotonic() + _LINE_SECONDS

    def show(self) -> None:
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_SECONDS
            self._print(self.words())

    def finish(self) -> None:
        self._print("done")

    def _print(self, text: str) -> None:
        print(f"unionfs: {self._what}: {text}", file=sys.stderr, flush=True)
