"""Mounts whose daemon has died: found, unmounted and forgotten.

A mount of unionfs is dead if its connection fails with ENOTCONN and no daemon of it is alive. So a mount that
hangs is not dead, and neither is one whose daemon is about to end. What belongs to another user, root leaves
to a child that is that user: a request of root's could wait forever, and a path could lead elsewhere.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from unionfs.daemon import live, others
from unionfs.daemon.claiming import Claim
from unionfs.daemon.inside import mounted_inside, storage_mounts, unmount_inside
from unionfs.daemon.live import LiveMount
from unionfs.daemon.runtime import runtime_directory
from unionfs.errors import UserError, quoted, reason
from unionfs.sys import fusermount
from unionfs.sys.asuser import run_as
from unionfs.sys.capabilities import uid_outside
from unionfs.sys.liveness import is_dead_mount
from unionfs.sys.mountinfo import MountEntry, mount_of_id, mounted_at, read_mountinfo
from unionfs.sys.unmount import unmount

_ASKING_SECONDS: Final = 3.0
_ALL_ASKING_SECONDS: Final = 6.0
_CLEANING_SECONDS: Final = 20.0
_NEEDED: Final = (
    "importlib.metadata",
    "subprocess",
    "xxhash",
    "unionfs.storage.users",
    "unionfs.storage.earlier",
    *(f"unionfs.storage.drivers.{name}" for name in ("local", "plugin", "plugin_request", "remote", "union")),
)
"""What a child imports before it is another user, who may not be able to read this program's files."""


@dataclass(frozen=True, slots=True)
class DeadMount:
    """A mount that nobody serves any more."""

    mount: MountEntry
    entry: LiveMount | None
    """What its daemon entered in the registry, if that is known."""
    owner: int | None = None
    """The uid of another user; None: this user."""


def dead_mounts(entries: Sequence[LiveMount] | None = None) -> list[DeadMount]:
    """Return this user's dead mounts in mount order; `entries` are those of the registry.

    Takes two seconds for each mount that hangs and whose daemon is unknown.
    """
    entries = live.remaining() if entries is None else entries
    found = (_dead(mount, entries) for mount in read_mountinfo())
    return [dead for dead in found if dead is not None]


def dead_mount_at(mountpoint: str) -> DeadMount | None:
    """Return the dead mount at `mountpoint`, of this user or, for root, of any; None if there is none."""
    mount = mounted_at(mountpoint)
    if mount is not None and mount.fstype == others.FSTYPE and others.owner_of(mount) is not None:
        return next(iter(dead_mounts_of_others([mount])), None)
    return own_dead_mount_at(mountpoint)


def own_dead_mount_at(mountpoint: str) -> DeadMount | None:
    """Return this user's dead mount at `mountpoint`; None if there is none."""
    mount = mounted_at(mountpoint)
    return None if mount is None else _dead(mount, live.remaining())


def _dead(mount: MountEntry, entries: Sequence[LiveMount]) -> DeadMount | None:
    if not mount.is_fuse or not _is_ours(mount):
        return None
    entry = live.find_by_device(mount.device, entries)
    if mount.fstype != others.FSTYPE if entry is None else entry.is_alive():
        return None
    given_up = entry is not None and entry.has_only_holder()
    return DeadMount(mount, entry) if is_dead_mount(mount, given_up=given_up) else None


def _is_ours(mount: MountEntry) -> bool:
    user = os.geteuid()
    return mount.super_option("user_id") in (str(user), str(uid_outside(user)))


def dead_mounts_of_others(silent: Sequence[MountEntry]) -> list[DeadMount]:
    """Return which of other users' mounts are dead, of those whose daemons do not answer.

    Takes six seconds at most.
    """
    found = []
    deadline = time.monotonic() + _ALL_ASKING_SECONDS
    for mount in silent:
        owner = others.owner_of(mount)
        left = min(_ASKING_SECONDS, deadline - time.monotonic())
        if owner is None or left <= 0:
            continue

        def ask(mount: MountEntry = mount) -> int:
            return 0 if is_dead_mount(mount) else 1

        if run_as(owner, ask, seconds=left) == 0:
            found.append(DeadMount(mount, None, owner))
    return found


