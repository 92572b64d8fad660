"""`unionfs umount`."""

from __future__ import annotations

import click


@click.command(epilog="Example: unionfs umount /mnt")
@click.option("--lazy", is_flag=True, help="Detach a mount that is in use; it ends with its last user.")
@click.argument("mountpoint")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT, and return when its daemon is gone and all changes are on disk.

    A mount whose daemon has died is removed, too.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.daemon.unmount import umount as end

    end(mountpoint, lazy=lazy)
