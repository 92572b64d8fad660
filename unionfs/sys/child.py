"""Runs work in a child process that can be abandoned if it blocks on a filesystem that never answers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

_POLL_SECONDS: Final = 0.02
_END_SECONDS: Final = 0.1


def run_child(action: Callable[[], int], seconds: float | None) -> int | None:
    """Run `action` in a child. Returns its result (0 to 254), the errno of its OSError, else 255.

    Returns None if the child was stopped or killed, or took more than `seconds` (None: no limit). It is then
    killed, but may never end: a wait for a FUSE server is uninterruptible (fs/fuse/dev.c,
    request_wait_answer). Call it while the process has one thread. Raises ``OSError`` if fork fails.
    """
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            code = action()
        except OSError as error:
            code = error.errno or code
        finally:
            os._exit(code)
    status = _wait(pid, seconds)
    if status is not None and not os.WIFSTOPPED(status):
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _wait(pid, _END_SECONDS)
    return None


def _wait(pid: int, seconds: float | None) -> int | None:
    """Return the status of a child that has ended or stopped; None after `seconds`."""
    deadline, pause = None if seconds is None else time.monotonic() + seconds, 0.0002
    while deadline is None or time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WUNTRACED | os.WNOHANG)
        if found:
            return status
        time.sleep(pause)
        pause = min(2 * pause, _POLL_SECONDS)
    return None
