"""A small process that unmounts in order what a killed daemon leaves.

While a union with storage lives, its guardian waits for the daemon's end. A daemon that ends by itself says
so before; when it is killed (SIGKILL, out of memory) the guardian unmounts what was mounted into the union,
last first, then the dead union, and gives the volumes back.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from unionfs.sys.process import standard_files_to_null

_DISMISSED = b"."
_LONGEST = 64
_PR_SET_NAME = 15  # linux/prctl.h


class Guardian:
    """The daemon's end of a guardian."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def tell(self, device: str) -> None:
        """The union is mounted, and this is its `major:minor`."""
        with suppress(OSError):
            os.write(self._pipe, device.encode("ascii"))

    def dismiss(self) -> None:
        """All is unmounted; the guardian ends without a deed."""
        if self._pipe >= 0:
            with suppress(OSError):
                os.write(self._pipe, _DISMISSED)
            os.close(self._pipe)
            self._pipe = -1


def start(clear: Callable[[str], object]) -> Guardian:
    """Fork a guardian of this process, which calls `clear(device)` when this process is killed.

    `device` is what it was told, empty if nothing.

    To be called while there is one thread and nothing is open that must not outlive the daemon: layers, the
    FUSE device. Raises OSError.
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
        # Ctrl-C in the terminal of a daemon in the foreground is for the daemon.
        os.setsid()
        os.chdir("/")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        standard_files_to_null()
        # Above the two numbers they move to, so that neither takes the other's.
        daemon, reader = fcntl.fcntl(daemon, fcntl.F_DUPFD, 5), fcntl.fcntl(reader, fcntl.F_DUPFD, 5)
        daemon, reader = os.dup2(daemon, 3, inheritable=False), os.dup2(reader, 4, inheritable=False)
        os.closerange(5, 2**31 - 1)
        ctypes.CDLL(None).prctl(_PR_SET_NAME, b"unionfs-guard", 0, 0, 0)
        told = b""
        while (more := os.read(reader, _LONGEST)) and not more.endswith(_DISMISSED):
            told += more
        if more:
            os._exit(0)
        # The pipe may be closed before the process is gone, and with it the FUSE connection.
        poll = select.poll()
        poll.register(daemon, select.POLLIN)
        poll.poll()
        clear(told.decode("ascii"))
    finally:
        os._exit(0)
