"""How often a daemon tells its service manager that it runs."""

from __future__ import annotations

from typing import Any

import trio
import trio.testing

from unionfs.daemon import watchdog


class _Manager:
    """Stands for systemd."""

    def __init__(self, seconds: float | None) -> None:
        self.watchdog_seconds = seconds
        self.told: list[tuple[float, tuple[str, ...]]] = []

    def tell(self, *states: str) -> None:
        self.told.append((trio.current_time(), states))


async def test_half_of_the_time(autojump_clock: trio.testing.MockClock) -> None:
    """The first time at once."""
    manager: Any = _Manager(30)
    began = trio.current_time()
    with trio.move_on_after(50):
        await watchdog.watch(manager)
    assert [(time - began, states) for time, states in manager.told] == [
        (after, ("WATCHDOG=1",)) for after in (0, 15, 30, 45)
    ]


async def test_no_watchdog(autojump_clock: trio.testing.MockClock) -> None:
    manager: Any = _Manager(None)
    await watchdog.watch(manager)
    assert manager.told == []
