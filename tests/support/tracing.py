"""The system calls of a process and their order, recorded by strace(1).

Only a power cut shows whether data reached the disk. So tests assert that the calls which make it durable are
made, and in which order.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.mount.cli_calls import gone
from tests.support.patience import patient

SYNCS = "fsync,fdatasync,syncfs,sync"
RENAMES = "rename,renameat,renameat2"

_BEGUN = re.compile(r"(?P<pid>\d+) +(?P<name>\w+)\((?P<arguments>.*)")
_RESUMED = re.compile(r"(?P<pid>\d+) +<\.\.\. (?P<name>\w+) resumed>(?P<arguments>.*)")
_DONE = re.compile(r"(?P<arguments>.*)\) += (?P<result>-?\d+|\?).*")


class Call(NamedTuple):
    """A call that has returned; its arguments as strace prints them, file descriptors with their paths."""

    name: str
    arguments: str


class Trace:
    """The calls recorded so far. strace writes a call before the process continues, so all calls of a request
    that has been answered are here."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._seen = 0

    def _lines(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines() if self._log.exists() else []

    def take(self) -> list[Call]:
        """The calls since the last `take`, in the order in which they returned; failed ones are left out."""
        lines = self._lines()
        new, self._seen = lines[self._seen :], len(lines)
        begun: dict[str, str] = {}
        found: list[Call] = []
        for line in new:
            match = _BEGUN.fullmatch(line) or _RESUMED.fullmatch(line)
            if match is None:
                continue
            text = begun.pop(match["pid"], "") + match["arguments"]
            if text.endswith("<unfinished ...>"):
                begun[match["pid"]] = text.removesuffix("<unfinished ...>")
            elif (done := _DONE.fullmatch(text)) and not done["result"].startswith("-"):
                found.append(Call(match["name"], done["arguments"]))
        return found


def in_order(calls: list[Call], *steps: tuple[str, str]) -> bool:
    """Whether the calls contain these steps, (start of the name, part of the arguments), in this order."""
    rest = iter(calls)
    return all(any(c.name.startswith(name) and part in c.arguments for c in rest) for name, part in steps)


def command(log: Path, names: str, *, delay: float = 0) -> list[str]:
    """The start of a command line that records the calls ``names`` of a program and its children.

    The caller of each is held for ``delay`` seconds when it returns. Skips the test where strace is missing.
    """
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    delays = ["-e", f"inject={names}:delay_exit={int(delay * 1e6)}"] if delay else []
    words = ["strace", "-I2", "-f", "-y", "-s", "256", "-e", f"trace={names}", *delays, "-e", "signal=none"]
    return [*words, "-o", str(log)]


@contextlib.contextmanager
def traced(pid: int, log: Path, names: str) -> Iterator[Trace]:
    """Record the calls ``names`` (comma separated) of a process and its threads, which may end meanwhile."""
    process = subprocess.Popen(
        [*command(log, names), "-p", str(pid)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    threading.Thread(target=process.stderr.read, daemon=True).start()
    try:
        assert "attached" in line, line
        yield Trace(log)
    finally:
        # It ends with the traced process. Asked to detach from one that is just ending, it may wait for ever.
        if not gone(pid):
            process.send_signal(signal.SIGINT)
        try:
            process.wait(patient(10))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
