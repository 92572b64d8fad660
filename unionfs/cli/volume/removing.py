"""`unionfs volume rm` and `prune`."""

from __future__ import annotations

from functools import partial

import click

from unionfs.cli.common import complain, confirm, for_each, print_json, root_option
from unionfs.cli.volume.common import complete_volumes, open_volumes
from unionfs.errors import UserError
from unionfs.settings.sizes import shown_size
from unionfs.storage.filters import matches, parse_filters, truth


@click.command(epilog="Example: unionfs volume rm orders carts")
@click.option("-f", "--force", is_flag=True, help="Remove it even if its driver fails; ignore a missing one.")
@root_option
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_volumes)
def rm(force: bool, root: str | None, names: tuple[str, ...]) -> int:
    """Remove volumes with their content, and print their names.

    A volume in use is never removed, not even with --force. Content elsewhere (a bind, an NFS export, a
    plugin's storage if the plugin keeps it) stays there. --force also removes a volume whose driver is
    missing or fails; the driver's error is reported.
    """
    return for_each(names, partial(open_volumes(root).remove, force=force))


@click.command(
    epilog="Example: unionfs volume prune -a --filter label!=keep --dry-run",
)
@click.option("-a", "--all", "every", is_flag=True, help="Also remove named volumes.")
@click.option(
    "--filter", "filters", multiple=True, metavar="KEY=VALUE",
    help="label, label!, name, driver, until, or all=true (as -a); may be repeated, and all must hold.",
)  # fmt: skip
@click.option("-f", "--force", is_flag=True, help="Don't ask.")
@click.option("--dry-run", is_flag=True, help="Only print what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@root_option
def prune(
    every: bool, filters: tuple[str, ...], force: bool, dry_run: bool, as_json: bool, root: str | None
) -> int:
    """Remove unused anonymous volumes, and print the space freed.

    With -a unused named volumes are removed, too: their data is lost.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.storage.usage import reclaimable

    rest = []
    for word in filters:
        if word.startswith("all="):
            every = truth(word[4:], "all") or every
        else:
            rest.append(word)
    wanted = parse_filters(rest)
    volumes = open_volumes(root)
    users = volumes.all_users()
    found = [
        volume
        for volume in volumes.all()
        if volume.name not in users and (every or volume.anonymous) and matches(volume, wanted, used=False)
    ]
    if not (force or dry_run):
        kind = "all volumes" if every else "anonymous volumes"
        confirm(f"This will remove {kind} not used by at least one mount.")
    volumes.settle()
    gone, freed, code = [], 0, 0
    for volume in found:
        size = reclaimable(volume)
        try:
            if dry_run or volumes.remove(volume.name, missing_ok=True):
                gone.append(volume.name)
                freed += size
        except UserError as error:
            code = complain("unionfs", str(error))
    if as_json:
        print_json({"dry_run": dry_run, "removed": gone, "reclaimed": freed})
        return code
    if gone:
        print("Would delete:" if dry_run else "Deleted Volumes:")
        for name in gone:
            print(name)
        print()
    print(f"{'Reclaimable' if dry_run else 'Total reclaimed'} space: {shown_size(freed)}")
    return code
