"""`unionfs snapshot ls` and `diff`."""

from __future__ import annotations

import click

from unionfs.cli.branch.common import json_option
from unionfs.cli.branch.differences import rendered, show, values_of
from unionfs.cli.common import print_json, print_table
from unionfs.cli.completing import complete_mountpoints
from unionfs.cli.finding import find_mount
from unionfs.cli.snapshot.common import complete_snapshots
from unionfs.errors import quoted
from unionfs.settings.words import in_table, moment


@click.command(epilog="Example: unionfs snapshot ls --json /mnt")
@json_option
@click.argument("mountpoint", shell_complete=complete_mountpoints)
def ls(as_json: bool, mountpoint: str) -> None:
    """List the snapshots of the mount at MOUNTPOINT: name, time, the one below it, and where its layer is.

    `*` marks those that the mount lies on. With --json, `lowers` lists the lowers of a mount of the snapshot,
    also by kernel overlayfs.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.snapshots import shown

    found = [{**one, "created": moment(one["created"])} for one in shown(find_mount(mountpoint))]
    if as_json:
        print_json(found)
    elif found:
        rows = [
            (
                one["name"] + (" *" if one["current"] else ""), in_table(one["created"]),
                one["parent"] or "-", quoted(one["layer"]),
            )
            for one in found
        ]  # fmt: skip
        print_table(("NAME", "MADE", "OVER", "LAYER"), rows)


@click.command(epilog="Example: unionfs snapshot diff --stat /mnt before-upgrade")
@click.option("--stat", "form", flag_value="stat", help="Lines added and removed in each file, and a total.")
@click.option("--content", "form", flag_value="content",
              help="A unified diff of text files; size and SHA-256 of others.")  # fmt: skip
@json_option
@click.argument("mountpoint", shell_complete=complete_mountpoints)
@click.argument("name", shell_complete=complete_snapshots)
@click.argument("other", required=False, shell_complete=complete_snapshots)
def diff(form: str | None, as_json: bool, mountpoint: str, name: str, other: str | None) -> None:
    """Show what changed from the snapshot NAME to OTHER, by default to the present state: as `branch diff`,
    A(dded), C(hanged), D(eleted) or R(enamed), the path, and for a change what it changes.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.describe import Describer
    from unionfs.branches.snapshots import compared

    with compared(find_mount(mountpoint), name, other) as view:
        describer = Describer(view)
        found = describer.differences()
        if as_json:
            print_json([values_of(describer, item, form) for item in found])
            return
        lines = list(rendered(describer, found, form))
    show(lines)
