"""Finds the mount that a command names."""

from __future__ import annotations

import os
import time
from typing import Final

from unionfs.daemon import live
from unionfs.daemon.dead import dead_mount_at
from unionfs.daemon.live import LiveMount
from unionfs.daemon.others import FSTYPE, mounts_of_others, owner_of
from unionfs.daemon.settle import absolute_mountpoint
from unionfs.errors import UserError, quoted
from unionfs.sys.mountinfo import MountEntry, mounted_at

_SECONDS: Final = 2.0
"""How long a command waits for a daemon that takes over."""


def find_mount(mountpoint: str) -> LiveMount:
    """Return the live mount at `mountpoint`. Raises UserError if there is none, or its daemon has died."""
    path = absolute_mountpoint(mountpoint)
    mounted = mounted_at(path)
    known = live.live_mounts()
    found = None if mounted is None else live.find_by_device(mounted.device, known)
    if found is None:
        known = [*known, *mounts_of_others().answered]
        found = None if mounted is None else live.find_by_device(mounted.device, known)
    if found is None:
        # It may be mounted in the daemon's mount namespace only.
        found = next((mount for mount in reversed(known) if mount.settings.mountpoint == path), None)
    if found is None and (dead := dead_mount_at(path)) is not None:
        whose = "its daemon has" if dead.entry is None else f"its daemon (pid {dead.entry.pid}) has"
        if dead.entry is not None and dead.entry.has_only_holder():
            whose = "its daemons have"
        often = " too often within a minute, see the log" if whose == "its daemons have" else ""
        raise UserError(
            f"{quoted(path)} is not an active unionfs mount: {whose} died{often}; run `unionfs cleanup "
            f"{quoted(path)}`, and mount it again."
        )
    if found is None and mounted is not None and mounted.fstype == FSTYPE:
        found = _served_soon(mounted)
    if found is None and live.waiting_at(path):
        raise UserError(
            f"{quoted(path)} is not mounted at the moment: its daemon died, and the union could not be "
            "mounted anew yet, see the log; that is tried again unless you end it by "
            f"`unionfs umount {quoted(path)}`."
        )
    if found is None:
        raise UserError(f"{quoted(path)} is not an active unionfs mount{_why_not(path, mounted)}.")
    return found


def _served_soon(mounted: MountEntry) -> LiveMount | None:
    """Return the mount if another daemon takes it over from one that died. Raises UserError if none does
    within two seconds."""
    deadline, last = time.monotonic() + _SECONDS, None
    while True:
        entry = live.find_by_device(mounted.device)
        if entry is not None and entry.has_only_holder():
            last = entry
        elif found := live.find_by_device(mounted.device, live.live_mounts()):
            return found
        elif last is None and time.monotonic() > deadline - _SECONDS / 2:
            return None
        if last is not None and time.monotonic() > deadline:
            break
        time.sleep(_SECONDS / 100)  # the next one enters itself before the entry of the last one is removed
    raise UserError(
        f"{quoted(mounted.mountpoint)} has no daemon at the moment: the last one (pid {last.pid}) died, and "
        "another one is to take over, see the log; try again, or end it by "
        f"`unionfs umount {quoted(mounted.mountpoint)}`."
    )


def _why_not(path: str, mounted: MountEntry | None) -> str:
    """Return cause and cure, as the end of a sentence, for what is not an active mount of this user."""
    if mounted is not None and mounted.fstype == FSTYPE:
        owner = mounted.super_option("user_id")
        if (other := owner_of(mounted)) is not None:
            return f" of root, but one of uid {other} whose daemon does not answer root; run it as that user"
        if os.geteuid() != 0 and owner != str(os.geteuid()):
            return f" of this user, but one of uid {owner}; run it as that user or as root"
    return "; `unionfs ls` lists active mounts"
