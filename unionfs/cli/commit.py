"""`unionfs commit`."""

from __future__ import annotations

import os

import click

from unionfs.cli.common import print_json, root_option, tell
from unionfs.cli.completing import complete_mountpoints
from unionfs.cli.finding import find_mount
from unionfs.cli.rules import complete_images
from unionfs.daemon.differences import follows_redirects, upper_in_memory
from unionfs.errors import UserError, quoted


@click.command(epilog="Example: unionfs commit /mnt --image oci-archive:web.tar:web:2")
@click.option("--image", metavar="oci-archive:FILE[:TAG]", required=True, shell_complete=complete_images,
              help="Write an image: the mount's lowers as layers, and its changes as one more.")  # fmt: skip
@click.option("--compress", type=click.Choice(("zstd", "gzip", "none")), default="gzip", show_default=True,
              help="How new layers are compressed; old versions of docker cannot read zstd.")  # fmt: skip
@click.option("--author", metavar="TEXT", help="Who made it.")
@click.option("-m", "--message", metavar="TEXT", help="What was changed.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@root_option
@click.argument("mountpoint", shell_complete=complete_mountpoints)
def commit(
    image: str, compress: str, author: str | None, message: str | None, as_json: bool, root: str | None,
    mountpoint: str,
) -> int:
    """Write what the mount at MOUNTPOINT shows as an image, and print its id.

    A mount made by --image keeps the layers and the configuration of that image. Volumes and bind mounts are
    not part of it. Files that change meanwhile are reported. A container with another storage driver than
    union has no such mount.
    """
    # For start-up time: --help and completion do not need it.
    from unionfs.daemon.orders import give
    from unionfs.images.committing import Stack, Wish
    from unionfs.images.committing import commit as write
    from unionfs.storage.root import storage_root
    from unionfs.sys.override import override_modes
    from unionfs.union.markers import Markers
    from unionfs.union.resting import TRUSTED, USER

    mount = find_mount(mountpoint)
    settings = mount.settings
    if mount.uid is not None:
        raise UserError(
            f"{quoted(settings.mountpoint)} is a mount of uid {mount.uid}, who owns its layers; run `unionfs "
            "commit` as that user."
        )
    upper, work = settings.upper, settings.work
    if settings.upper_tmpfs is not None:
        upper = upper_in_memory(mount)
        work = f"{upper}/../work"
    # Data in the kernel's cache of the mount is not in the upper yet.
    give(mount, "sync", "written to disk", "check the disk of the upper")
    prefix = USER if settings.userxattr else TRUSTED
    wish = Wish(image, compress=compress, author=author, message=message)
    place = storage_root(root)
    if os.geteuid() != 0:
        override_modes()
    stack = Stack(
        upper, None if settings.features.index == "off" else work, settings.lowers,
        Markers(prefix, follows_redirects=follows_redirects(settings)), settings.userxattr,
    )  # fmt: skip
    done = write(stack, place, wish)
    if as_json:
        print_json({"id": done.id, "layers": done.layers, "notes": done.notes})
        return 0
    print(done.id)
    tell(*done.notes)
    return 0
