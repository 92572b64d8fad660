"""`unionfs snapshot`: snapshots of a mounted union."""

from __future__ import annotations

import click

from unionfs.cli.lazy import LazyGroup

_COMMANDS = {
    "create": ("unionfs.cli.snapshot.changing:create", "Take a snapshot of a mount."),
    "ls": ("unionfs.cli.snapshot.showing:ls", "List the snapshots of a mount."),
    "diff": ("unionfs.cli.snapshot.showing:diff", "Show what changed between two."),
    "restore": ("unionfs.cli.snapshot.changing:restore", "Go back to a snapshot."),
    "rm": ("unionfs.cli.snapshot.changing:rm", "Remove snapshots."),
}


@click.command(
    cls=LazyGroup,
    places=_COMMANDS,
    epilog="Example: unionfs snapshot create /mnt before-upgrade",
)
def snapshot() -> None:
    """Take and restore snapshots of a mount, while programs use it.

    The upper becomes a lower, and a new upper lies on top; nothing is copied but the files that are open for
    writing. The layers are in UPPER.snapshots. A later mount of the upper includes
    them.
    A container with another storage driver than union has no such mount.
    """
