"""The progress of long operations on stderr: a bar on a terminal, or lines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TextIO, TypeVar

import click

from unionfs.settings.sizes import shown_size
from unionfs.settings.words import printable, shown_clock
from unionfs.storage.archive.progress import UNSEEN, Progress, Shows

if TYPE_CHECKING:
    from rich.progress import Progress as Drawn

_F = TypeVar("_F", bound=Callable[..., Any])
_LINE_SECONDS = 1.0
_BAR_SECONDS: Final = 0.3
"""What ends sooner has no bar."""
_BAR_COLUMNS: Final = 20


def progress_option(command: _F) -> _F:
    """Add `--progress`; the command receives `progress`, for `shown_progress`."""
    return click.option(
        "--progress", type=click.Choice(("auto", "plain", "none")), default="auto", show_default=True,
        help="A bar if stderr is a terminal; lines, one a second; or nothing.",
    )(command)  # fmt: skip


def progress_of(how: str) -> Shows | None:
    """Return what shows how far operations are, on the terminal or in the file of stderr; None: nothing does.

    `how` is one of the words of `--progress`.
    """
    if how == "plain":
        return partial(_shown, _Lines)
    no_bar = how == "none" or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty()
    return None if no_bar else partial(_shown, _Bar)


@contextmanager
def shown_progress(what: str, how: str) -> Iterator[Progress]:
    """Show how far an operation is; `how` is one of the words of `--progress`."""
    shows = progress_of(how)
    if shows is None:
        yield UNSEEN
        return
    with shows(what, sys.stderr) as shown:
        yield shown


class _Timed(Progress):
    def __init__(self, what: str, stream: TextIO) -> None:
        super().__init__()
        self._what = printable(what)
        self._stream = stream
        self._began = time.monotonic()

    def finish(self) -> None:
        """The operation has ended well."""

    def close(self) -> None:
        """The operation has ended."""

    def words(self) -> str:
        """Return entries, bytes, share, rate and time left."""
        passed = max(time.monotonic() - self._began, 1e-3)
        share = self.share
        parts = [shown_size(self.size)]
        if self.entries:
            parts.insert(0, f"{self.entries} {'entry' if self.entries == 1 else 'entries'}")
        if share is not None:
            parts.append(f"{100 * share:.0f} %")
        parts.append(f"{shown_size(int(self.size / passed))}/s")
        if share:
            parts.append(f"{shown_clock(passed * (1 - share) / share)} left")
        return ", ".join(parts)


@contextmanager
def _shown(kind: type[_Timed], what: str, stream: TextIO) -> Iterator[Progress]:
    shown = kind(what, stream)
    try:
        yield shown
        shown.finish()
    finally:
        shown.close()


class _Bar(_Timed):
    """One line of a terminal, which rich draws and removes at the end."""

    def __init__(self, what: str, stream: TextIO) -> None:
        super().__init__(what, stream)
        self._line: Drawn | None = None

    def show(self) -> None:
        if self._line is None and time.monotonic() < self._began + _BAR_SECONDS:
            return
        with suppress(OSError):  # nobody looks any more
            if self._line is None:
                self._line = _line(self._what, self._stream)
                self._line.start()
            # Rich would ask fds 0 to 2, which in a daemon are not a terminal.
            self._line.console.width = os.get_terminal_size(self._stream.fileno()).columns or 80
            share = self.share
            total = None if share is None else 1.0
            self._line.update(
                self._line.task_ids[0], total=total, completed=share or 0.0, words=self.words(), refresh=True
            )

    def close(self) -> None:
        if self._line is not None:
            with suppress(OSError):
                self._line.stop()


def _line(what: str, stream: TextIO) -> Drawn:
    """Return a line with one task; it has no thread, which would not survive a fork."""
    # For start-up time and the daemon's memory: 30 ms and 2 MB, and most operations have no bar.
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Drawn

    class Screen(Console):
        def show_cursor(self, show: bool = True) -> bool:
            """Leave it: who is stopped or killed could not show it again."""
            return False

    line = Drawn(
        TextColumn("{task.description}:", markup=False), BarColumn(_BAR_COLUMNS),
        TextColumn("{task.fields[words]}", markup=False),
        console=Screen(file=stream), auto_refresh=False, transient=True, redirect_stdout=False,
        redirect_stderr=False,
    )  # fmt: skip
    line.add_task(what, words="")
    return line


class _Lines(_Timed):
    """Prints a line a second, and one at the end."""

    def __init__(self, what: str, stream: TextIO) -> None:
        super().__init__(what, stream)
        self._next_line = time.monotonic() + _LINE_SECONDS

    def show(self) -> None:
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_SECONDS
            self._print(self.words())

    def finish(self) -> None:
        self._print("done")

    def _print(self, text: str) -> None:
        with suppress(OSError):  # nobody looks any more
            print(f"unionfs: {self._what}: {text}", file=self._stream, flush=True)
