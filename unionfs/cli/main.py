"""The command `unionfs`. Imports each subcommand's module only when it is called, to start fast."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from unionfs import __version__
from unionfs.cli.common import leave, run
from unionfs.cli.lazy import LazyGroup

# Name: module and object, help line; in the order of the help.
_COMMANDS = {
    "mount": ("unionfs.cli.mount:mount", "Mount a union."),
    "umount": ("unionfs.cli.umount:umount", "Unmount, and wait until all data is on disk."),
    "cleanup": ("unionfs.cli.cleanup:cleanup", "Unmount what killed daemons left."),
    "sync": ("unionfs.cli.orders:sync", "Write all data of a mount to disk."),
    "refresh": ("unionfs.cli.orders:refresh", "Make changes to a mount's lowers visible."),
    "upgrade": ("unionfs.cli.upgrade:upgrade", "Replace daemons by the installed version."),
    "snapshot": ("unionfs.cli.snapshot:snapshot", "Take and restore snapshots of a mount."),
    "ls": ("unionfs.cli.mounts:ls", "List active mounts."),
    "inspect": ("unionfs.cli.mounts:inspect", "Show a mount's settings and figures."),
    "stats": ("unionfs.cli.stats:stats", "Show a mount's activity: requests, latency, bytes."),
    "top": ("unionfs.cli.top:top", "Show the activity of all mounts."),
    "web": ("unionfs.cli.web:web", "Show mounts, volumes and containers in a browser."),
    "diff": ("unionfs.cli.diff:diff", "Show what a union's upper changes."),
    "check": ("unionfs.cli.check:check", "Examine an upper that is not mounted."),
    "convert": ("unionfs.cli.convert:convert", "Rewrite an upper's markers for other programs."),
    "run": ("unionfs.cli.run:run", "Run a command in a union."),
    "exec": ("unionfs.cli.execute:execute", "Run a command in a running container."),
    "ps": ("unionfs.cli.container:ps", "List containers."),
    "logs": ("unionfs.cli.container:logs", "Show the output of a detached container."),
    "stop": ("unionfs.cli.container:stop", "Stop containers."),
    "kill": ("unionfs.cli.container:kill", "Send a signal to containers."),
    "rm": ("unionfs.cli.container:rm", "Remove containers."),
    "container": ("unionfs.cli.container:container", "Manage containers."),
    "try": ("unionfs.cli.branch.trying:try_", "Run a command on a branch of a directory, and decide then."),
    "branch": ("unionfs.cli.branch:branch", "Manage branches: diff, commit, undo, discard."),
    "image": ("unionfs.cli.image:image", "Manage unpacked images."),
    "layer": ("unionfs.cli.layer:layer", "Convert uppers to and from layers of images."),
    "commit": ("unionfs.cli.commit:commit", "Write a mount as an image."),
    "volume": ("unionfs.cli.volume:volume", "Manage named volumes."),
    "system": ("unionfs.cli.system:system", "Show what the storage root holds."),
    "plugin": ("unionfs.cli.plugin:plugin", "Let docker and podman use the volumes."),
    "info": ("unionfs.cli.system:info", "Show versions, the storage root and counts."),
    "config": ("unionfs.cli.config:config", "Show the configuration."),
    "doctor": ("unionfs.cli.doctor:doctor", "Report what this host supports and lacks."),
    "completion": ("unionfs.cli.completion:completion", "Print the completion script for a shell."),
}


@click.command(
    cls=LazyGroup,
    places=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="Example: unionfs mount -l /usr -u /tmp/changes -w /tmp/work /mnt",
)
@click.version_option(__version__, "-V", "--version", prog_name="unionfs", message="%(prog)s %(version)s")
def cli() -> None:
    """Stack read-only directories under a writable one, and show them as one tree.

    A union's lowers are never written; all changes go to its upper, in kernel overlayfs's on-disk format.
    `mount -t fuse.unionfs` runs this command, too.
    """


def is_mount_helper_call(arguments: Sequence[str], program: str) -> bool:
    """Return whether mount(8) calls, as mount.TYPE or through mount.fuse(8): SOURCE MOUNTPOINT -o OPTIONS."""
    if os.path.basename(program).startswith("mount."):
        return True
    if len(arguments) < 3 or arguments[0].startswith("-") or arguments[0] == "mount":
        return False
    if arguments[0] in ("volume", "layer", "try", "branch", "exec") and not arguments[1].startswith("/"):
        return False  # they or what they run take -o; mount(8) passes absolute mountpoints
    if arguments[0] == "try" and not (len(arguments) == 4 and os.path.isdir(arguments[1])):
        return False  # the command that it runs takes -o
    # No other subcommand takes -o, so a SOURCE may have a subcommand's name.
    return not arguments[1].startswith("-") and any(word.startswith("-o") for word in arguments[2:])


def run_here(arguments: Sequence[str], program: str) -> int:
    """Run `unionfs` in this process; `program` is the name it is called by. Returns the exit code."""
    if is_mount_helper_call(arguments, program):
        # For start-up time: only mount(8) needs it.
        from unionfs.cli.fuse_unionfs import mount_helper

        return mount_helper(arguments, "unionfs")
    return run(cli, arguments, "unionfs")


def main() -> None:
    """`unionfs` without the launcher."""
    leave(run_here(sys.argv[1:], sys.argv[0]))
