"""`unionfs volume`: named volumes."""

from __future__ import annotations

import click

from unionfs.cli.lazy import LazyGroup

_COMMANDS = {
    "create": "unionfs.cli.volume.making:create",
    "ls": "unionfs.cli.volume.listing:ls",
    "inspect": "unionfs.cli.volume.listing:inspect",
    "rm": "unionfs.cli.volume.removing:rm",
    "prune": "unionfs.cli.volume.removing:prune",
    "backup": "unionfs.cli.volume.archiving:backup",
    "restore": "unionfs.cli.volume.archiving:restore",
    "clone": "unionfs.cli.volume.archiving:clone",
    "verify": "unionfs.cli.volume.archiving:verify",
    "resize": "unionfs.cli.volume.making:resize",
}


@click.command(
    cls=LazyGroup,
    places=_COMMANDS,
    short_help="Manage named volumes.",
    epilog="Example: unionfs volume create --label app=shop orders",
)
def volume() -> None:
    """Manage named volumes: data that outlives unions and containers.

    Root keeps them in /var/lib/unionfs, others in $XDG_DATA_HOME/unionfs (~/.local/share/unionfs); --root or
    UNIONFS_ROOT names another directory.
    """
