"""`unionfs branch`: named branches of a directory."""

from __future__ import annotations

import click

from unionfs.cli.lazy import LazyGroup

_COMMANDS = {
    "create": ("unionfs.cli.branch.making:create", "Create a branch, and mount it."),
    "mount": ("unionfs.cli.branch.making:mount", "Mount a branch again."),
    "ls": ("unionfs.cli.branch.listing:ls", "List branches."),
    "diff": ("unionfs.cli.branch.differences:diff", "Show what a branch changes."),
    "shell": ("unionfs.cli.branch.trying:shell", "Run a shell on a branch."),
    "commit": ("unionfs.cli.branch.committing:commit", "Apply a branch to what lies below it."),
    "undo": ("unionfs.cli.branch.committing:undo", "Undo the last commit."),
    "discard": ("unionfs.cli.branch.making:discard", "Remove branches with their changes."),
    "rename": ("unionfs.cli.branch.making:rename", "Give a branch another name."),
    "rm": ("unionfs.cli.branch.making:rm", "Remove branches without changes."),
}


@click.command(
    cls=LazyGroup,
    places=_COMMANDS,
    epilog="Example: unionfs branch create --base /srv/site fix",
)
def branch() -> None:
    """Manage branches: named copy-on-write views of a directory, to be committed or discarded.

    Root's branches are in /var/lib/unionfs, a user's in $XDG_DATA_HOME/unionfs (~/.local/share/unionfs);
    --root or UNIONFS_ROOT names another directory. It may be in the base, which then hides it.
    """
