"""Mounts that have been detached from here, and whose daemons go on because something still uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unionfs.daemon import live
from unionfs.daemon.live import LiveMount
from unionfs.sys.mountspaces import processes_with
from unionfs.sys.mountusers import MountUser, users_of_device
from unionfs.sys.process import command_of


@dataclass(frozen=True, slots=True)
class Detached:
    entry: LiveMount
    users: Sequence[MountUser]
    """Whoever is visible to this user; `unionfs umount --force` cuts them off."""


def detached_mounts() -> list[Detached]:
    """Return this user's detached mounts, oldest first. Waits for daemons that are about to end."""
    found = []
    for entry in live.entries():
        if entry.ending or entry.waiting or not entry.is_alive() or entry.mounts():
            continue
        users = _users(entry.device)
        if users or not live.has_ended_soon(entry):
            found.append(Detached(entry, users))
    return sorted(found, key=lambda one: one.entry.since)


def _users(device: str) -> list[MountUser]:
    spaces = [MountUser(pid, command_of(pid), "mount namespace") for pid in processes_with(device)]
    known = {user.pid for user in spaces}
    return spaces + [user for user in users_of_device(device) if user.pid not in known]
