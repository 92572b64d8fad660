"""`unionfs volume backup`, `restore`, `clone` and `verify`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from unionfs.cli.common import complain, on_terminal, print_json, root_option, tell
from unionfs.cli.completing import complete_files
from unionfs.cli.progress import progress_option, shown_progress
from unionfs.cli.volume.common import complete_volumes, open_volumes
from unionfs.errors import UserError
from unionfs.settings.names import is_name
from unionfs.settings.sizes import shown_size
from unionfs.settings.words import printable

if TYPE_CHECKING:
    from unionfs.storage.backup import Report

COMPRESS = ("zstd", "gzip", "none")


def check_output(output: str, *, as_json: bool) -> None:
    """Refuse to write an archive to a standard output that cannot take it. Raises UserError."""
    if output != "-":
        return
    if sys.stdout.isatty():
        raise UserError(
            "refusing to write an archive to a terminal; redirect standard output, or name a file with -o."
        )
    if as_json:
        raise UserError("--json and the archive would share standard output; name a file with -o.")
    if sys.__stdout__ is None:
        # It was replaced by /dev/null, where an archive would be lost silently.
        raise UserError("standard output is closed; redirect it, or name a file with -o.")


def print_report(
    report: Report, what: str, *, as_json: bool, to: Callable[[str], None] = tell, **facts: str
) -> None:
    """Print what was done as JSON with more facts, or the notes and a summary, as sentences to `to`."""
    if as_json:
        print_json({
            **facts, "entries": report.entries, "size": report.size, "how": report.how,
            "notes": report.notes, "more_notes": report.more_notes,
        })  # fmt: skip
        return
    for sentence in report.notes:
        to(sentence)
    if report.more_notes:
        to(f"{report.more_notes} more entries were skipped or changed likewise.")
    how = f"; {report.how}" if report.how else ""
    entries = "1 entry" if report.entries == 1 else f"{report.entries} entries"
    to(f"{what}: {entries}, {shown_size(report.size)}{how}.")


_json_option = click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")


@click.command(
    epilog="""\b
Examples:
  unionfs volume backup orders -o /backups/orders.tar.zst
  unionfs volume backup orders -o mon.tar.zst --since sun.tar.zst
  unionfs volume backup orders -o - | ssh host 'cat > orders.tar.zst'
""",
)
@click.option("-o", "--output", metavar="FILE|-", shell_complete=complete_files,
              help="The archive; default NAME-TIME.tar.zst here.")
@click.option(
    "--compress", type=click.Choice(COMPRESS), help="Default: by the name of FILE, else zstd."
)
@click.option(
    "--since", metavar="BACKUP", help="Write only what has changed since that backup."
)
@progress_option
@_json_option
@root_option
@click.argument("name", shell_complete=complete_volumes)
def backup(
    output: str | None, compress: str | None, since: str | None, progress: str, as_json: bool,
    root: str | None, name: str,
) -> None:  # fmt: skip
    """Write the content of a volume to an archive, and print the archive's name.

    The volume may be in use. A volume on its own filesystem (-o size=) is frozen during the backup; elsewhere
    large files are cloned if the filesystem supports it (xfs, btrfs), and files that change while they are
    read are read again. Back up databases, which write several files at once, with their own programs.

    The archive is a pax tar with a manifest (xxh3-128) as its last member: `tar tf` lists it, `tar xf
    --xattrs --acls` unpacks it. It gets its name when it is complete. Restoring an incremental one (--since)
    needs that backup and those below it.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.storage.archive.compress import ENDINGS, kind_for
    from unionfs.storage.backup import backup as make

    volumes = open_volumes(root)
    volumes.get(name)
    if output is None:
        kind = compress or "zstd"
        output = f"{name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}{ENDINGS[kind]}"
    else:
        kind = compress or ("zstd" if output == "-" else kind_for(output))
    check_output(output, as_json=as_json)
    with shown_progress(f"backup of {name}", progress) as shown:
        report = make(volumes, name, output, compress=kind, since=since, progress=shown)
    print_report(report, f"backed up volume {name}", as_json=as_json, volume=name, archive=output)
    if output != "-" and not as_json:
        print(output)


@click.command(
    epilog="""\b
Examples:
  unionfs volume restore orders -i /backups/orders.tar.zst
  ssh host 'cat orders.tar.gz' | unionfs volume restore orders
  unionfs volume restore --create orders -i /backups/orders.tar.zst
  unionfs volume restore orders -i mon.tar.zst --base sun.tar.zst
""",
)
@click.option("-i", "--input", "source", metavar="FILE|-", shell_complete=complete_files,
              default="-", help="The archive (default: stdin).")
