"""Removes a union's mounts without a command: a daemon's own when it ends, and those of a killed daemon."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from unionfs.daemon.inside import leave_peers, unmount_inside
from unionfs.sys.calls import syncfs
from unionfs.sys.fds import Owned, close_quietly
from unionfs.sys.liveness import is_dead
from unionfs.sys.mountinfo import MountEntry, mounted_at, mounts_of_device
from unionfs.sys.unmount import open_mount, unmount

# How often to look for the mount again: its path may change during the unmount.
_ATTEMPTS = 10


def end_from_within(device: str) -> bool:
    """Sync and unmount this process's own mount. `device` is its `major:minor`.

    Blocks: run it in a thread while the daemon keeps serving, since data written through mmap arrives only
    now. Mounts in use are detached. Returns whether none is left: one that another mount covers stays.
    """
    # Read again, since a mount whose directory was renamed meanwhile looks as if it were unmounted already.
    for _ in range(_ATTEMPTS):
        # Newest first: bind mounts of parts of the union before the union.
        on_top = [mount for mount in reversed(mounts_of_device(device)) if _is_on_top(mount)]
        if not on_top:
            break
        for mount in on_top:
            _end_mount(mount)
    return not mounts_of_device(device)


def _end_mount(mount: MountEntry) -> None:
    """Unmount or detach one mount; nothing, if it is not at its path any more."""
    with _synced(mount):
        pass
    unmount_inside(mount)
    try:
        unmount(mount)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return
        with _synced(mount), suppress(OSError):
            unmount(mount, lazy=True)


def _is_on_top(mount: MountEntry) -> bool:
    """Return whether nothing is mounted over it; umount would remove that mount instead."""
    on_top = mounted_at(mount.mountpoint)
    return on_top is not None and on_top.device == mount.device


@contextmanager
def _synced(mount: MountEntry) -> Iterator[None]:
    """Sync the mount's filesystem at the end of the block, even if the block detaches the mount."""
    fd = None
    with ExitStack() as held:
        with suppress(OSError), Owned(open_mount(mount)) as root:
            fd = os.open(f"/proc/self/fd/{root}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(close_quietly, fd)
        yield
        if fd is not None:
            with suppress(OSError):
                syncfs(fd)


def clear_leftovers(device: str, *, connected: bool = False) -> None:
    """Detach the remaining mounts of this process's connection after an error.

    Unless `connected`, a mount that is not dead is another one: the kernel reuses device numbers.
    """
    for mount in reversed(mounts_of_device(device)):
        if _is_on_top(mount) and (connected or (mount.is_fuse and is_dead(mount.mountpoint))):
            leave_peers(mount)
            with suppress(OSError):
                unmount(mount, lazy=True)


def clear_dead_mounts(device: str) -> None:
    """Unmount the union `device` (major:minor) of a killed daemon, after the mounts inside it."""
    for mount in reversed(mounts_of_device(device)):
        if is_dead(mount.mountpoint):  # else the device number was reused
            unmount_inside(mount)
            with suppress(OSError):
                unmount(mount, lazy=True)
