"""`unionfs layer`: uppers as layers of OCI images, and back."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from unionfs.cli.common import print_json, root_option, tell
from unionfs.cli.completing import complete_directories, complete_files
from unionfs.cli.lazy import LazyGroup
from unionfs.cli.progress import progress_option, shown_progress
from unionfs.cli.rules import rules_options
from unionfs.errors import on_failure, quoted

if TYPE_CHECKING:
    from unionfs.images.blobs import Written
    from unionfs.images.rules import Rules

_COMMANDS = {
    "export": ("unionfs.cli.layer:export", "Write an upper as a layer."),
    "import": ("unionfs.cli.layer:import_", "Unpack a layer into a directory."),
    "squash": ("unionfs.cli.layer:squash", "Make one layer of several."),
}
_OUTPUT = click.option(
    "-o", "--output", metavar="FILE", shell_complete=complete_files, required=True,
    help="The layer: a tar, compressed by gzip (.gz, .tgz) or zstd (.zst).",
)  # fmt: skip
_JSON = click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
_USERXATTR = click.option(
    "--userxattr", is_flag=True, help="Markers are user.overlay.* xattrs (always without root)."
)


@click.command(
    cls=LazyGroup,
    places=_COMMANDS,
    epilog="Example: unionfs layer export --upper /srv/changes -o layer.tar.gz",
)
def layer() -> None:
    """Convert uppers to layers of OCI images, and back.

    A layer is a tar in which `.wh.NAME` says that NAME is removed, and `.wh..wh..opq` that a directory hides
    those of the layers below. `export` and `squash` print the digests by which images name it.
    """


@click.command(epilog="Example: unionfs layer export -u /srv/changes -l /srv/base -o layer.tar.zst")
@click.option("-u", "--upper", metavar="DIR", shell_complete=complete_directories,
              required=True, help="The upper; it must not be mounted.")
@click.option(
    "-l", "--lower", "lowers", multiple=True, metavar="DIR|IMAGE", shell_complete=complete_files,
    help="A lower; the first is on top."
)
@click.option("-w", "--work", metavar="DIR", shell_complete=complete_directories,
              help="Its work directory, for changed hard links of lowers.")
@_OUTPUT
@_USERXATTR
@_JSON
def export(
    upper: str, lowers: tuple[str, ...], work: str | None, output: str, userxattr: bool, as_json: bool
) -> int:
    """Write an upper as a layer, and print the digest of the file and its diff id.

    The same upper is always exported as the same bytes. Renamed directories, and files whose data or other
    names are in a lower, are written completely; that needs the lowers, and for hard links the work
    directory, which has their index.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.daemon.preflight import check_directory, check_lower, check_unused
    from unionfs.daemon.settle import absolute
    from unionfs.images.layers import export_layer
    from unionfs.sys.capabilities import may_use_trusted_xattrs
    from unionfs.sys.override import override_modes

    check_directory("upper", upper)
    for lower in lowers:
        check_lower(lower)
    if work is not None:
        check_directory("work", work)
        work = absolute(work)
    upper = absolute(upper)
    check_unused(upper)
    userxattr = userxattr or not may_use_trusted_xattrs()
    output = os.path.abspath(output)
    override_modes()
    below = [absolute(path) for path in lowers]
    _print(export_layer(upper, below, output, work=work, userxattr=userxattr), [], as_json=as_json)
    return 0


def _print(written: Written, notes: list[str], *, as_json: bool) -> None:
    notes = [*notes, *written.packed.notes]
    if as_json:
        packed = written.packed
        print_json({
            "digest": written.digest, "diff_id": written.diff_id, "blob_size": written.size,
            "entries": packed.entries, "size": packed.size, "whiteouts": packed.whiteouts, "notes": notes,
        })  # fmt: skip
        return
    print(f"digest   {written.digest}\ndiff id  {written.diff_id}")
    tell(*notes)


@click.command(name="import", epilog="Example: unionfs layer import layer.tar.gz /srv/layer")
@rules_options
@_USERXATTR
@progress_option
@_JSON
@click.argument("file", metavar="LAYER", shell_complete=complete_files)
@click.argument("directory", metavar="DIR", shell_complete=complete_directories)
def import_(
    rules: Rules, userxattr: bool, progress: str, as_json: bool, file: str, directory: str
) -> int:
    """Unpack a layer into DIR as an upper or lower in kernel overlayfs's format, and print its diff id.

    DIR must be missing or empty; it gets its content when the whole layer is there.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.images.layers import import_layer
    from unionfs.sys.capabilities import may_use_trusted_xattrs

    userxattr = userxattr or not may_use_trusted_xattrs()
    with shown_progress(f"import of {file}", progress) as shown:
        contents, diff_id = import_layer(file, directory, userxattr=userxattr, rules=rules, progress=shown)
    if as_json:
        facts = asdict(contents)
        del facts["opaque"], facts["root_opaque"]
        print_json({"diff_id": diff_id, **facts})
        return 0
    print(f"diff id  {diff_id}")
    tell(*contents.notes)
    return 0


@click.command(epilog="Example: unionfs layer squash base.tar.gz changes.tar.gz -o both.tar.gz")
@rules_options
@_OUTPUT
@progress_option
@_JSON
@root_option
@click.argument("files", metavar="LAYER...", shell_complete=complete_files, nargs=-1, required=True)
def squash(
    rules: Rules, output: str, progress: str, as_json: bool, root: str | None, files: tuple[str, ...]
) -> int:
    """Make one layer of several, the lowest first, and print the digest of the file and its diff id.

    It shows the same tree over any layers below. What it hides of those stays hidden.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.images.layers import squash_layers
    from unionfs.storage.root import storage_root

    with (
        on_failure(f"{quoted(output)} cannot be written", "free space"),
        shown_progress("unpacking", progress) as shown,
    ):
        written, notes = squash_layers(files, output, storage_root(root), rules, shown)
    _print(written, notes, as_json=as_json)
    return 0
