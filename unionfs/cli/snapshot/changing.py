"""`unionfs snapshot create`, `restore` and `rm`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from unionfs.cli.branch.common import json_option
from unionfs.cli.common import print_json, tell
from unionfs.cli.completing import complete_mountpoints
from unionfs.cli.finding import find_mount
from unionfs.cli.snapshot.common import complete_snapshots
from unionfs.errors import quoted
from unionfs.settings.words import moment

if TYPE_CHECKING:
    from unionfs.daemon.live import LiveMount


@click.command(epilog="Example: unionfs snapshot create /mnt before-upgrade")
@click.option("--no-stop", is_flag=True, help="Do not stop programs that have files open for writing.")
@json_option
@click.argument("mountpoint", shell_complete=complete_mountpoints)
@click.argument("name", required=False)
def create(no_stop: bool, as_json: bool, mountpoint: str, name: str | None) -> None:
    """Take a snapshot of the mount at MOUNTPOINT, by default with the present time as its NAME.

    Programs continue, also with open files. Files that are open for writing are copied into the snapshot;
    meanwhile programs that have such files are stopped, so that all files are of one moment. With --no-stop,
    and where this user may not stop them, files that were written meanwhile are listed.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.snapshots import has_to_join, take

    mount = find_mount(mountpoint)
    taken = take(mount, name, stop=not no_stop)
    if as_json:
        keys = "name", "layer", "seconds", "open_files", "stopped", "files"
        print_json({**{key: taken[key] for key in keys}, "created": moment(taken["created"])})
    else:
        print(taken["name"])
    for one in [] if as_json else taken["files"]:
        why = (
            "may be written through a mapping"
            if one["state"] == "mapped"
            else "was written while it was copied"
        )
        tell(f"{quoted(one['path'])} {why}: its copy in the snapshot may mix several states.")
    if has_to_join(mount):
        join_layers(mount, wait=False)


@click.command(epilog="Example: unionfs snapshot restore /mnt before-upgrade")
@json_option
@click.argument("mountpoint", shell_complete=complete_mountpoints)
@click.argument("name", shell_complete=complete_snapshots)
def restore(as_json: bool, mountpoint: str, name: str) -> None:
    """Restore the snapshot NAME of the mount at MOUNTPOINT, and drop the changes since the newest snapshot.

    To keep these, take a snapshot before. Other snapshots stay, also those taken after NAME. Programs keep
    the files that they have open, as after a removal.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.branches import snapshots

    done = snapshots.restore(find_mount(mountpoint), name)
    if as_json:
        print_json({"name": done["name"], "lowers": done["lowers"]})


@click.command(epilog="Example: unionfs snapshot rm /mnt before-upgrade")
@click.option("--wait", is_flag=True, help="Return when the layers are joined.")
@json_option
@click.argument("mountpoint", shell_complete=complete_mountpoints)
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_snapshots)
def rm(wait: bool, as_json: bool, mountpoint: str, names: tuple[str, ...]) -> None:
    """Remove the snapshots NAME... of the mount at MOUNTPOINT.

    The layer of one that another one lies on is joined with that in the background. The layers that the mount
    has stay until it is unmounted.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.branches import snapshots

    mount = find_mount(mountpoint)
    goes_on = snapshots.remove(mount, names)
    if as_json:
        print_json({"removed": list(names), "joins": goes_on})
    if goes_on:
        join_layers(mount, wait=wait)


def join_layers(mount: LiveMount, *, wait: bool) -> None:
    """Join removed layers, in the background unless `wait`. Raises UserError."""
    # For start-up time: --help and completion do not need it.
    from unionfs.branches.snapshots import merge

    if wait:
        merge(mount)
        return
    sys.stdout.flush()
    if os.fork():
        return
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        os.nice(10)
        merge(mount)
    finally:
        os._exit(0)