@click.option(
    "--base", "bases", multiple=True, metavar="FILE", shell_complete=complete_files,
    help="The base of an incremental archive, if it is not beside it.",
)  # fmt: skip
@click.option("--verify-only", is_flag=True, help="Only check the archive; change nothing.")
@click.option(
    "--create", is_flag=True,
    help="Create the volume if it is missing, with the driver and options in the archive."
)
@progress_option
@_json_option
@root_option
@click.argument("name", shell_complete=complete_volumes)
def restore(
    source: str, bases: tuple[str, ...], verify_only: bool, create: bool, progress: str, as_json: bool,
    root: str | None, name: str,
) -> None:  # fmt: skip
    """Replace the content of a volume with that of an archive.

    Everything is checked while it is read, and the old content stays until the new is complete: after an
    error the volume is unchanged. A volume in use is not restored. Archives with entries outside the volume
    are refused, as are those with device files without root.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.storage.restore import restore as put
    from unionfs.storage.restore import verify_chain

    volumes = open_volumes(root)
    if not create:
        volumes.get(name)
    if source == "-" and sys.stdin.isatty():
        raise UserError(
            "refusing to read an archive from a terminal; redirect standard input, or name a file with -i."
        )
    if verify_only:
        with shown_progress("verification", progress) as shown:
            report = verify_chain(source, bases, shown)
        what = "the archive is complete and matches its manifest"
        print_report(report, what, as_json=as_json, archive=source)
        return
    with shown_progress(f"restore of {name}", progress) as shown:
        report = put(volumes, name, source, bases=bases, create=create, progress=shown)
    print_report(report, f"restored volume {name}", as_json=as_json, volume=name, archive=source)
    if not as_json:
        print(name)


@click.command(epilog="Example: unionfs volume clone orders orders-test")
@progress_option
@_json_option
@root_option
@click.argument("source", metavar="SRC", shell_complete=complete_volumes)
@click.argument("target", metavar="DST")
def clone(progress: str, as_json: bool, root: str | None, source: str, target: str) -> None:
    """Create the volume DST with the driver, options, labels and content of SRC.

    If the filesystem supports reflinks (xfs, btrfs), both share their blocks until one of them is changed.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.storage.restore import clone as copy

    with shown_progress(f"clone of {source}", progress) as shown:
        report = copy(open_volumes(root), source, target, progress=shown)
    print_report(report, f"cloned volume {source}", as_json=as_json, volume=target, source=source)
    if not as_json:
        print(target)


@click.command(
    epilog="""\b
Examples:
  unionfs volume verify orders
  unionfs volume verify /backups/orders.tar.zst
""",
)
@progress_option
@_json_option
@root_option
@click.argument("what", metavar="NAME|FILE", shell_complete=complete_volumes)
def verify(progress: str, as_json: bool, root: str | None, what: str) -> int:
    """Check an archive against its manifest, or a volume against that of its last backup or restore.

    Files of a volume that were changed, added or removed since are listed, and are not errors. A file whose
    content differs while its size and time are the same is damaged: exit code 1. A name of both a volume and
    a file means the volume; write ./FILE for the file.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.storage.backup import verify_archive, verify_volume

    volumes = open_volumes(root)
    known = is_name(what) and any(volume.name == what for volume in volumes.all())
    if not known and ("/" in what or os.path.exists(what)):
        with shown_progress("verification", progress) as shown:
            report = verify_archive(what, shown)
        sentence = f"{what} is complete and matches its manifest"
        print_report(report, sentence, as_json=as_json, to=print, archive=what)
        return 0
    with shown_progress(f"verification of {what}", progress) as shown:
        found = verify_volume(volumes, what, shown)
    if as_json:
        print_json({"volume": what, **asdict(found)})
        return 1 if found.damaged else 0
    lists = ("changed", found.changed), ("missing", found.missing), ("added", found.added)
    for heading, paths in (*lists, ("damaged", found.damaged)):
        for path in paths:
            print(heading, printable(path) if on_terminal() else path)
    if found.damaged:
        return complain(
            "unionfs",
            f"volume {what} is damaged: the content of {len(found.damaged)} files differs from its last "
            "backup, though they were not written to; restore a backup, and check the disk.",
        )
    same = not (found.changed or found.missing or found.added)
    print(f"{what}: {found.entries} entries, " + ("as in its last backup." if same else "none damaged."))
    return 0
