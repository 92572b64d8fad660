"""Memory that the daemons of one resident have in common."""

from __future__ import annotations

import logging
import os

import trio

from unionfs.core.samepages import SamePages

# Mounts that are gone by the first one do not need it. Worker threads of the start have ended by the second
# one: trio's wait 10 seconds for more work.
_TRIES_SECONDS = (2, 15, 60)

log = logging.getLogger(__name__)


async def share_memory(pages: SamePages) -> None:
    """Share this process's memory with the other daemons, in steps of about a millisecond; close `pages`."""
    try:
        for seconds in _TRIES_SECONDS:
            await trio.sleep(seconds)
            if _is_alone() and pages.begin() and await _adopt(pages):
                return
    except OSError as error:
        log.debug("memory is not shared: %s", error)
    finally:
        pages.close()


async def _adopt(pages: SamePages) -> bool:
    """Returns False if a thread has been started meanwhile."""
    steps = pages.adopt()
    while _is_alone():
        if next(steps, None) is None:
            return True
        await trio.lowlevel.checkpoint()
    return False


def _is_alone() -> bool:
    """Return whether this process has one thread. Source: fs/proc/base.c, proc_task_getattr."""
    return os.stat("/proc/self/task").st_nlink == 3
