"""The limit of known nodes: above it the kernel is asked to give some back (FUSE_NOTIFY_PRUNE).

The kernel remembers each file that was looked up until it needs memory, and the daemon has a node for it. The
daemon's memory is what the kernel cannot reclaim by itself.
"""

from __future__ import annotations

import logging
from itertools import chain, repeat
from typing import Any, Final

import trio

from unionfs.core.pruning import Pruner
from unionfs.fuse.direct.device import Device
from unionfs.fuse.protocol import Decision, notify
from unionfs.fuse.protocol.flags import KERNEL_VERSION, LINUX, PRUNE_MINOR

log = logging.getLogger(__name__)

_AT_ONCE: Final = 4096
"""Nodes of a notice; the kernel locks each for a moment."""
_FORGET_SECONDS: Final = 0.02
"""Until the loop has read the FORGETs that follow a notice, which the kernel mixes with requests."""
_PAUSES: Final = (1, 2, 4, 8, 16, 32, 64)
"""Seconds between two rounds that did not suffice."""
_LEFT: Final = 7 / 8
"""So much of the limit is left, so that not every lookup costs a notice."""


class NodeLimit:
    """Keeps the number of nodes about a limit. Nodes that programs use, and their directories, stay."""

    def __init__(self, device: Device, pruner: Pruner, decision: Decision, max_nodes: int) -> None:
        self._device, self._pruner = device, pruner
        self._maximum = max_nodes
        self._asks = False
        self._asked_for = 0
        self._why_not = ""
        if decision.reply.minor < PRUNE_MINOR:
            self._why_not = (
                f"the kernel cannot be asked to give nodes back before Linux {LINUX[PRUNE_MINOR]} "
                f"(FUSE {KERNEL_VERSION}.{PRUNE_MINOR})"
            )
            log.warning("option max_nodes has no effect: %s", self._why_not)

    @property
    def exceeded(self) -> bool:
        """Whether :meth:`give_back` is due."""
        return self._pruner.known > self._maximum and not self._asks and not self._why_not

    async def give_back(self) -> None:
        """Ask for nodes until the limit is kept. While programs use more, ask less and less often."""
        self._asks = True
        try:
            for pause in chain(_PAUSES, repeat(_PAUSES[-1])):
                await self._ask()
                if self._pruner.known <= self._maximum:
                    return
                many = self._pruner.known / _LEFT
                for _ in range(pause):
                    await trio.sleep(1)
                    if self._pruner.known > many:
                        break
        finally:
            self._asks = False

    async def _ask(self) -> None:
        """Ask for nodes until enough have come back, or each was asked for and none came back."""
        goal = int(self._maximum * _LEFT)
        fewest = left = self._pruner.known
        while left > 0 and (excess := self._pruner.known - goal) > 0:
            ids = self._pruner.take(min(excess, _AT_ONCE))
            if not ids:
                return
            asked = len(ids) // 8
            self._asked_for += asked
            # Not in line: dropping an inode may wait for data that this daemon is to write.
            await trio.to_thread.run_sync(self._device.notify, notify.prune(ids))
            await trio.sleep(_FORGET_SECONDS)
            left -= asked
            if self._pruner.known < fewest:
                fewest = left = self._pruner.known

    def figures(self) -> dict[str, Any]:
        """What `inspect` shows of it."""
        shown: dict[str, Any] = {"max_nodes": self._maximum, "asked_for": self._asked_for}
        if self._why_not:
            shown = {"max_nodes": self._maximum, "none_because": self._why_not}
        return {"node_limit": shown}
