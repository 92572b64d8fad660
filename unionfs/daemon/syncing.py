"""The daemon's side of `unionfs sync`: writes a union to disk."""

from __future__ import annotations

import os

import trio

from unionfs.sys.calls import syncfs
from unionfs.sys.fds import Owned
from unionfs.sys.mountinfo import MountEntry
from unionfs.sys.unmount import open_mount
from unionfs.union.layers import LayerStack


async def sync(mount: MountEntry | None, stack: LayerStack) -> None:
    """Write the kernel's cached data of the mount to the layers, and these to disk. Raises ``OSError``.

    `mount` is None if the mount is detached; then only data that was already written back is synced.
    """
    await write_back(mount)
    await trio.to_thread.run_sync(stack.sync_upper, abandon_on_cancel=True)
    await trio.to_thread.run_sync(stack.sync_bound, abandon_on_cancel=True)


async def write_back(mount: MountEntry | None) -> None:
    """Write the kernel's cached data of the mount to the layers. Raises ``OSError``."""
    if mount is not None:
        # The loop serves the writes of the page cache meanwhile.
        await trio.to_thread.run_sync(_write_back, mount, abandon_on_cancel=True)


def _write_back(mount: MountEntry) -> None:
    """syncfs(2) of the mount: the kernel writes its page cache, and sends no request for it."""
    with Owned(open_mount(mount)) as root:
        path = f"/proc/self/fd/{root}"
        with Owned(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
            syncfs(fd)
