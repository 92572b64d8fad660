"""Common to the commands of snapshots: completion of their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from unionfs.cli.completing import items
from unionfs.cli.finding import find_mount
from unionfs.errors import UserError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def complete_snapshots(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete names of snapshots of the mount that is named before."""
    # For start-up time: only completion needs it.
    from unionfs.branches.snapshots import record_of

    try:
        _, record = record_of(find_mount(context.params.get("mountpoint") or ""))
    except (UserError, OSError):
        return []
    return items((one.name for one in record.shown()), incomplete)
