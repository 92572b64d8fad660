"""`unionfs volume exists`, `rename`, `export` and `import`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from unionfs.cli.common import root_option
from unionfs.cli.completing import complete_files
from unionfs.cli.progress import progress_option, shown_progress
from unionfs.cli.volume.archiving import COMPRESS, check_output, print_report
from unionfs.cli.volume.common import complete_volumes, open_volumes
from unionfs.errors import UserError

_F = TypeVar("_F", bound=Callable[..., Any])


def _owner_options(command: _F) -> _F:
    number = click.IntRange(0, 2**32 - 2)
    for option in (
        click.option("--gid", type=number, metavar="GID", help="The group of all entries."),
        click.option("--uid", type=number, metavar="UID", help="The owner of all entries."),
    ):
        command = option(command)
    return command


@click.command(epilog="Example: unionfs volume exists orders && echo yes")
@root_option
@click.argument("name", shell_complete=complete_volumes)
def exists(root: str | None, name: str) -> int:
    """Check whether a volume exists: exit code 0 if it does, 1 if not; prints nothing."""
    return 0 if open_volumes(root).exists(name) else 1


@click.command(epilog="Example: unionfs volume rename orders orders-old")
@root_option
@click.argument("old", shell_complete=complete_volumes)
@click.argument("new")
def rename(root: str | None, old: str, new: str) -> None:
    """Rename the volume OLD to NEW, and print NEW. A volume in use is not renamed."""
    # For start-up time: --help and completion do not need it.
    from unionfs.storage.renaming import rename as give

    print(give(open_volumes(root), old, new).name)


@click.command(
    epilog="""\b
Examples:
  unionfs volume export orders -o orders.tar
  unionfs volume export orders | ssh host unionfs volume import orders
""",
)
@click.option("-o", "--output", metavar="FILE|-", shell_complete=complete_files,
              default="-", help="The tar (default: standard output).")
@click.option("--compress", type=click.Choice(COMPRESS), help="Default: by the name of FILE, else none.")
@_owner_options
@progress_option
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@root_option
@click.argument("name", shell_complete=complete_volumes)
def export(
    output: str, compress: str | None, uid: int | None, gid: int | None, progress: str, as_json: bool,
    root: str | None, name: str,
) -> None:  # fmt: skip
    """Write the content of a volume as a plain tar, which every program reads.

    It has attributes, xattrs and ACLs, but no manifest; `backup` writes one that can be verified.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.storage.archive.compress import kind_for
    from unionfs.storage.plain import Owner
    from unionfs.storage.plain import export as write

    check_output(output, as_json=as_json)
    kind = compress or ("none" if output == "-" else kind_for(output))
    with shown_progress(f"export of {name}", progress) as shown:
        report = write(
            open_volumes(root), name, output, compress=kind, owner=Owner(uid, gid), progress=shown
        )
    print_report(report, f"exported volume {name}", as_json=as_json, volume=name, archive=output)
    if output != "-" and not as_json:
        print(output)


@click.command(
    name="import",
    epilog="""\b
Examples:
  unionfs volume import orders orders.tar.gz
  docker export web | unionfs volume import web-root
  unionfs volume import --uid 1000 --gid 1000 home files.tar
""",
)
@_owner_options
@progress_option
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@root_option
@click.argument("name", shell_complete=complete_volumes)
@click.argument("source", metavar="FILE|-", shell_complete=complete_files, default="-")
def import_(
    uid: int | None, gid: int | None, progress: str, as_json: bool, root: str | None, name: str, source: str
) -> None:
    """Replace the content of a volume with that of a plain tar, compressed or not.

    The tar is not trusted: entries outside the volume are refused. After an error the volume is unchanged. A
    volume in use is not changed.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.storage.plain import Owner
    from unionfs.storage.plain import import_ as put

    volumes = open_volumes(root)
    volumes.get(name)
    if source == "-" and sys.stdin.isatty():
        raise UserError(
            "refusing to read an archive from a terminal; redirect standard input, or name a file."
        )
    with shown_progress(f"import of {name}", progress) as shown:
        report = put(volumes, name, source, owner=Owner(uid, gid), progress=shown)
    print_report(report, f"imported volume {name}", as_json=as_json, volume=name, archive=source)
    if not as_json:
        print(name)
