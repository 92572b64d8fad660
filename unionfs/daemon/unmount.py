"""The command `umount`: unmounts the union and its storage, and cleans up after a killed daemon."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence

from unionfs.daemon import live, others
from unionfs.daemon.dead import clear_abandoned_of, forget, take_off
from unionfs.daemon.inside import TakenOff, leave_peers, storage_mounts
from unionfs.daemon.settle import absolute_mountpoint
from unionfs.errors import UserError, path_in, quoted, reason
from unionfs.sys.liveness import is_dead
from unionfs.sys.mountinfo import MountEntry, mounted_at, read_mountinfo
from unionfs.sys.process import users_of, wait_gone
from unionfs.sys.unmount import unmount

# How long a daemon may take to notice the unmount before we look for other users of the mount.
_NOTICE_SECONDS = 2.0
_DEAF_SECONDS = 30.0
_LAZY_SECONDS = 0.5


def umount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount, and wait until the daemon has ended and all data is on disk. Raises UserError."""
    path = absolute_mountpoint(mountpoint)
    mount = mounted_at(path)
    if mount is not None and mount.fstype == others.FSTYPE and (owner := others.owner_of(mount)) is not None:
        _umount_of_other(mount, owner, lazy=lazy)
        return
    entries = live.entries()
    entry = None if mount is None else live.find_by_device(mount.device, entries)
    if mount is None or not (mount.is_fuse and (entry is not None or mount.fstype == others.FSTYPE)):
        raise UserError(_why_not_ours(path, mount, entries))
    alive = entry is not None and entry.is_alive()
    if not alive and is_dead(path):
        take_off(mount)
    else:
        _unmount_living(mount, entry, lazy=lazy)
    if entry is None:
        return
    if alive:
        _wait_for_end(entry, path, lazy=lazy)
    else:
        forget(entry)


def _unmount_living(mount: MountEntry, entry: live.LiveMount | None, *, lazy: bool) -> None:
    if lazy:
        leave_peers(mount)
    inside = [] if entry is None or lazy else storage_mounts(mount, entry.settings.storage)
    storage = TakenOff(mount, inside)
    try:
        storage.take_off()
        unmount(mount, lazy=lazy)
    except OSError as error:
        storage.put_back()
        if error.errno == errno.EBUSY:
            at = path_in(error, mount.mountpoint)
            busy = mount if at == mount.mountpoint else mounted_at(at) or mount
            raise UserError(_busy(mount.mountpoint, busy, entry)) from error
        _refuse_unless_gone(mount, error)
    storage.let_go()


def _refuse_unless_gone(mount: MountEntry, error: OSError) -> None:
    if error.errno not in (errno.EINVAL, errno.ENOENT):  # unmounted in between
        raise UserError(
            f"{quoted(mount.mountpoint)} cannot be unmounted: {reason(error)}; run the command as the user "
            "who mounted it, or as root."
        ) from error


def _umount_of_other(mount: MountEntry, owner: int, *, lazy: bool) -> None:
    """Unmount another user's mount; clean up after that user's dead daemon as that user.

    Sends no request to the mount, whose daemon may not answer. Raises UserError.
    """
    path = mount.mountpoint
    entry = live.find_by_device(mount.device, others.mounts_of_others().answered)
    try:
        unmount(mount, lazy=lazy)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise UserError(_busy(path, mount, None)) from error
        _refuse_unless_gone(mount, error)
    if entry is not None:
        _wait_for_end(entry, path, lazy=lazy)
        return
    clear_abandoned_of(owner)


def _wait_for_end(entry: live.LiveMount, path: str, *, lazy: bool) -> None:
    began = time.monotonic()
    answered = False
    while not wait_gone(entry.pid, entry.started, 0.2):
        waited = time.monotonic() - began
        if lazy and waited >= _LAZY_SECONDS:
            return
        if waited < _NOTICE_SECONDS or lazy:
            continue
        # An ending daemon still syncs the upper, which may take long on a slow disk.
        if entry.uid is None and any(e.pid == entry.pid and e.ending for e in live.entries()):
            continue
        # A daemon without CPU time has not noticed yet; one that answers has.
        if not answered and waited < _DEAF_SECONDS:
            answered = entry.ask() is not None
            continue
        rest = entry.mounts()
        where = f"at {quoted(rest[0].mountpoint)}" if rest else "elsewhere (a mount namespace, an open file)"
        raise UserError(
            f"{quoted(path)} is unmounted, but the same union is still in use {where}, so its daemon (pid "
            f"{entry.pid}) goes on; the daemon ends when that use ends."
        )


def _busy(path: str, mount: MountEntry, entry: live.LiveMount | None) -> str:
    """Explain why the union at `path` is busy: `mount`, the union itself or a mount inside it, is in use."""
    # A process that maps a file of the host's filesystem does not use a bind mount of it.
    users = users_of(mount.mountpoint, mount.device if mount.is_fuse else "-1:-1")
    ours = set()
    if entry is not None and entry.settings.storage and (top := mounted_at(path)) is not None:
        ours = {storage.mountpoint for storage in storage_mounts(top, entry.settings.storage)}
    inside = [
        other.mountpoint
        for other in read_mountinfo()
        if other.mount_id != mount.mount_id
        and other.mountpoint.startswith(mount.mountpoint.rstrip("/") + "/")
        and other.mountpoint not in ours
    ]
    if inside:
        cause, cure = f"{quoted(inside[0])} is mounted inside it", f"unmount {quoted(inside[0])} first"
    elif users:
        named = (f"{quoted(user.command)} (pid {user.pid}, {user.how})" for user in users)
        cause, cure = "used by " + ", ".join(named), "end it first"
    else:
        cause, cure = "a process that is not to be seen from here uses it", "end it first"
    return (
        f"{quoted(path)} is busy: {cause}; {cure}, or detach the mount by "
        f"`unionfs umount --lazy {quoted(path)}`."
    )


def _why_not_ours(path: str, mount: MountEntry | None, entries: Sequence[live.LiveMount]) -> str:
    if mount is not None:
        return f"{quoted(path)} is a {mount.fstype} mount and none of unionfs; use `umount {quoted(path)}`."
    for entry in entries:
        if path.startswith(entry.settings.mountpoint.rstrip("/") + "/"):
            return (
                f"{quoted(path)} is not a mountpoint, but lies inside the mount "
                f"{quoted(entry.settings.mountpoint)}; give that one."
            )
    if not os.path.lexists(path):
        return f"{quoted(path)} does not exist; `unionfs ls` shows the mounts that live now."
    return f"{quoted(path)} is not a unionfs mount; `unionfs ls` shows the mounts that live now."
