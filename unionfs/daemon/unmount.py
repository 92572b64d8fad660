"""Ending mounts: from within the daemon, from the command line, and clearing away what a crashed daemon
left."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from contextlib import suppress

from unionfs.daemon import live
from unionfs.daemon.errors import UserError, quoted, reason
from unionfs.daemon.fuse import find_fusermount, is_dead
from unionfs.daemon.settings import absolute_mountpoint
from unionfs.sys.calls import syncfs
from unionfs.sys.mount import MNT_DETACH, umount2
from unionfs.sys.mountinfo import MountEntry, mounted_at, mounts_of_device, read_mountinfo
from unionfs.sys.process import users_of, wait_gone

# How long a daemon may take to notice that its mount is gone before we look for what else holds the mount.
_NOTICE_SECONDS = 2.0
_LAZY_SECONDS = 0.5


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount what is on top at `mountpoint`, by fusermount3 where umount2(2) is not allowed.

    With `lazy` the mount leaves the tree at once and goes when its last user goes. Raises OSError, EBUSY when
    somebody uses it.
    """
    try:
        umount2(mountpoint, MNT_DETACH if lazy else 0)
    except PermissionError:
        program = find_fusermount()
        if program is None:
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
        _sync(mount.mountpoint)
        try:
            unmount(mount.mountpoint)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):  # somebody else was quicker
                continue
            detached = True
            fd = _open_directory(mount.mountpoint)
            try:
                with suppress(OSError):
                    unmount(mount.mountpoint, lazy=True)
                # What was written between the first sync and now.
                if fd is not None:
                    with suppress(OSError):
                        syncfs(fd)
            finally:
                if fd is not None:
                    os.close(fd)
    return detached


def _open_directory(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None


def _sync(mountpoint: str) -> None:
    fd = _open_directory(mountpoint)
    if fd is not None:
        try:
            with suppress(OSError):
                syncfs(fd)
        finally:
            os.close(fd)


def clear_leftovers(device: str) -> None:
    """Detach whatever mounts of a dead connection are left; for a daemon that ends by an error.

    Only dead ones: if none of ours is left, the number of the device may be another mount's by now.
    """
    for mount in reversed(mounts_of_device(device)):
        on_top = mounted_at(mount.mountpoint)
        if on_top is not None and on_top.device == device and on_top.is_fuse and is_dead(mount.mountpoint):
            with suppress(OSError):
                unmount(mount.mountpoint, lazy=True)


def umount(mountpoint: str, *, lazy: bool = False) -> None:
    """The command `umount`: unmount and wait until the daemon is gone, all on disk. Raises UserError."""
    path = absolute_mountpoint(mountpoint)
    table = read_mountinfo()
    mount = mounted_at(path, table)
    entries = live.entries()
    entry = None if mount is None else live.find_by_device(mount.device, entries)
    if mount is None or not (mount.is_fuse and (entry is not None or mount.fstype == "fuse.unionfs")):
        raise UserError(_why_not_ours(path, mount, entries))
    alive = entry is not None and entry.is_alive()
    dead = is_dead(path) if entry is None else not alive
    try:
        unmount(path, lazy=lazy)
    except OSError as error:
        if dead and error.errno == errno.EBUSY:
            # Nobody can use a dead mount; those who have a directory there only keep it from going.
            _unmount_dead(path)
        elif error.errno == errno.EBUSY:
            raise UserError(_busy(path, mount)) from error
        elif error.errno in (errno.EINVAL, errno.ENOENT):
            pass  # unmounted by somebody else in between
        else:
            raise UserError(
                f"{quoted(path)} cannot be unmounted: {reason(error)}; run the command as the user who "
                "mounted it, or as root."
            ) from error
    if entry is None:
        return
    if not alive:
        entry.remove()
        return
    _wait_for_end(entry, path, lazy=lazy)


def _unmount_dead(path: str) -> None:
    try:
        unmount(path, lazy=True)
    except OSError as error:
        raise UserError(
            f"the dead mount {quoted(path)} cannot be unmounted: {reason(error)}; try as root."
        ) from error


def _wait_for_end(entry: live.LiveMount, path: str, *, lazy: bool) -> None:
    began = time.monotonic()
    while not wait_gone(entry.pid, entry.started, 0.2):
        waited = time.monotonic() - began
        if lazy and waited >= _LAZY_SECONDS:
            return
        if waited < _NOTICE_SECONDS or lazy:
            continue
        # An ending daemon still writes the upper to disk, which may take long on a slow one.
        if any(known.pid == entry.pid and known.ending for known in live.entries()):
            continue
        rest = entry.mounts()
        where = f"at {quoted(rest[0].mountpoint)}" if rest else "elsewhere (a mount namespace, an open file)"
        raise UserError(
            f"{quoted(path)} is unmounted, but the same union is still in use {where}, so its daemon (pid "
            f"{entry.pid}) goes on; end that use, and the daemon ends by itself."
        )


def _busy(path: str, mount: MountEntry) -> str:
    users = users_of(path, mount.device)
    inside = [
        other.mountpoint
        for other in read_mountinfo()
        if other.mount_id != mount.mount_id and other.mountpoint.startswith(path.rstrip("/") + "/")
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
