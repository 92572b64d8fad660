"""`unionfs volume create` and `resize`."""

from __future__ import annotations

import click

from unionfs.cli.common import root_option
from unionfs.cli.volume.common import complete_drivers, complete_volumes, open_volumes, pairs


@click.command(
    epilog="""\b
Examples:
  unionfs volume create orders
  unionfs volume create -o size=2g -o fs=xfs --label app=shop orders
  unionfs volume create -o type=nfs -o o=addr=10.0.0.5 -o device=:/srv media
  unionfs volume create -d union -o lower=/srv/base -o shared=true site
  unionfs volume create -d sshfs -o sshcmd=backup@host:/srv/data far
""",
)
@click.option(
    "-d",
    "--driver",
    metavar="DRIVER",
    shell_complete=complete_drivers,
    help="The volume's driver (default: local).",
)
@click.option("-o", "--opt", "options", multiple=True, metavar="KEY=VALUE", help="An option of the driver.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label.")
@root_option
@click.argument("name", required=False)
def create(
    driver: str | None, options: tuple[str, ...], labels: tuple[str, ...], root: str | None, name: str | None
) -> None:
    """Create a volume and print its name; without NAME an anonymous one of 64 hexadecimal digits.

    An existing volume with the same driver and options is left unchanged.

    \b
    Drivers and their options (-o):
      local      a directory of this host
                 size=2g, fs=ext4|xfs    the maximum size
                 type=, device=, o=      what mount(8) mounts, as with docker
                 tmpfs, size=            in memory, at most that size
      union      lower=A:B, shared       a union of these; one view per user, or
                                         one for all
      sshfs      sshcmd=USER@HOST:PATH, port=, IdentityFile=, o=
      rclone     remote=NAME:PATH, config=FILE, vfs-cache-mode=, o=
      glusterfs  servers=A,B, volname=, subdir=, o=

    Any other name is a docker volume plugin, or a driver of an installed Python package.
    """
    made = open_volumes(root).create(
        name,
        driver=driver,
        options=pairs(options, "option"),
        labels=pairs(labels, "label"),
    )
    print(made.name)


@click.command(epilog="Example: unionfs volume resize orders 4g")
@root_option
@click.argument("name", shell_complete=complete_volumes)
@click.argument("size")
def resize(root: str | None, name: str, size: str) -> None:
    """Change the size of NAME, a volume created with -o size=, to SIZE, such as 500m or 4g.

    A volume can grow while in use (an ext4 only with CAP_SYS_RESOURCE); only an unused ext4 can shrink.
    """
    print(open_volumes(root).resize(name, size).name)
