"""`unionfs convert`."""

from __future__ import annotations

import os

import click

from unionfs.cli.common import print_table
from unionfs.cli.completing import complete_directories
from unionfs.daemon.preflight import check_directory, check_unused
from unionfs.daemon.settle import absolute
from unionfs.daemon.silent import await_layers, interruptible
from unionfs.sys.capabilities import may_use_trusted_xattrs
from unionfs.sys.override import override_modes


@click.command(epilog="Example: unionfs convert --upper /srv/changes --to oci")
@click.option("-u", "--upper", metavar="DIR", shell_complete=complete_directories,
              required=True, help="The upper; it must not be mounted.")
@click.option(
    "--to", "form", type=click.Choice(("overlay", "fuse-overlayfs", "oci")), required=True,
    help="The form to rewrite to.",
)  # fmt: skip
@click.option(
    "--userxattr", is_flag=True, help="overlayfs's markers are user.overlay.* xattrs (always without root)."
)
def convert(upper: str, form: str, userxattr: bool) -> None:
    """Rewrite whiteouts, opaque directories and the prefix of xattrs in an upper, in place.

    \b
    Forms:
      overlay         kernel overlayfs's: devices 0/0, and xattrs
                      trusted.overlay.* (--userxattr: user.overlay.*)
      fuse-overlayfs  .wh.NAME, .wh..wh..opq, and user.fuseoverlayfs.opaque
      oci             .wh.NAME and .wh..wh..opq, as in an image layer

    What a form cannot express (renamed directories, files whose data is in a lower) is refused before
    anything changes. After a crash, run it again: a half converted upper is mounted correctly, too.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.union.convert import convert as rewrite
    from unionfs.union.resting import resting

    await_layers([("upper", upper)])
    check_directory("upper", upper, os.R_OK | os.W_OK | os.X_OK)
    upper = absolute(upper)
    check_unused(upper)
    userxattr = userxattr or not may_use_trusted_xattrs()
    override_modes()
    with interruptible(), resting(upper, userxattr=userxattr, writable=True) as layers:
        done = rewrite(layers, form)
    print_table(
        ("WHITEOUTS", "OPAQUE", "XATTRS"), [(str(done.whiteouts), str(done.opaque), str(done.xattrs))]
    )
