"""A small process that cleans up after a killed one.

A guardian waits for the end of the process that started it. A process that ends normally dismisses it first;
if it is killed (SIGKILL, out of memory), the guardian runs the cleanup.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import NoReturn

from unionfs.sys.calls import prctl
from unionfs.sys.fds import Owned, Returned, close_quietly
from unionfs.sys.process import to_null

_DISMISSED = b"."
_LONGEST = 64
_PR_SET_NAME = 15  # linux/prctl.h


class Guardian:
    def __init__(self, pipe: int, pid: int) -> None:
        """`pipe`: an fd of it, that only the guarded processes have."""
        self._pipe = pipe
        self.pid = pid

    def kept(self) -> tuple[int, int]:
        """What another process that has inherited the fd needs to be guarded in place of this one."""
        return self._pipe, self.pid

    def tell(self, text: str) -> None:
        """Send something that the cleanup needs, in ASCII."""
        with suppress(OSError):
            os.write(self._pipe, text.encode("ascii"))

    def dismiss(self) -> None:
        """End the guardian without a cleanup. When this returns, it holds no file any more."""
        if self._pipe >= 0:
            with suppress(ProcessLookupError), Owned(os.pidfd_open(self.pid)) as ends:
                with suppress(OSError):
                    os.write(self._pipe, _DISMISSED)
                _await_end(ends)
            os.close(self._pipe)
            self._pipe = -1
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)


def _await_end(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()


def start(clear: Callable[[str], object], keep: int = -1) -> Guardian:
    """Fork a guardian that calls `clear(text)` if this process is killed, with what `Guardian.tell` sent.

    It keeps none of this process's files but `keep`, an fd that becomes 5. A process that inherits the pipe
    is guarded too: nothing is cleared before that one has ended.

    Call it while the process has one thread, and before opening what must not outlive the process. Raises
    OSError.
    """
    with ExitStack() as ends:
        watched = ends.enter_context(Owned(os.pidfd_open(os.getpid())))
        reader, writer = os.pipe()
        ends.callback(close_quietly, reader)
        with Returned(writer):
            pid = os.fork()
            if pid == 0:
                _guard([watched, reader, *([keep] if keep >= 0 else [])], clear)
    return Guardian(writer, pid)


def _guard(fds: list[int], clear: Callable[[str], object]) -> NoReturn:
    try:
        # Ctrl-C in the terminal is for the other process only.
        os.setsid()
        os.chdir("/")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        to_null(range(3))
        # First above their final numbers, from 3 on, so that none overwrites another.
        above = [fcntl.fcntl(fd, fcntl.F_DUPFD, 3 + len(fds)) for fd in fds]
        for final, fd in enumerate(above, 3):
            os.dup2(fd, final, inheritable=False)
        watched, reader = 3, 4
        os.closerange(3 + len(fds), 2**31 - 1)
        prctl(_PR_SET_NAME, b"unionfs-guard")
        told = b""
        while (more := os.read(reader, _LONGEST)) and not more.endswith(_DISMISSED):
            told += more
        if more:
            os._exit(0)
        # The pipe may close before the process, and with it the FUSE connection, is gone.
        _await_end(watched)
        clear(told.decode("ascii"))
    finally:
        os._exit(0)
