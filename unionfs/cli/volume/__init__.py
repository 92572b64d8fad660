"""`unionfs volume`: named volumes."""

from __future__ import annotations

import click

from unionfs.cli.lazy import LazyGroup

_COMMANDS = {
    "create": ("unionfs.cli.volume.making:create", "Create a volume."),
    "ls": ("unionfs.cli.volume.listing:ls", "List volumes."),
    "inspect": ("unionfs.cli.volume.listing:inspect", "Show all about volumes."),
    "rm": ("unionfs.cli.volume.removing:rm", "Remove volumes."),
    "prune": ("unionfs.cli.volume.removing:prune", "Remove volumes that nobody uses."),
    "backup": ("unionfs.cli.volume.archiving:backup", "Write a volume into an archive."),
    "restore": ("unionfs.cli.volume.archiving:restore", "Put an archive's content into a volume."),
    "clone": ("unionfs.cli.volume.archiving:clone", "Copy a volume."),
    "verify": ("unionfs.cli.volume.archiving:verify", "Check a volume or an archive against its manifest."),
    "resize": ("unionfs.cli.volume.making:resize", "Change the size of a volume that has one."),
}


@click.command(
    cls=LazyGroup,
    places=_COMMANDS,
    epilog="Example: unionfs volume create --label app=shop orders",
)
def volume() -> None:
    """Manage named volumes: data that outlives unions and containers.

    Root keeps them in /var/lib/unionfs, others in $XDG_DATA_HOME/unionfs (~/.local/share/unionfs); --root or
    UNIONFS_ROOT names another directory.
    """
