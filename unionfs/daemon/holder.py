"""The daemon's side of the holder: what another daemon needs to take the mount over, and the holder's life.

See `core.holder` and `core.state`. A daemon that ends on purpose ends its holder first.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import unionfs
from unionfs.core import holder
from unionfs.core.state import VERSION, State, StateError
from unionfs.sys.mountinfo import MountEntry
from unionfs.sys.process import close_files_but

_DEATHS: Final = 10
"""After so many deaths within a minute no other daemon is started, if UNIONFS_DEATHS does not say
otherwise."""
MODULE: Final = "unionfs.daemon.takeover"

log = logging.getLogger(__name__)


class Holder:
    """The holder of this process's files."""

    def __init__(self, state: State, former: int | None = None) -> None:
        """`former`: the pid of the holder that started this process."""
        self.state = state
        self._former = former
        self._pid = 0
        self._watched = -1

    def start(self, settings: Mapping[str, Any], device: int, mount: MountEntry | None) -> str:
        """Start it, with the values that `takeover` reads; then end the former one. Returns why there is
        none, as a clause, else an empty text."""
        if mount is not None and _lies_on(mount.device):
            return "this program lies on the union itself"
        text = json.dumps(settings).encode("ascii")
        try:
            self.state.keep(text, self._command(), _environment(), _limit())
            self._watched = os.pidfd_open(os.getpid())
            self._pid = holder.start(self.state, self._watched, device)
        except (OSError, StateError) as error:
            return str(error)
        if self._former is not None:
            with suppress(ProcessLookupError):
                os.kill(self._former, signal.SIGKILL)
            self._former = None
        return ""

    def _command(self) -> list[bytes]:
        return [os.fsencode(word) for word in (sys.executable, "-P", "-m", MODULE, str(self.state.fd))]

    @property
    def is_there(self) -> bool:
        """Whether one starts another daemon when this process dies: this one's, or the former one's."""
        return self._pid != 0 or self._former is not None

    @property
    def pid(self) -> int:
        """Its pid; 0: there is none."""
        return self._pid

    def exchange(self) -> str:
        """Prepare for the end of this process, after which the holder starts the installed version.
        Returns why that cannot be, as a clause, else an empty text."""
        if not self._pid:
            return "it has no holder"
        if self.state.is_full:
            return "the state has no room for all nodes"
        asked = subprocess.run(
            [sys.executable, "-P", "-m", MODULE, "--version"],
            capture_output=True, text=True, check=False, timeout=30
        )
        version = asked.stdout.strip()
        if asked.returncode != 0 or not version:
            return f"the installed version does not start ({asked.stderr.strip().splitlines()[-1:]})"
        if version != str(VERSION):
            return f"the installed version keeps the state in another way (version {version}, not {VERSION})"
        self.state.exchange()
        return ""

    def end(self) -> None:
        """End it, so that nothing but this process has its files open."""
        self.state.end()
        if self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(self._pid, 0)
            self._pid = 0


def _lies_on(device: str) -> bool:
    """Whether the interpreter or this package is on a mount: then no other daemon could be started."""
    number = os.makedev(*(int(part) for part in device.split(":")))
    return any(os.stat(path).st_dev == number for path in (sys.executable, os.__file__, unionfs.__file__))


def _environment() -> list[bytes]:
    return [name + b"=" + value for name, value in os.environb.items()]


def _limit() -> int:
    try:
        return int(os.environ.get("UNIONFS_DEATHS", _DEATHS))
    except ValueError:
        return _DEATHS


def close_others(kept: set[int]) -> None:
    """Close the files that a former daemon had open, but for `kept`; those are not inherited any more."""
    close_files_but(kept)
    for fd in kept:
        with suppress(OSError):
            os.set_inheritable(fd, False)
