"""Calls of the compiled launcher, and the residents that serve them."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.mount.cli_calls import Done, call, gone, wait_for
from unionfs.daemon.resident import SETTING

LAUNCHER = Path(sys.executable).parent / "fuse-unionfs"
_ELF = b"\x7fELF"


def need_launcher() -> None:
    """Skip the test, with the reason, if this environment has no compiled launcher."""
    if not LAUNCHER.exists() or LAUNCHER.read_bytes()[:4] != _ELF:
        pytest.skip(f"{LAUNCHER} is not the compiled one: run `pip install -e .`")


def launch(*arguments: str | Path, seconds: str = "60", program: Path = LAUNCHER, **extra: Any) -> Done:
    """Run the launcher; `seconds` of life for a resident that it starts, 0 for none."""
    environment = {**extra.pop("env", {}), SETTING: seconds}
    return call((str(program),), *arguments, env=environment, **extra)


def residents(program: Path = LAUNCHER) -> set[int]:
    """The pids of the living residents of this installation."""
    found = set()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            if b"--resident" in words and os.fsencode(program.parent / "unionfs") in words:
                found.add(int(name))
    return {pid for pid in found if not gone(pid)}


def end_residents(number: signal.Signals = signal.SIGTERM, program: Path = LAUNCHER) -> None:
    """End all residents of this installation."""
    pids = residents(program)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    assert wait_for(lambda: all(gone(pid) for pid in pids))
