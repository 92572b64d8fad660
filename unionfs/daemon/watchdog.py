"""Tells the service manager that the event loop runs."""

from __future__ import annotations

import trio

from unionfs.sys.manager import Manager


async def watch(manager: Manager) -> None:
    """Tell it for as long as the loop runs: one that hangs is silent, and the manager ends the process."""
    if manager.watchdog_seconds is None:
        return
    while True:
        manager.tell("WATCHDOG=1")
        # Half of the time, as sd_watchdog_enabled(3) recommends.
        await trio.sleep(manager.watchdog_seconds / 2)
