"""`unionfs volume`: named volumes."""

from __future__ import annotations

import click

from unionfs.cli.lazy import LazyGroup

_COMMANDS = {
    "create": ("unionfs.cli.volume.making:create", "Create a volume."),
    "ls": ("unionfs.cli.volume.listing:ls", "List volumes."),
    "inspect": ("unionfs.cli.volume.listing:inspect", "Show details of volumes."),
    "rm": ("unionfs.cli.volume.removing:rm", "Remove volumes."),
    "prune": ("unionfs.cli.volume.removing:prune", "Remove unused volumes."),
    "backup": ("unionfs.cli.volume.archiving:backup", "Back up a volume to an archive."),
    "restore": ("unionfs.cli.volume.archiving:restore", "Restore a volume from an archive."),
    "clone": ("unionfs.cli.volume.archiving:clone", "Copy a volume."),
    "verify": ("unionfs.cli.volume.archiving:verify", "Check a volume or an archive against its manifest."),
    "export": ("unionfs.cli.volume.moving:export", "Write a volume's content as a plain tar."),
    "import": ("unionfs.cli.volume.moving:import_", "Replace a volume's content with that of a plain tar."),
    "exists": ("unionfs.cli.volume.moving:exists", "Check whether a volume exists."),
    "rename": ("unionfs.cli.volume.moving:rename", "Rename a volume."),
    "resize": ("unionfs.cli.volume.making:resize", "Resize a volume."),
}


@click.command(
    cls=LazyGroup,
    places=_COMMANDS,
    aliases={"list": "ls", "remove": "rm"},
    epilog="Example: unionfs volume create --label app=shop orders",
)
def volume() -> None:
    """Manage named volumes: data that outlives unions and containers.

    Root's volumes are in /var/lib/unionfs, a user's in $XDG_DATA_HOME/unionfs (~/.local/share/unionfs);
    --root or UNIONFS_ROOT names another directory.
    """
