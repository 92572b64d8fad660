"""Waiting for daemons that are about to end.

umount(2) returns before the daemon has synced and closed the layers, and a daemon that was sent SIGTERM still
has its mount. A new mount waits for such a daemon, but not for one that serves on.
"""

from __future__ import annotations

import time
from typing import Final

from unionfs.daemon import live
from unionfs.daemon.live import LiveMount
from unionfs.errors import UserError, quoted
from unionfs.settings.mount import MountSettings
from unionfs.sys.liveness import is_dead_mount
from unionfs.sys.process import wait_gone

KEY: Final = "ending"
"""In a daemon's answer: whether it is about to end."""
_LONGEST_SECONDS: Final = 20.0
_NOTICE_SECONDS: Final = 2.0
"""How long a daemon may take to notice that its mount is gone."""
_PAUSE_SECONDS: Final = 0.02


def has_ended(entry: LiveMount) -> bool:
    """Wait for a daemon that is about to end. Returns False if it serves on, or has not ended in 20 s."""
    began = time.monotonic()
    while not wait_gone(entry.pid, entry.started, _PAUSE_SECONDS):
        waited = time.monotonic() - began
        if waited > _LONGEST_SECONDS or not _is_ending(entry, waited):
            return False
    return True


def _is_ending(entry: LiveMount, waited: float) -> bool:
    now = next((e for e in live.entries() if (e.pid, e.started) == (entry.pid, entry.started)), None)
    if now is None or now.ending:
        return True
    if waited < _NOTICE_SECONDS and not entry.mounts():
        return True
    answer = entry.ask()
    if answer is not None:
        return answer.get(KEY) is True
    mounts = entry.mounts()  # perhaps gone by now
    return not mounts or any(is_dead_mount(mount) for mount in mounts)


def wait_for_layers(settings: MountSettings) -> None:
    """Wait for this user's daemons that end and still have the upper or work of `settings`.

    Raises UserError if one has them still.
    """
    claims = set(live.claims_of(settings))
    for entry in live.entries():
        if claims.isdisjoint(entry.claims) or has_ended(entry):
            continue
        whose = f"the daemon (pid {entry.pid}) of {quoted(entry.settings.mountpoint)}"
        shown = f"upper {quoted(settings.upper or '')}"
        if _is_ending(entry, _NOTICE_SECONDS):
            raise UserError(
                f"{shown} is still used by {whose}, which is ending; try again when it has ended."
            )
        if entry.mounts():
            raise UserError(
                f"{shown} is in use by {live.describe_owner(entry)}; unmount that first, or choose another "
                "directory."
            )
        raise UserError(
            f"{shown} is still used by {whose}, which is unmounted but in use elsewhere (a mount namespace, "
            "an open file); stop whatever uses it, or choose another directory."
        )
