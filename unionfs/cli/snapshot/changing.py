"""`unionfs snapshot create`, `restore` and `rm`."""

from __future__ import annotations

import click

from unionfs.cli.branch.common import json_option, print_json, tell
from unionfs.cli.completing import complete_mountpoints
from unionfs.cli.finding import find_mount
from unionfs.cli.run import moment
from unionfs.errors import quoted


@click.command(epilog="Example: unionfs snapshot create /mnt before-upgrade")
@json_option
@click.argument("mountpoint", shell_complete=complete_mountpoints)
@click.argument("name", required=False)
def create(as_json: bool, mountpoint: str, name: str | None) -> None:
    """Take a snapshot of the mount at MOUNTPOINT, by default with the present time as its NAME.

    Programs go on, also with open files. Of a file that is open for writing the snapshot has a copy.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.snapshots import take

    taken = take(find_mount(mountpoint), name)
    if as_json:
        keys = "name", "layer", "seconds", "open_files", "files"
        print_json({**{key: taken[key] for key in keys}, "created": moment(taken["created"])})
        return
    print(taken["name"])
    for one in taken["files"]:
        why = "may be written through a mapping" if one["state"] == "mapped" else "was written while it was copied"
        tell(f"{quoted(one['path'])} {why}: its copy in the snapshot may be of no single moment.")


@click.command(epilog="Example: unionfs snapshot restore /mnt before-upgrade")
@json_option
@click.argument("mountpoint", shell_complete=complete_mountpoints)
@click.argument("name")
def restore(as_json: bool, mountpoint: str, name: str) -> None:
    """Let the mount at MOUNTPOINT show its snapshot NAME again, and drop what was changed since the newest one.

    To keep that, take a snapshot before. Other snapshots stay, also those that were taken after NAME. Files that
    are open stay as they are for those who have them open, as if they had been removed.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.branches import snapshots

    done = snapshots.restore(find_mount(mountpoint), name)
    if as_json:
        print_json({"name": done["name"], "lowers": done["lowers"]})


@click.command(epilog="Example: unionfs snapshot rm /mnt before-upgrade")
@json_option
@click.argument("mountpoint", shell_complete=complete_mountpoints)
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def rm(as_json: bool, mountpoint: str, names: tuple[str, ...]) -> None:
    """Remove the snapshots NAME... of the mount at MOUNTPOINT."""
    raise NotImplementedError
