"""`unionfs diff`."""

from __future__ import annotations

import sys

import click


@click.command(
    short_help="Show what a union's upper changes.",
    epilog="""\b
Examples:
  unionfs diff /mnt
  unionfs diff --upper /srv/changes --lower /srv/base
""",
)
@click.option("-u", "--upper", metavar="DIR", help="An upper that need not be mounted.")
@click.option(
    "-l", "--lower", "lowers", multiple=True, metavar="DIR", help="A lower of it; the first one is on top."
)
@click.option("--userxattr", is_flag=True, help="Markers are user.overlay.* xattrs (without root: always).")
@click.argument("mountpoint", required=False)
def diff(mountpoint: str | None, upper: str | None, lowers: tuple[str, ...], userxattr: bool) -> None:
    """Show what a union's upper changes: A(dded), C(hanged) or D(eleted), and the path, sorted by path.

    Either of the live mount at MOUNTPOINT, or of the layers that are given. Names are printed as they are,
    byte by byte.
    """
    if mountpoint is not None:
        if upper is not None or lowers:
            raise click.UsageError("give either a mountpoint or the layers, not both")
        from unionfs.cli.mounts import find_mount

        found = find_mount(mountpoint)
        settings = found.settings
        upper, lowers, userxattr = settings.upper, settings.lowers, settings.userxattr
        if settings.upper_tmpfs is not None:
            from unionfs.cli.mounts import upper_in_memory

            upper = upper_in_memory(found)
        if upper is None:
            return
    elif upper is None or not lowers:
        raise click.UsageError("give a mountpoint, or --upper and at least one --lower")
    else:
        from unionfs.daemon.preflight import check_directory
        from unionfs.sys.capabilities import may_use_trusted_xattrs

        for kind, path in (("upper", upper), *(("lower", lower) for lower in lowers)):
            check_directory(kind, path)
        userxattr = userxattr or not may_use_trusted_xattrs()
    from unionfs.union.diff import diff as changes

    out = sys.stdout.buffer
    for letter, name in changes(upper, lowers, b"user.overlay." if userxattr else b"trusted.overlay."):
        out.write(letter.encode("ascii") + b" " + name + b"\n")
    out.flush()
