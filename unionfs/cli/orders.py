"""`unionfs sync` and `refresh`: orders to the daemon of a mount."""

from __future__ import annotations

import click

from unionfs.cli.completing import complete_mountpoints
from unionfs.cli.finding import find_mount
from unionfs.daemon.orders import give


@click.command(epilog="Example: unionfs sync /mnt")
@click.argument("mountpoint", shell_complete=complete_mountpoints)
def sync(mountpoint: str) -> None:
    """Write all data of the mount at MOUNTPOINT to disk, and return when it is there.

    sync(1) and syncfs(2) write the kernel's cache of a union to the upper, but not the upper to its disk: the
    kernel does not ask a FUSE daemon to. fsync(2) of a file does.
    """
    give(find_mount(mountpoint), "sync", "written to disk", "check the disk of the upper")


@click.command(epilog="Example: unionfs refresh /mnt")
@click.argument("mountpoint", shell_complete=complete_mountpoints)
def refresh(mountpoint: str) -> None:
    """Make changes visible that others made to the lowers of the mount at MOUNTPOINT.

    A lower must not change while it is mounted without --watch-lower. If it did, this makes the union show
    its names, attributes and data as they are now. A file that was replaced or removed stays as it is for
    those who have it open.
    """
    give(find_mount(mountpoint), "refresh", "refreshed", "mount it again")
