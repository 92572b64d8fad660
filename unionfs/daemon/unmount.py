"""Ending mounts: from within the daemon, from the command line, and clearing away what a crashed daemon
left."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from unionfs.daemon import live, others
from unionfs.daemon.fuse import find_fusermount
from unionfs.daemon.settings import absolute_mountpoint
from unionfs.errors import UserError, quoted, reason
from unionfs.sys.asuser import run_as
from unionfs.sys.calls import syncfs
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability
from unionfs.sys.liveness import is_dead
from unionfs.sys.mount import MNT_DETACH, open_mount, unmount_id
from unionfs.sys.mountinfo import MountEntry, mounted_at, mounts_of_device, read_mountinfo
from unionfs.sys.openat2 import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2
from unionfs.sys.process import users_of, wait_gone

if TYPE_CHECKING:
    from unionfs.daemon.settings import MountSettings

# How long a daemon may take to notice that its mount is gone before we look for what else holds the mount.
_NOTICE_SECONDS = 2.0
_DEAF_SECONDS = 30.0
_LAZY_SECONDS = 0.5
_CLEARING_SECONDS = 20.0
_SUBTYPE = "fuse.unionfs"
_NEEDED_TO_CLEAR = (
    "unionfs.storage.users",
    *(f"unionfs.storage.drivers.{name}" for name in ("local", "plugin", "remote", "union")),
)


def unmount(mount: MountEntry, *, lazy: bool = False) -> None:
    """Unmount this mount, by fusermount3 where umount2(2) is not allowed.

    With `lazy` the mount leaves the tree at once and goes when its last user goes. Raises OSError, EBUSY when
    somebody uses it, EINVAL when it is gone or no longer there.
    """
    mountpoint = mount.mountpoint
    try:
        unmount_id(mountpoint, mount.mount_id, MNT_DETACH if lazy else 0)
    except PermissionError:
        program = find_fusermount()
        # It works by the path alone: not for root, whom the owner of a directory could lead elsewhere.
        if program is None or has_capability(CAP_SYS_ADMIN):
            raise
        command = [program, "-u", *(["-z"] if lazy else []), "--", mountpoint]
        # The C locale, because the message is read below. fusermount3 gives no errno but 1.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            cwd="/",
            env={**os.environ, "LC_ALL": "C"},
        )
        if done.returncode != 0:
            text = os.fsdecode(done.stderr).strip().rpartition(": ")[2] or f"{program} failed"
            number = errno.EBUSY if "busy" in text else errno.EPERM
            raise OSError(number, text, mountpoint) from None


def end_from_within(device: str) -> bool:
    """End this process's own mount, `device` being its `major:minor`, with all that is written on disk.

    Blocks, so it runs in a thread while the daemon goes on answering: what programs wrote through mmap comes
    only now. Mounts that are in use are detached. Returns whether any had to be.
    """
    detached = False
    # The newest first: bind mounts of parts of the union before the union.
    for mount in reversed(mounts_of_device(device)):
        # Something else may be mounted over it, and it is that which would be unmounted.
        if (on_top := mounted_at(mount.mountpoint)) is None or on_top.device != device:
            continue
        _sync(mount)
        _leave_peers(mount)
        for inner in reversed(_reachable(mount)):
            with suppress(OSError):  # what is in use goes with the detached union
                unmount(inner)
        try:
            unmount(mount)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):  # somebody else was quicker
                continue
            detached = True
            fd = _open_directory(mount)
            try:
                with suppress(OSError):
                    unmount(mount, lazy=True)
                # What was written between the first sync and now.
                if fd is not None:
                    with suppress(OSError):
                        syncfs(fd)
            finally:
                if fd is not None:
                    os.close(fd)
    return detached


def _open_directory(mount: MountEntry) -> int | None:
    try:
        root = open_mount(mount.mountpoint, mount.mount_id)
        try:
            return os.open(f"/proc/self/fd/{root}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        finally:
            os.close(root)
    except OSError:
        return None


def _sync(mount: MountEntry) -> None:
    fd = _open_directory(mount)
    if fd is not None:
        try:
            with suppress(OSError):
                syncfs(fd)
        finally:
            os.close(fd)


def clear_leftovers(device: str, *, connected: bool = False) -> None:
    """Detach whatever mounts are left of this process's connection; for a daemon that ends by an error.

    Unless it is still `connected`, a mount that is not dead is somebody else's: the number of one that is
    gone is given to the next.
    """
    for mount in reversed(mounts_of_device(device)):
        on_top = mounted_at(mount.mountpoint)
        if on_top is None or on_top.device != device:
            continue
        if connected or (on_top.is_fuse and is_dead(mount.mountpoint)):
            _leave_peers(mount)
            with suppress(OSError):
                unmount(mount, lazy=True)


def mounted_inside(mount: MountEntry, table: Sequence[MountEntry] | None = None) -> list[MountEntry]:
    """What is mounted on a mount and on what is mounted there, parents before children."""
    left = list(read_mountinfo() if table is None else table)
    known, found = {mount.mount_id}, []
    while newer := [entry for entry in left if entry.parent_id in known and entry.mount_id not in known]:
        found += newer
        known |= {entry.mount_id for entry in newer}
    return found


def _reachable(mount: MountEntry) -> list[MountEntry]:
    """What is mounted inside a mount, without another user's FUSE and what lies beyond: its daemon may never
    answer, and the way leads through it."""
    beyond: set[int] = set()
    found = []
    for inner in mounted_inside(mount):
        if inner.parent_id in beyond or others.owner_of(inner) is not None:
            beyond.add(inner.mount_id)
        else:
            found.append(inner)
    return found


def clear_dead_mounts(device: str) -> None:
    """Unmount the union `device` (major:minor), whose daemon was killed, and first what is mounted in it."""
    for mount in reversed(mounts_of_device(device)):
        if not is_dead(mount.mountpoint):
            continue  # the number was given to another one
        _leave_peers(mount)
        for inner in reversed(_reachable(mount)):
            # The way to it leads through the dead union, so it may fail; then it goes with that.
            with suppress(OSError):
                unmount(inner)
        with suppress(OSError):
            unmount(mount, lazy=True)


def _storage_mounts(mount: MountEntry, settings: MountSettings) -> list[MountEntry]:
    """Those of the union's storage, in the order in which they were mounted.

    With a source comes what is mounted below it. That is told from other mounts by a mount elsewhere: of the
    same directory of the same filesystem, on the same directory. What another mount covers is left out, with
    all below it: no path leads there.
    """
    table = read_mountinfo()
    inside = mounted_inside(mount, table)
    by_id = {entry.mount_id: entry for entry in table}
    ours = {entry.mount_id for entry in (mount, *inside)}
    elsewhere = {
        (entry.device, entry.root, _mounted_on(entry, by_id)) for entry in table if entry.mount_id not in ours
    }
    covered = {entry.parent_id for entry in inside if entry.mountpoint == by_id[entry.parent_id].mountpoint}
    top = mount.mountpoint.rstrip("/")
    targets = {top + spec.target for spec in settings.storage}
    found: dict[int, MountEntry] = {}
    for entry in inside:
        if entry.mount_id in covered or entry.parent_id not in {mount.mount_id, *found}:
            continue
        came_along = (entry.device, entry.root, _mounted_on(entry, by_id)) in elsewhere
        if entry.mountpoint in targets or (came_along and entry.parent_id in found):
            found[entry.mount_id] = entry
    return list(found.values())


def _mounted_on(entry: MountEntry, by_id: Mapping[int, MountEntry]) -> tuple[str, str] | None:
    """The directory that is covered by a mount: device and path within it, the same for every bind mount."""
    above = by_id.get(entry.parent_id)
    if above is None:
        return None  # outside of this process's root
    below = entry.mountpoint[len(above.mountpoint.rstrip("/")) :].lstrip("/")
    return above.device, f"{above.root.rstrip('/')}/{below}".rstrip("/")


def _leave_peers(mount: MountEntry) -> None:
    """Make what is mounted in a union private: unmounting it must not unmount its peers on the host.

    A bind mount with shared propagation has such peers, below its source (mount_namespaces(7)).
    """
    from unionfs.sys import detached

    for inner in _reachable(mount):
        if inner.parent_id != mount.mount_id:
            continue
        with suppress(OSError):
            root = open_mount(inner.mountpoint, inner.mount_id)
            try:
                detached.change(root, propagation=detached.PROPAGATION["private"], recursive=True)
            finally:
                os.close(root)


class _Storage:
    """What is mounted into a union, taken off before the union, and put back if that cannot be unmounted."""

    def __init__(self, union: MountEntry, mounts: Sequence[MountEntry]) -> None:
        self._union = union
        self._mounts = mounts
        #: A clone of each keeps what would be gone with a tmpfs, how it is set up, and its peers.
        self._clones: list[int] = []
        self._taken: set[int] = set()

    def take_off(self) -> None:
        """Unmount all, last first. Raises OSError for one that is in use, with all as it was before."""
        at = ""
        try:
            for mount in self._mounts:
                at = mount.mountpoint
                self._clones.append(self._private_clone(mount))
            for mount in reversed(self._mounts):
                at = mount.mountpoint
                unmount(mount)
                self._taken.add(mount.mount_id)
        except OSError as error:
            self.put_back()
            raise OSError(error.errno, error.strerror, at) from error

    def _private_clone(self, mount: MountEntry) -> int:
        """A clone that has the mount's peers, which the mount leaves."""
        from unionfs.sys import detached

        root = open_mount(mount.mountpoint, mount.mount_id)
        try:
            clone = detached.clone(root, recursive=False)
            try:
                detached.change(root, propagation=detached.PROPAGATION["private"])
            except BaseException:
                os.close(clone)
                raise
        finally:
            os.close(root)
        return clone

    def put_back(self) -> None:
        """Mount again what was taken off, parents first, and join the peers once more when all is there."""
        from unionfs.sys import detached

        mounted: list[tuple[int, int]] = []
        for mount, clone in zip(self._mounts, self._clones, strict=False):
            with suppress(OSError):
                mounted.append((self._mounted_again(mount, clone), clone))
        for root, clone in mounted:
            with suppress(OSError):
                detached.join_group(root, clone)
            os.close(root)
        self.let_go()

    def _mounted_again(self, mount: MountEntry, clone: int) -> int:
        """The root of the mount, or of a new one in its place."""
        from unionfs.sys import detached

        if mount.mount_id not in self._taken:
            return open_mount(mount.mountpoint, mount.mount_id)
        again = detached.clone(clone, recursive=False)
        try:
            # With its peers it would carry what is mounted on it next to them.
            detached.change(again, propagation=detached.PROPAGATION["private"])
            target = self._open_target(mount)
            try:
                detached.attach(again, target)
            finally:
                os.close(target)
        except BaseException:
            os.close(again)
            raise
        return again

    def _open_target(self, mount: MountEntry) -> int:
        """Where it was mounted in the union, wherever that is by now. Raises OSError."""
        place = mount.mountpoint[len(self._union.mountpoint) :].lstrip("/")
        now = next((m for m in read_mountinfo() if m.mount_id == self._union.mount_id), self._union)
        root = open_mount(now.mountpoint, now.mount_id)
        try:
            return openat2(root, os.fsencode(place), os.O_PATH, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
        finally:
            os.close(root)

    def let_go(self) -> None:
        """Close the clones."""
        while self._clones:
            os.close(self._clones.pop())


def umount(mountpoint: str, *, lazy: bool = False) -> None:
    """The command `umount`: unmount and wait until the daemon is gone, all on disk. Raises UserError."""
    path = absolute_mountpoint(mountpoint)
    table = read_mountinfo()
    mount = mounted_at(path, table)
    if mount is not None and mount.fstype == _SUBTYPE and (owner := others.owner_of(mount)) is not None:
        _umount_of_other(mount, owner, lazy=lazy)
        return
    entries = live.entries()
    entry = None if mount is None else live.find_by_device(mount.device, entries)
    if mount is None or not (mount.is_fuse and (entry is not None or mount.fstype == _SUBTYPE)):
        raise UserError(_why_not_ours(path, mount, entries))
    alive = entry is not None and entry.is_alive()
    dead = is_dead(path) if entry is None else not alive
    inside = [] if entry is None or lazy or dead else _storage_mounts(mount, entry.settings)
    storage = _Storage(mount, inside)
    if dead or lazy:
        _leave_peers(mount)
    if dead and not lazy:
        for inner in reversed(_reachable(mount)):
            with suppress(OSError):
                unmount(inner)
    try:
        storage.take_off()
        unmount(mount, lazy=lazy)
    except OSError as error:
        storage.put_back()
        if dead and error.errno == errno.EBUSY:
            # Nobody can use a dead mount; those who have a directory there only keep it from going.
            _unmount_dead(mount)
        elif error.errno == errno.EBUSY:
            busy = mount
            if error.filename is not None and os.fsdecode(error.filename) != path:
                busy = mounted_at(os.fsdecode(error.filename)) or mount
            raise UserError(_busy(path, busy, entry)) from error
        elif error.errno in (errno.EINVAL, errno.ENOENT):
            pass  # unmounted by somebody else in between
        else:
            raise UserError(_refused(path, error)) from error
    storage.let_go()
    if entry is None:
        return
    if not alive:
        _release_volumes(entry)
        entry.remove()
        return
    _wait_for_end(entry, path, lazy=lazy)


def _refused(path: str, error: OSError) -> str:
    return (
        f"{quoted(path)} cannot be unmounted: {reason(error)}; run the command as the user who mounted it, "
        "or as root."
    )


def _umount_of_other(mount: MountEntry, owner: int, *, lazy: bool) -> None:
    """End another user's mount. What its daemon left, if that is dead, the user's own process clears away.

    Nothing is asked of the mount, whose daemon may not want to answer. Raises UserError.
    """
    path = mount.mountpoint
    entry = live.find_by_device(mount.device, others.mounts_of_others().answered)
    try:
        unmount(mount, lazy=lazy)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise UserError(_busy(path, mount, None)) from error
        if error.errno not in (errno.EINVAL, errno.ENOENT):  # unmounted by somebody else in between
            raise UserError(_refused(path, error)) from error
    if entry is not None:
        _wait_for_end(entry, path, lazy=lazy)
        return
    run_as(owner, clear_abandoned, modules=_NEEDED_TO_CLEAR, seconds=_CLEARING_SECONDS)


def clear_abandoned() -> int:
    """Give back the volumes of this user's mounts that have neither a daemon nor a mount any more.

    Returns 0, as the exit code of a process of its own.
    """
    for entry in live.abandoned():
        _release_volumes(entry)
        entry.remove()
    return 0


def _unmount_dead(mount: MountEntry) -> None:
    try:
        unmount(mount, lazy=True)
    except OSError as error:
        raise UserError(
            f"the dead mount {quoted(mount.mountpoint)} cannot be unmounted: {reason(error)}; try as root."
        ) from error


def _wait_for_end(entry: live.LiveMount, path: str, *, lazy: bool) -> None:
    began = time.monotonic()
    answered = False
    while not wait_gone(entry.pid, entry.started, 0.2):
        waited = time.monotonic() - began
        if lazy and waited >= _LAZY_SECONDS:
            return
        if waited < _NOTICE_SECONDS or lazy:
            continue
        # An ending daemon still writes the upper to disk, which may take long on a slow one.
        if entry.uid is None and any(e.pid == entry.pid and e.ending for e in live.entries()):
            continue
        # One that gets no processor has noticed nothing yet; one that answers has.
        if not answered and waited < _DEAF_SECONDS:
            answered = entry.ask() is not None
            continue
        rest = entry.mounts()
        where = f"at {quoted(rest[0].mountpoint)}" if rest else "elsewhere (a mount namespace, an open file)"
        raise UserError(
            f"{quoted(path)} is unmounted, but the same union is still in use {where}, so its daemon (pid "
            f"{entry.pid}) goes on; end that use, and the daemon ends by itself."
        )


def _release_volumes(entry: live.LiveMount) -> None:
    """Give back the volumes of a daemon that was killed, when its guardian was too."""
    if entry.settings.storage:
        from unionfs.storage.users import release, user_of

        release(entry.settings, user_of(entry.settings.mountpoint, entry.pid, entry.started))


def _busy(path: str, mount: MountEntry, entry: live.LiveMount | None) -> str:
    """Why the union at `path` cannot be unmounted: `mount`, itself or something mounted in it, is in use."""
    # Whoever has a file of the host's filesystem mapped is no user of a bind mount of it.
    users = users_of(mount.mountpoint, mount.device if mount.is_fuse else "-1:-1")
    ours = set()
    if entry is not None and entry.settings.storage and (top := mounted_at(path)) is not None:
        ours = {storage.mountpoint for storage in _storage_mounts(top, entry.settings)}
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


def _why_not_ours(path: str, mount: MountEntry | None, entries: list[live.LiveMount]) -> str:
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
