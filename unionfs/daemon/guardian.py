"""A small process that cleans up after a killed daemon.

While a union with storage is mounted, its guardian waits for the daemon's end. A daemon that ends normally
dismisses it first. If the daemon is killed (SIGKILL, out of memory), the guardian unmounts the storage inside
the union, last first, then the dead union, and releases the volumes.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from unionfs.sys.calls import prctl
from unionfs.sys.process import standard_files_to_null

_DISMISSED = b"."
_LONGEST = 64
_PR_SET_NAME = 15  # linux/prctl.h


class Guardian:
    """The daemon's handle on its guardian."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def tell(self, device: str) -> None:
        """Send the `major:minor` of the mounted union."""
        with suppress(OSError):
            os.write(self._pipe, device.encode("ascii"))

    def dismiss(self) -> None:
        """End the guardian without cleanup: everything is unmounted."""
        if self._pipe >= 0:
            with suppress(OSError):
                os.write(self._pipe, _DISMISSED)
            os.close(self._pipe)
            self._pipe = -1


def start(clear: Callable[[str], object]) -> Guardian:
    """Fork a guardian that calls `clear(device)` if this process is killed.

    `device` is the argument of `Guardian.tell`, or empty.

    Call it while the process has one thread, and before opening what must not outlive the daemon (layers,
    the FUSE device). Raises OSError.
    """
    daemon = os.pidfd_open(os.getpid())
    reader, writer = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        os.close(writer)
        raise
    else:
        if pid == 0:
            _guard(daemon, reader, clear)
    finally:
        os.close(daemon)
        os.close(reader)
    return Guardian(writer)


def _guard(daemon: int, reader: int, clear: Callable[[str], object]) -> NoReturn:
    try:
        # Ctrl-C in the terminal of a foreground daemon is for the daemon only.
        os.setsid()
        os.chdir("/")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        standard_files_to_null()
        # First above their final numbers, so that neither overwrites the other.
        daemon, reader = fcntl.fcntl(daemon, fcntl.F_DUPFD, 5), fcntl.fcntl(reader, fcntl.F_DUPFD, 5)
        daemon, reader = os.dup2(daemon, 3, inheritable=False), os.dup2(reader, 4, inheritable=False)
        os.closerange(5, 2**31 - 1)
        prctl(_PR_SET_NAME, b"unionfs-guard")
        told = b""
        while (more := os.read(reader, _LONGEST)) and not more.endswith(_DISMISSED):
            told += more
        if more:
            os._exit(0)
        # The pipe may close before the process, and with it the FUSE connection, is gone.
        poll = select.poll()
        poll.register(daemon, select.POLLIN)
        poll.poll()
        clear(told.decode("ascii"))
    finally:
        os._exit(0)
