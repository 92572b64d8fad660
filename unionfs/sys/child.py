"""Work in a child process that can be given up: it may wait for a filesystem that never answers."""

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
    """What `action()` returns (0 to 254) in a child, or the errno of its OSError; 255 for another exception.

    None when the child was stopped, killed, or took more than `seconds` (None: no limit); it is killed then,
    but may never end: a wait for a FUSE server cannot be interrupted (fs/fuse/dev.c, request_wait_answer). To
    be called while there is one thread. Raises ``OSError`` when no process can be started.
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
    """The status of a child that has ended or was stopped; None when that takes longer."""
    deadline, pause = None if seconds is None else time.monotonic() + seconds, 0.0002
    while deadline is None or time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WUNTRACED | os.WNOHANG)
        if found:
            return status
        time.sleep(pause)
        pause = min(2 * pause, _POLL_SECONDS)
    return None
