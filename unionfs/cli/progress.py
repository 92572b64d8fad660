"""The progress of long operations on stderr: a bar on a terminal, or lines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final, TextIO, TypeVar

import click

from unionfs.settings.sizes import shown_size
from unionfs.settings.words import printable, shown_clock
from unionfs.storage.archive.progress import Progress, Shows

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
    return None if how == "none" or not sys.stderr.isatty() else partial(_shown, _Bar)


@contextmanager
def shown_progress(what: str, how: str) -> Iterator[Progress | None]:
    """Show how far an operation is; `how` is one of the words of `--progress`."""
    shows = progress_of(how)
    if shows is None:
        yield None
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

    def _print(self, text: str, end: str = "\n") -> None:
        with suppress(OSError):  # nobody looks any more
            print(text, file=self._stream, flush=True, end=end)


@contextmanager
def _shown(kind: type[_Timed], what: str, stream: TextIO) -> Iterator[Progress]:
    shown = kind(what, stream)
    try:
        yield shown
        shown.finish()
    finally:
        shown.close()


class _Bar(_Timed):
    """One line of a terminal, which goes at the end."""

    def __init__(self, what: str, stream: TextIO) -> None:
        super().__init__(what, stream)
        self._is_there = False

    def show(self) -> None:
        if not self._is_there and time.monotonic() < self._began + _BAR_SECONDS:
            return
        self._is_there = True
        done, bar = self.share, ""
        if done is not None:
            full = round(done * _BAR_COLUMNS)
            bar = f"[{'#' * full}{'-' * (_BAR_COLUMNS - full)}] "
        self._print(f"\r{f'{self._what}: {bar}{self.words()}'[: self._room()]}\x1b[K", "")

    def _room(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns - 1 or 79
        except OSError:
            return 79

    def close(self) -> None:
        if self._is_there:
            self._print("\r\x1b[K", "")


class _Lines(_Timed):
    """Prints a line a second, and one at the end."""

    def __init__(self, what: str, stream: TextIO) -> None:
        super().__init__(what, stream)
        self._next_line = time.monotonic() + _LINE_SECONDS

    def show(self) -> None:
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_SECONDS
            self._print(f"unionfs: {self._what}: {self.words()}")

    def finish(self) -> None:
        self._print(f"unionfs: {self._what}: done")
