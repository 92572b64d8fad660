"""Accesses a path that may be on a filesystem whose server hangs or is dead."""

from __future__ import annotations

import os
from collections.abc import Callable

from unionfs.sys.child import run_child


def look(action: Callable[[], int], seconds: float) -> int | None:
    """Returns the result of `action()` (0 to 254), or the errno of its OSError; None after `seconds`.

    It runs in a child that closes all files of this process: a thread that waits for a FUSE server could not
    be ended. Raises OSError when no process can be started.
    """

    def alone() -> int:
        os.closerange(0, 2**31 - 1)
        return action()

    return run_child(alone, seconds)
