"""Starts, times and ends processes, also when the run is interrupted.

A signal raises `Interrupted` in the running code, but not within `held`: so every started process is known
here, and cleaning up always completes. Every process gets its own session (and process group), so that a
Ctrl-C reaches only this program, which then ends the others in order.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

REPOSITORY = Path(__file__).resolve().parents[2]
#: Seconds after which a command is considered hung.
LONGEST = 120.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TICKS = os.sysconf("SC_CLK_TCK")


class Interrupted(BaseException):
    """A signal requested termination; the argument is its number."""


class CommandFailed(Exception):
    """A command failed or did not end; the text is the reason, in one line."""


class _State:
    depth = 0
    pending: int | None = None


def _on_signal(number: int, _frame: FrameType | None) -> None:
    if _State.depth:
        _State.pending = number
        return
    # One is enough: a second one would interrupt the clean-up.
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(number)


def catch_signals() -> None:
    """From now on SIGINT, SIGTERM and SIGHUP raise `Interrupted`."""
    for number in _SIGNALS:
        signal.signal(number, _on_signal)


@contextmanager
def held() -> Iterator[None]:
    """Defer signals within the block."""
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
        if _State.depth == 0 and _State.pending is not None:
            number, _State.pending = _State.pending, None
            _on_signal(number, None)


_started: list[subprocess.Popen[bytes]] = []


def start(command: Sequence[str], *, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a daemon in the foreground; `end` or `end_all` ends it. Raises CommandFailed."""
    return _start(command, REPOSITORY, log, log, None)


def _start(
    command: Sequence[str],
    cwd: Path,
    output: IO[bytes],
    errors: IO[bytes],
    environment: Mapping[str, str] | None,
) -> subprocess.Popen[bytes]:
    with held():
        try:
            process = subprocess.Popen(
                list(command), cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
                env=None if environment is None else {**os.environ, **environment}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise CommandFailed(f"{command[0]}: {error.strerror}") from error
        _started.append(process)
    return process


def wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process ended within that time.

    `Popen.wait` with a time limit looks only every 50 ms, which is longer than many things measured here.
    """
    if process.poll() is None:
        fd = os.pidfd_open(process.pid)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(seconds * 1000)
        finally:
            os.close(fd)
    return process.poll() is not None


def end(process: subprocess.Popen[bytes], *, patience: float = 5.0) -> None:
    """End a process that `start` started, with its whole group: SIGTERM, then SIGKILL."""
    with held():
        for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 10.0)):
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            if wait(process, seconds):
                break
        if process in _started:
            _started.remove(process)


def end_all() -> None:
    """End every remaining process."""
    for process in list(_started):
        end(process, patience=1.0)


@dataclass(frozen=True)
class Done:
    """A command that succeeded."""

    seconds: float
    output: str


def run(
    command: Sequence[str],
    *,
    cwd: Path = REPOSITORY,
    environment: Mapping[str, str] | None = None,
    longest: float = LONGEST,
) -> Done:
    """Run a command and time it, from its start to its end. Raises CommandFailed.

    Its output goes to a file: GNU grep and others do less work if it goes to /dev/null.
    """
    with tempfile.TemporaryFile(dir="/dev/shm") as output, tempfile.TemporaryFile(dir="/dev/shm") as errors:
        began = time.perf_counter()
        process = _start(command, cwd, output, errors, environment)
        try:
            in_time = wait(process, longest)
            seconds = time.perf_counter() - began
        finally:
            end(process, patience=0.5)
        if not in_time:
            raise CommandFailed(f"{command[0]} did not end within {longest:.0f} s")
        if process.returncode != 0:
            errors.seek(0)
            text = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise CommandFailed(f"{Path(command[0]).name} ended with {process.returncode}: {text[-1]}")
        output.seek(0)
        return Done(seconds, output.read().decode(errors="replace"))


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all its threads: proc_pid_stat(5). In steps of a clock tick."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident_bytes(pid: int) -> int:
    """The resident set of a process: VmRSS of proc_pid_status(5)."""
    for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0
