"""What a resident does once before it forks daemons, so that they have in common what Python learns by it."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress

import trio

from unionfs.daemon import preflight
from unionfs.daemon.live import LiveMount, claims_of
from unionfs.daemon.settle import settle
from unionfs.errors import UserError
from unionfs.settings.mount import MountSettings
from unionfs.sys.process import start_time

# Python specialises what has run eight times (Python/specialize.c, of 3.11 and later).
_TIMES = 12


def rehearse(place: str) -> None:
    """Settle and check a mount of empty directories in `place` a few times; mount nothing.

    `place` is made, and removed. No other process has it, but one that was killed may have left it.

    Python numbers the types, dictionaries and functions that it has met, and notes the numbers beside the
    code. Without this each daemon would write them into pages of its own, and others than its neighbour
    does that finds another mount.
    """
    try:
        with suppress(OSError, UserError):
            for name in ("lower", "upper", "work", "merged"):
                os.makedirs(f"{place}/{name}", exist_ok=True)
            for _ in range(_TIMES):
                _settle_and_check(place)
                trio.run(trio.lowlevel.checkpoint)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _settle_and_check(place: str) -> None:
    options = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"
    settings = settle(f"{place}/merged", options=["index=off", options])
    preflight.check(settings)
    MountSettings.from_json(settings.to_json())
    pid = os.getpid()
    entry = LiveMount(settings, pid, start_time(pid) or 0, "0:0", time.time(), claims_of(settings))
    entry = LiveMount.from_json(entry.to_json())
    entry.is_alive()
    entry.mounts()
