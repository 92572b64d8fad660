"""`unionfs diff`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import click

from unionfs.cli.common import on_terminal, print_json
from unionfs.cli.completing import complete_directories, complete_files, complete_mountpoints
from unionfs.cli.finding import find_mount
from unionfs.cli.terminal import shell_word
from unionfs.daemon.differences import changes_of
from unionfs.daemon.live import LiveMount, find_by_device
from unionfs.daemon.others import runtime_parent
from unionfs.daemon.preflight import check_directory, check_lower
from unionfs.daemon.silent import await_layers, interruptible, layers_of
from unionfs.errors import UserError, quoted
from unionfs.sys.asuser import run_as
from unionfs.sys.capabilities import may_use_trusted_xattrs
from unionfs.union.diff import diff as changes


@click.command(
    epilog="""\b
Examples:
  unionfs diff /mnt
  unionfs diff --upper /srv/changes --lower /srv/base
  unionfs diff --json /mnt
""",
)
@click.option("-u", "--upper", metavar="DIR", shell_complete=complete_directories,
              help="An upper, mounted or not.")
@click.option(
    "-l", "--lower", "lowers", multiple=True, metavar="DIR|IMAGE", shell_complete=complete_files,
    help="A lower; the first is on top."
)
@click.option("--userxattr", is_flag=True, help="Markers are user.overlay.* xattrs (always without root).")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@click.argument("mountpoint", required=False, shell_complete=complete_mountpoints)
def diff(
    mountpoint: str | None, upper: str | None, lowers: tuple[str, ...], userxattr: bool, as_json: bool
) -> int:
    """Show the changes in a union's upper: A(dded), C(hanged) or D(eleted), and the path, sorted by path.

    The union is the mount at MOUNTPOINT, or the given layers. Names are printed unchanged, as bytes; on a
    terminal they are quoted for the shell if necessary, as in ls.
    """
    if mountpoint is not None:
        if upper is not None or lowers:
            raise click.UsageError("give either a mountpoint or the layers, not both")
        found = find_mount(mountpoint)
        return _of_mount(found, as_json) if found.uid is None else _of_other(found, found.uid, as_json)
    if upper is None or not lowers:
        raise click.UsageError("give a mountpoint, or --upper and at least one --lower")
    await_layers(layers_of(lowers, upper, None))
    check_directory("upper", upper)
    for lower in lowers:
        check_lower(lower)
    # As in an ordinary user's own mount.
    follows = True if os.geteuid() != 0 else None
    plain = userxattr or not may_use_trusted_xattrs()
    prefix = b"user.overlay." if plain else b"trusted.overlay."
    with interruptible():
        return print_changes(changes(upper, lowers, prefix, follows_redirects=follows), as_json)


def _of_mount(mount: LiveMount, as_json: bool) -> int:
    settings = mount.settings
    await_layers(layers_of(settings.lowers, settings.upper, None))
    with interruptible():
        return print_changes(changes_of(mount), as_json)


def _of_other(mount: LiveMount, uid: int, as_json: bool) -> int:
    """Print the changes of another user's mount, read as that user: its daemon names the layers."""
    def read() -> int:
        own = find_by_device(mount.device)
        return 1 if own is None else _of_mount(own, as_json)

    sys.stdout.flush()
    needed = ("unionfs.settings.specs",)
    if run_as(uid, read, modules=needed, environment=runtime_parent(mount.pid)) != 0:
        raise UserError(
            f"the changes of {quoted(mount.settings.mountpoint)} cannot be read as its owner (uid {uid}); "
            "run `unionfs diff` as that user."
        )
    return 0


def print_changes(found: Iterable[tuple[str, bytes]], as_json: bool) -> int:
    """Print a letter and a path for each change."""
    if as_json:
        print_json([{"change": letter, "path": os.fsdecode(name)} for letter, name in found])
        return 0
    if on_terminal():
        for letter, name in found:
            print(letter, shell_word(name))
        return 0
    out = sys.stdout.buffer
    for letter, name in found:
        out.write(letter.encode("ascii") + b" " + name + b"\n")
    out.flush()
    return 0