def clean(dead: DeadMount) -> None:
    """Unmount a dead mount with the union's storage, release its volumes, and forget it.

    Raises UserError, having changed nothing.
    """
    if dead.owner is None:
        _clean(dead)
        return
    path = dead.mount.mountpoint

    def as_owner() -> int:
        found = own_dead_mount_at(path)
        if found is not None and found.mount.mount_id == dead.mount.mount_id:
            _clean(found)
        return clear_abandoned()

    run_as(dead.owner, as_owner, modules=_NEEDED, seconds=_CLEANING_SECONDS)
    if mount_of_id(dead.mount.mount_id) is not None:
        raise UserError(
            f"the dead mount {quoted(path)} cannot be unmounted as its owner (uid {dead.owner}); run "
            f"`unionfs umount {quoted(path)}`."
        )


def _clean(dead: DeadMount) -> None:
    path = dead.mount.mountpoint
    with ExitStack() as held:
        directory = held.enter_context(runtime_directory())
        # fusermount3 unmounts by path: nobody may replace the mount meanwhile.
        held.callback(Claim(path, directory, dead=dead.mount).release)
        if (inside := _foreign_mount(dead)) is not None:
            raise UserError(
                f"{quoted(inside)} is mounted inside the dead mount {quoted(path)}; unmount {quoted(inside)} "
                f"first, or both by `unionfs umount {quoted(path)}`."
            )
        take_off(dead.mount)
    if dead.entry is not None:
        forget(dead.entry)


def _foreign_mount(dead: DeadMount) -> str | None:
    """Return a mountpoint inside a dead mount of what is neither the union's storage nor dead itself."""
    storage = [] if dead.entry is None else storage_mounts(dead.mount, dead.entry.settings.storage)
    ours = {mount.mount_id for mount in storage}
    entries = live.remaining()
    for mount in mounted_inside(dead.mount):
        if mount.mount_id not in ours and _dead(mount, entries) is None:
            return mount.mountpoint
    return None


def take_off(mount: MountEntry) -> None:
    """Unmount a dead mount with all that is mounted inside it. Raises UserError."""
    unmount_inside(mount)
    try:
        # A process with a file or a directory open there only keeps it busy.
        unmount(mount, lazy=True)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):  # unmounted in between
            raise UserError(
                f"the dead mount {quoted(mount.mountpoint)} cannot be unmounted: {refusal(mount, error)}"
            ) from error


def refusal(mount: MountEntry, error: OSError) -> str:
    """Return why this user cannot unmount it, and the cure, as the rest of a sentence."""
    cause, cure = reason(error), "run the command as the user who mounted it, or as root"
    if os.geteuid() != 0 and _is_ours(mount):
        cause, cure = fusermount.lack() or (cause, "run the command as root")
    return f"{cause}; {cure}."


def forget(entry: LiveMount) -> None:
    """Release the volumes of a daemon that was killed together with its guardian, and remove its entry."""
    if entry.settings.storage:
        # For start-up time: most unions have no storage.
        from unionfs.storage.users import release, user_of

        release(entry.settings, user_of(entry.settings, *entry.volume_user))
    entry.remove()


def clear_abandoned() -> int:
    """Forget this user's mounts that have neither daemon nor mount left.

    Returns 0, the exit code of the process that runs it.
    """
    for entry in live.abandoned():
        forget(entry)
    return 0


def clear_abandoned_of(owner: int) -> None:
    """Do `clear_abandoned` for another user, as that user."""
    run_as(owner, clear_abandoned, modules=_NEEDED, seconds=_CLEANING_SECONDS)
