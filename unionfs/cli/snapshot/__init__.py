"""`unionfs snapshot`: snapshots of a mounted union."""

from __future__ import annotations

import os

import click

from unionfs.cli.lazy import LazyGroup
from unionfs.sys.mountinfo import mounted_at

_COMMANDS = {
    "create": ("unionfs.cli.snapshot.changing:create", "Take a snapshot of a mount."),
    "ls": ("unionfs.cli.snapshot.showing:ls", "List the snapshots of a mount."),
    "diff": ("unionfs.cli.snapshot.showing:diff", "Show what changed between two."),
    "restore": ("unionfs.cli.snapshot.changing:restore", "Go back to a snapshot."),
    "rm": ("unionfs.cli.snapshot.changing:rm", "Remove snapshots."),
}


class _Snapshot(LazyGroup):
    """Without a command, but with a mount, it is `create`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and _is_place(args[0]):
            args = ["create", *args]
        return super().resolve_command(ctx, args)


def _is_place(word: str) -> bool:
    return "/" in word or mounted_at(os.path.abspath(word)) is not None


@click.command(
    cls=_Snapshot,
    places=_COMMANDS,
    epilog="""\b
Examples:
  unionfs snapshot /mnt before-upgrade
  unionfs snapshot restore /mnt before-upgrade
""",
)
def snapshot() -> None:
    """Take and restore snapshots of a mount, while programs use it.

    `unionfs snapshot MOUNTPOINT [NAME]` is short for `unionfs snapshot create MOUNTPOINT [NAME]`.

    The upper becomes a lower, and a new upper lies on top; nothing is copied but the files that are open for
    writing. The layers are in UPPER.snapshots. A later mount of the upper includes
    them.
    A container with another storage driver than union has no such mount.
    """
