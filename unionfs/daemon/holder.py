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
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, Final

import trio

import unionfs
from unionfs.core import holder, marks
from unionfs.core.state import VERSION, State, StateError
from unionfs.daemon.confine import confine
from unionfs.settings.mount import MountSettings
from unionfs.sys.fds import Owned
from unionfs.sys.mountinfo import mounts_of_device
from unionfs.sys.process import close_files_but

_DEATHS: Final = 10
"""After so many deaths within a minute no other daemon is started, if UNIONFS_DEATHS does not say
otherwise."""
MODULE: Final = "unionfs.daemon.takeover"

log = logging.getLogger(__name__)


class Holder:
    """The holder of this process's files."""

    def __init__(self, state: State, former: int | None = None, *, stays: bool = False) -> None:
        """`former`: the pid of the holder that started this process. `stays`: the parent of this process is
        the holder and stays in charge, see `daemon.anew`."""
        self.state = state
        self.stays = stays
        self._former = former
        self._pid = 0
        self._parent = os.getppid() if stays else 0
        self._in_charge = False
        self._program = _program()  # found before there is a mount: afterwards this process would ask itself

    def fork(self, settings: MountSettings) -> bool:
        """Fork it, before this process opens the mount's files or starts a thread. Returns False in another
        daemon, which it forks when this one has died. Raises OSError."""
        watched = os.pidfd_open(os.getpid())
        self._pid = holder.share()
        if self._pid:
            return True
        try:
            # The next daemon inherits its rights, which must not be more than this one has by then. What
            # remains of the caller's limits this one logs.
            logging.disable()
            confine(settings)
            logging.disable(logging.NOTSET)
            holder.hold(self.state, watched)
        except BaseException:
            log.exception("the holder failed")
            os._exit(1)
        return False

    def take_charge(self, device: int) -> None:
        """From now on it starts the next daemon; the former one ends. `device`: the fd of /dev/fuse; -1: the
        next daemon mounts anew."""
        self.state.has_holder(self._parent or self._pid, device)
        self._in_charge = True
        if self._former is not None:
            with suppress(ProcessLookupError):
                os.kill(self._former, signal.SIGKILL)
            self._former = None

    def lies_on(self, device: str) -> bool:
        """Whether the interpreter or this package is on a mount, by `major:minor`, or on one inside it: then
        no other daemon could be started. Asks no server."""
        tops = [mount.mountpoint.rstrip("/") + "/" for mount in mounts_of_device(device)]
        return any(path.startswith(top) for path in self._program for top in tops)

    def start(self, values: Mapping[str, Any], device: int) -> str:
        """Keep the values that `takeover` reads, and let it take charge. Returns why it cannot, as a clause,
        else an empty text."""
        try:
            if self._has_ended():
                return "its holder ended"
            self.keep(values)
        except (OSError, StateError) as error:
            return str(error)
        self.take_charge(device)
        return ""

    def keep(self, values: Mapping[str, Any]) -> None:
        """Keep the values that `takeover` reads. Raises StateError."""
        text = json.dumps(values).encode("ascii")
        self.state.keep(text, self._command(), _environment(), _limit())

    def _command(self) -> list[bytes]:
        return [os.fsencode(word) for word in (sys.executable, "-P", "-m", MODULE, str(self.state.fd))]

    def _has_ended(self) -> bool:
        if self.stays:
            return os.getppid() != self._parent
        if self._pid and os.waitpid(self._pid, os.WNOHANG)[0]:
            self._pid = 0  # another process may have it from now on
        return self._pid == 0

    async def ended(self) -> None:
        """Return when somebody else has ended the holder in charge; then there is none. Raises OSError."""
        with suppress(ProcessLookupError), Owned(os.pidfd_open(self.pid)) as holder:
            await trio.lowlevel.wait_readable(holder)
        self._has_ended()
        self._in_charge = False

    @property
    def is_there(self) -> bool:
        """Whether one starts another daemon when this process dies: this one's, or the former one's."""
        return self._in_charge or self._former is not None

    @property
    def pid(self) -> int:
        """Its pid; 0: there is none in charge."""
        return (self._parent or self._pid) if self._in_charge else 0

    def exchange(self) -> str:
        """Prepare for the end of this process, after which the holder starts the installed version.
        Returns why that cannot be, as a clause, else an empty text."""
        if not self._in_charge:
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
        """End it, so that nothing but this process has its files open. One that stays tries again if there is
        no mount yet."""
        if self._in_charge or not self.stays:
            self.state.end()
        if self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(self._pid, 0)
            self._pid, self._in_charge = 0, False


def _program() -> set[str]:
    """The files of the interpreter and of this package, and their directories, which may have a link to them;
    each with a slash at its end."""
    files = (sys.executable, os.__file__, unionfs.__file__)
    return {os.path.realpath(path) + "/" for file in files for path in (file, os.path.dirname(file))}


def _environment() -> list[bytes]:
    return [name + b"=" + value for name, value in os.environb.items()]


def _limit() -> int:
    try:
        return int(os.environ.get("UNIONFS_DEATHS", _DEATHS))
    except ValueError:
        return _DEATHS


def open_on(devices: Collection[int]) -> set[int]:
    """The fds by which files or directories on these devices are open. Asks no server."""
    if not devices:
        return set()
    with os.scandir("/proc/self/fd") as entries:
        fds = {int(entry.name) for entry in entries}
    return {fd for fd in fds if fd > 2 and marks.device(fd) in devices}


def close_others(kept: set[int]) -> None:
    """Close the files that a former daemon had open, but for `kept`; those are not inherited any more."""
    close_files_but(kept)
    for fd in kept:
        with suppress(OSError):
            os.set_inheritable(fd, False)
