"""The command `umount`: unmounts the union and its storage, and cleans up after a killed daemon."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from unionfs.daemon import live, others
from unionfs.daemon.dead import clear_abandoned_of, forget, refusal, take_off
from unionfs.daemon.inside import TakenOff, leave_peers, storage_mounts
from unionfs.daemon.orders import END, give
from unionfs.daemon.settle import absolute_mountpoint
from unionfs.errors import UserError, path_in, quoted
from unionfs.sys.fds import Owned
from unionfs.sys.liveness import is_dead
from unionfs.sys.mountinfo import MountEntry, mounted_at, read_mountinfo
from unionfs.sys.mountspaces import copies
from unionfs.sys.mountusers import MountUser, users_of_mount
from unionfs.sys.process import children_of, command_of, is_stopped, pid_and_start, wait_gone
from unionfs.sys.unmount import unmount

# How long a daemon may take to notice the unmount before we look for other users of the mount.
_NOTICE_SECONDS = 2.0
_DEAF_SECONDS = 30.0
_LAZY_SECONDS = 0.5
# Longer than a holder pauses before it starts another daemon.
_HOLDER_SECONDS = 15.0
_POLL_SECONDS = 0.2
_STOP_POLL_SECONDS = 0.001
_COPY_POLL_SECONDS = 0.1
_MOST_NAMED = 5
_STOP = "stop whatever uses it first"

Namer = Callable[[int], str | None]
"""Returns the name of the container that a process belongs to; None if to none that is known."""


def _nameless(pid: int) -> None:
    return None


def umount(
    mountpoint: str, *, lazy: bool = False, force: bool = False, container_of: Namer = _nameless
) -> None:
    """Unmount, and wait until the daemon has ended and all data is on disk. Raises UserError.

    A mount in use is refused, and `container_of` names the containers that use it; `lazy` detaches it, and
    `force` cuts its users off, also of one that has been detached from here.
    """
    path = absolute_mountpoint(mountpoint)
    mount = mounted_at(path)
    if force and (served := _served(path, mount)) is not None:
        _cut_off(served)
        return
    if mount is not None and mount.fstype == others.FSTYPE and (owner := others.owner_of(mount)) is not None:
        if not lazy:
            _refuse_copied(mount, container_of)
        _umount_of_other(mount, owner, lazy=lazy)
        return
    entries = live.entries()
    entry = None if mount is None else live.find_by_device(mount.device, entries)
    if mount is None and (waiting := live.waiting_at(path)):
        for one in waiting:
            _end_waiting(one)
        if mounted_at(path) is not None:  # by the last that was started
            umount(path, lazy=lazy, force=force, container_of=container_of)
        return
    if mount is None or not (mount.is_fuse and (entry is not None or mount.fstype == others.FSTYPE)):
        raise UserError(_why_not_ours(path, mount, entries))
    alive = entry is not None and entry.is_alive()
    further = False
    held = entry is not None and entry.has_only_holder()
    if not alive and not held and is_dead(path):  # a request that waits would keep it busy
        take_off(mount)
    else:
        further = _is_further(mount, entry)
        if not (lazy or further):  # else it stays mounted elsewhere
            _refuse_copied(mount, container_of)
        _unmount_living(mount, entry, lazy=lazy)
    if entry is None or further:
        return
    if alive:
        _wait_for_end(entry, path, lazy=lazy)
    else:
        if held and entry.holder is not None:  # the next daemon sees it, and ends with the holder
            wait_gone(*entry.holder, _HOLDER_SECONDS)
        forget(entry)


def _served(path: str, mount: MountEntry | None) -> live.LiveMount | None:
    """Return the mount at `path`, or the one that was there and has been detached, if its daemon is alive."""
    known = [entry for entry in live.entries() if entry.is_alive() and not entry.waiting]
    if mount is None:
        return next((entry for entry in reversed(known) if entry.settings.mountpoint == path), None)
    found = live.find_by_device(mount.device, known)
    return found or live.find_by_device(mount.device, others.mounts_of_others().answered)


def _cut_off(entry: live.LiveMount) -> None:
    """Raises UserError if the daemon neither obeys nor has ended."""
    try:
        give(entry, END, "ended", "try again")
    except UserError:
        if not wait_gone(entry.pid, entry.started, 0):
            raise
    while not wait_gone(entry.pid, entry.started, _POLL_SECONDS):
        pass


def _end_waiting(entry: live.LiveMount) -> None:
    """End the holder of a union that is to be mounted anew, and wait for what it has started."""
    with suppress(ProcessLookupError), Owned(os.pidfd_open(entry.pid)) as holder:
        if entry.is_alive():  # else another process may have the pid
            _end_holder(entry, holder)
    forget(entry)


def _end_holder(entry: live.LiveMount, holder: int) -> None:
    """End the process of a pidfd. It is stopped first, so that it starts no other daemon meanwhile."""
    signal.pidfd_send_signal(holder, signal.SIGSTOP)
    while entry.is_alive() and not is_stopped(entry.pid):
        time.sleep(_STOP_POLL_SECONDS)
    started = [pid_and_start(pid) for pid in children_of(entry.pid)]
    signal.pidfd_send_signal(holder, signal.SIGKILL)
    for pid, since in started:  # it mounts or fails
        while mounted_at(entry.settings.mountpoint) is None and not wait_gone(pid, since, _POLL_SECONDS):
            pass


def _is_further(mount: MountEntry, entry: live.LiveMount | None) -> bool:
    """Return whether this is a further mount, by mount --bind, of a union that is still at its mountpoint."""
    return entry is not None and mount.mountpoint != entry.settings.mountpoint and any(
        other.mountpoint == entry.settings.mountpoint for other in entry.mounts()
    )  # fmt: skip


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


def _refuse_copied(mount: MountEntry, container_of: Namer) -> None:
    """Refuse to unmount what would stay mounted elsewhere, so that its daemon goes on. Raises UserError.

    A namespace that has just been made has copies of all mounts, and often unmounts them or ends at once.
    """
    deadline = time.monotonic() + _NOTICE_SECONDS
    while (found := copies(mount)) and all(pid for pid, _ in found) and time.monotonic() < deadline:
        time.sleep(_COPY_POLL_SECONDS)
    if not found:
        return
    bound = {copy.mountpoint: _runner_of(copy.mountpoint) for pid, copy in found if not pid}
    plain = [path for path, runner in bound.items() if runner is None]
    pids = [*filter(None, bound.values()), *(pid for pid, _ in found if pid)]
    containers = {pid: container_of(pid) for pid in pids}
    users = [
        f"container {quoted(name)}" if name else str(MountUser(pid, command_of(pid), "mount namespace"))
        for pid, name in containers.items()
    ]
    if plain:
        cause, cure = f"it is also mounted at {quoted(plain[0])}", f"unmount {quoted(plain[0])} first"
    else:
        names = " ".join(dict.fromkeys(quoted(name) for name in containers.values() if name))
        cause = "used by " + ", ".join(list(dict.fromkeys(users))[:_MOST_NAMED])
        cure = f"run `unionfs stop {names}` first" if names else _STOP
    raise UserError(_with_cures(mount.mountpoint, cause, cure))


def _runner_of(path: str) -> int | None:
    """Return the process that a union lives with, if `path` is in it."""
    for entry in live.entries():
        if entry.settings.lives_with and path.startswith(f"{entry.settings.mountpoint}/"):
            return entry.settings.lives_with[0]
    return None


def _refuse_unless_gone(mount: MountEntry, error: OSError) -> None:
    if error.errno not in (errno.EINVAL, errno.ENOENT):  # unmounted in between
        raise UserError(f"{quoted(mount.mountpoint)} cannot be unmounted: {refusal(mount, error)}") from error


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
    while not wait_gone(entry.pid, entry.started, _POLL_SECONDS):
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
            f"{entry.pid}) goes on; it ends with that use, or by `unionfs umount --force {quoted(path)}`."
        )


def _busy(path: str, mount: MountEntry, entry: live.LiveMount | None) -> str:
    """Explain why the union at `path` is busy: `mount`, the union itself or a mount inside it, is in use."""
    # A process that maps a file of the host's filesystem does not use a bind mount of it.
    users = users_of_mount(mount.mount_id, mount.device if mount.is_fuse else None, _MOST_NAMED)
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
        cause, cure = "used by " + ", ".join(map(str, users)), _STOP
    else:
        cause, cure = "a process that is not visible from here uses it", _STOP
    return _with_cures(path, cause, cure)


def _with_cures(path: str, cause: str, cure: str) -> str:
    place = quoted(path)
    return (
        f"{place} is busy: {cause}; {cure}, or detach the mount by `unionfs umount --lazy {place}`, or cut "
        f"its users off by `unionfs umount --force {place}`."
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
        return f"{quoted(path)} does not exist; `unionfs ls` lists active mounts."
    return f"{quoted(path)} is not a unionfs mount; `unionfs ls` lists active mounts."
