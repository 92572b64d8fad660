"""`unionfs umount`."""

from __future__ import annotations

import click

from unionfs.cli.common import for_each
from unionfs.cli.completing import complete_mountpoints
from unionfs.errors import UserError


@click.command(
    epilog="""\b
Examples:
  unionfs umount /mnt
  unionfs umount --lazy /srv/a /srv/b
  unionfs umount --all
""",
)
@click.option("-l", "--lazy", is_flag=True, help="Detach a mount that is in use; it ends with its last user.")
@click.option(
    "-f", "--force", is_flag=True,
    help="End a mount that is in use, or was detached: its users get errors from now on.",
)  # fmt: skip
@click.option(
    "-a", "--all", "every", is_flag=True,
    help="Unmount all mounts of this user, the newest first; not those of `unionfs run`.",
)  # fmt: skip
@click.argument("mountpoints", nargs=-1, metavar="[MOUNTPOINT]...", shell_complete=complete_mountpoints)
def umount(mountpoints: tuple[str, ...], lazy: bool, force: bool, every: bool) -> int:
    """Unmount MOUNTPOINT, and return when its daemon is gone and all changes are on disk.

    A mount in use, also by another mount namespace such as a container's, stays as it is, and whatever uses
    it is named. A mount whose daemon has died is removed, too. An error is reported, and the others are still
    unmounted.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.containers.naming import container_of
    from unionfs.daemon.live import live_mounts, waiting_mounts
    from unionfs.daemon.unmount import umount as end

    if every == bool(mountpoints):
        raise UserError("give either mountpoints or --all.")
    if every:
        # A union may lie on another one.
        mountpoints = tuple(
            mount.settings.mountpoint for mount in (*waiting_mounts(), *reversed(live_mounts()))
            if not mount.settings.lives_with
        )

    def end_one(mountpoint: str) -> bool:
        end(mountpoint, lazy=lazy, force=force, container_of=container_of)
        return False

    return for_each(mountpoints, end_one)
