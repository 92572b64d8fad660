"""Looking at a path that may lead into a filesystem whose server hangs or is dead."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

_POLL_SECONDS = 0.01


def look(action: Callable[[], int], seconds: float) -> int | None:
    """What `action()` returns (0 to 255), or the errno of its OSError; None when `seconds` are not enough.

    A child runs it: a thread that waits for a FUSE server cannot be ended (fs/fuse/dev.c,
    request_wait_answer), and would keep this process from ending. The child may not end either, but nobody
    waits for it, and it keeps no file of this process open. Raises OSError when no process can be started.
    """
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            os.closerange(0, 2**31 - 1)
            code = action()
        except OSError as error:
            code = error.errno or code
        finally:
            os._exit(code)
    deadline, pause = time.monotonic() + seconds, 0.0002
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(2 * pause, _POLL_SECONDS)
    os.kill(pid, signal.SIGKILL)
    return None
