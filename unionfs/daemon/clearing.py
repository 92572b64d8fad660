"""Taking a union's mounts away without a command: the daemon's own at its end, and those of a killed one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from unionfs.daemon.inside import leave_peers, unmount_inside
from unionfs.sys.calls import syncfs
from unionfs.sys.fds import Owned
from unionfs.sys.liveness import is_dead
from unionfs.sys.mountinfo import MountEntry, mounted_at, mounts_of_device
from unionfs.sys.unmount import open_mount, unmount


def end_from_within(device: str) -> bool:
    """End this process's own mount, `device` being its `major:minor`, with everything written to disk.

    Blocks, so it runs in a thread while the daemon goes on answering: what programs wrote through mmap comes
    only now. Mounts that are in use are detached. Returns whether any were.
    """
    detached = False
    # The newest first: bind mounts of parts of the union before the union.
    for mount in reversed(mounts_of_device(device)):
        if not _is_on_top(mount):
            continue
        with _synced(mount):
            pass
        unmount_inside(mount)
        try:
            unmount(mount)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):  # somebody else was quicker
                continue
            detached = True
            with _synced(mount), suppress(OSError):
                unmount(mount, lazy=True)
    return detached


def _is_on_top(mount: MountEntry) -> bool:
    """Whether nothing else is mounted over it, which would be unmounted in its place."""
    on_top = mounted_at(mount.mountpoint)
    return on_top is not None and on_top.device == mount.device


@contextmanager
def _synced(mount: MountEntry) -> Iterator[None]:
    """Write the mount's filesystem to disk at the end of the block, though the block detaches the mount."""
    fd = None
    with ExitStack() as held:
        with suppress(OSError), Owned(open_mount(mount)) as root:
            fd = os.open(f"/proc/self/fd/{root}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, fd)
        yield
        if fd is not None:
            with suppress(OSError):
                syncfs(fd)


def clear_leftovers(device: str, *, connected: bool = False) -> None:
    """Detach the mounts that are left of this process's connection, for a daemon that ends by an error.

    Unless it is still `connected`, a mount that is not dead is somebody else's: the device number of a mount
    that is gone is given to the next.
    """
    for mount in reversed(mounts_of_device(device)):
        if _is_on_top(mount) and (connected or (mount.is_fuse and is_dead(mount.mountpoint))):
            leave_peers(mount)
            with suppress(OSError):
                unmount(mount, lazy=True)


def clear_dead_mounts(device: str) -> None:
    """Unmount the union `device` (major:minor), whose daemon was killed, and first what is mounted in it."""
    for mount in reversed(mounts_of_device(device)):
        if is_dead(mount.mountpoint):  # else the number was given to another one
            unmount_inside(mount)
            with suppress(OSError):
                unmount(mount, lazy=True)
