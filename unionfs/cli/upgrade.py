"""`unionfs upgrade`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from unionfs.cli.common import complain
from unionfs.cli.completing import complete_mountpoints
from unionfs.cli.finding import find_mount
from unionfs.daemon.live import live_mounts
from unionfs.daemon.orders import exchange
from unionfs.errors import UserError, quoted


@click.command(epilog="Example: unionfs upgrade --all")
@click.option("--all", "every", is_flag=True, help="All mounts of this user that outlive their daemons.")
@click.argument("mountpoints", nargs=-1, metavar="[MOUNTPOINT]...", shell_complete=complete_mountpoints)
def upgrade(mountpoints: Sequence[str], every: bool) -> int:
    """Replace the daemons of mounts by the installed version, while the mounts are in use.

    Only mounts with the option outlive have a holder, which starts the other daemon. Programs go on, also
    with open files; their requests wait until it serves. If the installed version cannot take over what the
    running daemon knows, nothing changes.
    """
    if not mountpoints and not every:
        raise UserError("no mount is given; name mountpoints, or give --all.")
    mounts = [find_mount(path) for path in mountpoints]
    if every:
        mounts += [mount for mount in live_mounts() if mount.holder is not None]
    code = 0
    for mount in mounts:
        try:
            pid = exchange(mount)
            print(f"{quoted(mount.settings.mountpoint)}: daemon {mount.pid} was replaced by {pid}")
        except UserError as error:
            code = complain("unionfs", str(error))
    return code
