"""`unionfs cleanup`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from unionfs.cli.common import complain, print_json
from unionfs.cli.completing import complete_mountpoints
from unionfs.daemon import dead, live, others
from unionfs.daemon.dead import DeadMount
from unionfs.daemon.live import LiveMount
from unionfs.daemon.settle import absolute_mountpoint
from unionfs.errors import UserError, quoted
from unionfs.sys.mountinfo import mounted_at


@click.command(
    epilog="""\b
Examples:
  unionfs cleanup
  unionfs cleanup --dry-run
  unionfs cleanup /mnt
""",
)
@click.option("--dry-run", is_flag=True, help="Only print what would be done.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.argument("mountpoints", nargs=-1, metavar="[MOUNTPOINT]...", shell_complete=complete_mountpoints)
def cleanup(mountpoints: tuple[str, ...], dry_run: bool, as_json: bool) -> int:
    """Unmount the mounts whose daemon has died: all of them, or those at MOUNTPOINT.

    Without MOUNTPOINT, it also removes what killed daemons left in the registry, and releases their volumes.
    As root it unmounts the dead mounts of all users, with each user's rights. It touches no other mount: not
    one that is in use, and not one that hangs.
    """
    abandoned = [] if mountpoints else live.abandoned()
    found, code = _named(mountpoints) if mountpoints else (_all(), 0)
    unmounted: list[DeadMount] = []
    for one in found:
        try:
            if not dry_run:
                dead.clean(one)
            unmounted.append(one)
        except UserError as error:
            code = complain("unionfs", str(error))
    if not dry_run:
        for entry in abandoned:
            dead.forget(entry)
    _report(unmounted, abandoned, dry_run=dry_run, as_json=as_json)
    return code


def _all() -> list[DeadMount]:
    """Return the dead mounts of this user, for root those of all users."""
    of_others = dead.dead_mounts_of_others(others.mounts_of_others().silent)
    return _last_first([*of_others, *dead.dead_mounts()])


def _named(mountpoints: Sequence[str]) -> tuple[list[DeadMount], int]:
    """Return the dead mounts at these mountpoints. Reports those that are none; returns the exit code."""
    found, code = [], 0
    for path in dict.fromkeys(absolute_mountpoint(mountpoint) for mountpoint in mountpoints):
        one = dead.dead_mount_at(path)
        if one is None:
            code = complain("unionfs", _why_not(path))
        else:
            found.append(one)
    return _last_first(found), code


def _why_not(path: str) -> str:
    mount = mounted_at(path)
    if mount is None or not mount.is_fuse:
        return f"{quoted(path)} is not a unionfs mount; `unionfs ls` lists the mounts."
    user = mount.super_option("user_id")
    if os.geteuid() != 0 and user != str(os.geteuid()):
        return f"{quoted(path)} belongs to uid {user}; run the command as that user, or as root."
    return (
        f"{quoted(path)} is not dead: its daemon is alive, even if it does not answer; "
        f"unmount it by `unionfs umount {quoted(path)}`."
    )


def _last_first(found: Sequence[DeadMount]) -> list[DeadMount]:
    """Return mounts inside others before those."""
    return sorted(found, key=lambda one: one.mount.mount_id, reverse=True)


def _report(
    unmounted: Sequence[DeadMount], forgotten: Sequence[LiveMount], *, dry_run: bool, as_json: bool
) -> None:
    if as_json:
        values = {
            "dry_run": dry_run,
            "unmounted": [
                {
                    "mountpoint": one.mount.mountpoint,
                    "pid": None if one.entry is None else one.entry.pid,
                    "uid": one.owner,
                }
                for one in unmounted
            ],
            "forgotten": [
                {"mountpoint": entry.settings.mountpoint, "pid": entry.pid} for entry in forgotten
            ],
        }
        print_json(values)
        return
    for one in unmounted:
        whose = "" if one.owner is None else f" of uid {one.owner}"
        daemon = "" if one.entry is None else f" (pid {one.entry.pid})"
        did = "would unmount" if dry_run else "unmounted"
        print(f"{did} {quoted(one.mount.mountpoint)}{whose}: its daemon{daemon} has died")
    for entry in forgotten:
        did = "would remove" if dry_run else "removed"
        where = quoted(entry.settings.mountpoint)
        print(f"{did} the registry entry of {where}: its daemon (pid {entry.pid}) has died")
