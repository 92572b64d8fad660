"""`unionfs mount`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from unionfs.cli.common import tell
from unionfs.cli.completing import complete_directories, complete_files, complete_mount_options
from unionfs.cli.progress import progress_of, progress_option, shown_progress
from unionfs.cli.rules import complete_images
from unionfs.cli.storage_options import HELP, storage_options
from unionfs.settings.mount import IO_MODES, LOG_LEVELS, SESSIONS

if TYPE_CHECKING:
    from unionfs.settings.specs import Spec


_HELP = """\
    Mount a union at MOUNTPOINT, and return when it is usable.

    \b
    Options for -o:
      lowerdir=A:B:C   the lowers, leftmost on top (write \\: and \\, for : and ,
                       in names)
      upperdir=, workdir=
      ro               read-only, even with an upper
      volatile         never sync to disk: for disposable trees; after a crash
                       the upper is refused
      userxattr        markers in user.overlay.* xattrs (always without root)
      allow_other      access by all users (root: always); allow_root: by root
      nodev nosuid noexec sync dirsync
      noatime nodiratime strictatime      of the upper's files
      fsname=, subtype=                   what /proc/mounts shows
      session=, io=, watch_lower          as --session and so on, for fstab
      volume=, tmpfs=  storage, for fstab; may be repeated; with colons for
                       commas: volume=db:/db:ro:nocopy, tmpfs=/run:size=9m
      index=on|off     whether hard links of lowers outlive changes; default:
                       on if the upper is new or was always used with it, and
                       the filesystems have file handles and different uuids
      xino=auto|on|off off: the inode numbers of the files' own filesystems,
                       unique only within each
      context=, fscontext=, defcontext=, rootcontext=    SELinux contexts
      uidmapping=, gidmapping=STORED:SHOWN:COUNT[:...]   map ids by ranges
      squash_to_uid=, squash_to_gid=, squash_to_root     one owner for all
      xattr_permissions=2|1   owners and modes in user.* or security.* xattrs,
                              as podman's force_mask
      outlive          start another daemon when this one dies: programs
                       and open files go on (docs/reliability.md)
      cpu_idle         let CPUs idle between frequent requests (root's daemon
                       keeps them awake)
      max_nodes=N      ask the kernel to forget files that nobody uses when it
                       knows more than N (Linux 6.18): each takes 261 bytes of
                       the daemon's memory
      static_nlink     one link for every directory
      noacl            no POSIX ACLs
    \b
    I/O modes (--io), with --session direct:
      hybrid       upper files, and programs and libraries, kernel to kernel;
                   other lower files from the page cache: the best for most;
                   without an upper, all large files kernel to kernel
      passthrough  all files kernel to kernel: for huge files read once, and
                   data shared by many mounts; a process with a lower file
                   open keeps the old data when another opens it for writing
      cached       all files from the page cache, and no request for an open:
                   for many small files

    The kernel's redirect_dir= (on for most uppers), metacopy= (as its default), nfs_export= and uuid=, and
    options for fstab and of fuse-overlayfs, are accepted with values that need no missing feature.

    An upper in memory: -u tmpfs[:size=64m,nr_inodes=,mode=,uid=,gid=,swap] puts upper and work on a tmpfs
    without a path, which is discarded at unmount. Write ./tmpfs for a directory of that name.

    {storage}
    """


@click.command(
    help=_HELP.replace("{storage}", HELP),
    epilog="""\b
Examples:
  unionfs mount -l /srv/base -u /srv/changes -w /srv/work /mnt
  unionfs mount -l top -l middle -l bottom /mnt        (read-only)
  unionfs mount -o lowerdir=top:bottom,upperdir=up,workdir=work,nodev /mnt
  unionfs mount --image oci-archive:debian.tar -u tmpfs /mnt
  unionfs mount -l base -u tmpfs:size=64m -v ./site:/srv:ro -v db:/db /mnt
""",
)
@click.option(
    "-l", "--lower", "lowers", multiple=True, metavar="DIR|IMAGE", shell_complete=complete_files,
    help="A read-only layer; the first is on top. As root also an image file (squashfs, erofs, ext4, xfs).",
)  # fmt: skip
@click.option(
    "--image", metavar="IMAGE", shell_complete=complete_images,
    help="The layers of an image as lowers, below those of -l: oci-archive:FILE, docker-archive:FILE, "
         "oci:DIR, or one of `unionfs image ls`.",
)  # fmt: skip
@click.option(
    "-u",
    "--upper",
    metavar="DIR|tmpfs[:OPT,...]", shell_complete=complete_directories,
    help="Where changes go: a directory, or memory. Without it the union is read-only.",
)
@click.option(
    "-w", "--work", metavar="DIR", shell_complete=complete_directories,
    help="An empty directory on the upper's filesystem; required with --upper."
)
@click.option(
    "-o", "options", multiple=True, metavar="OPT,...", shell_complete=complete_mount_options,
    help="Mount options, see above; may be repeated.",
)
@storage_options
@click.option(
    "--watch-lower", is_flag=True,
    help="Show what others change in the lowers while they are mounted, within 100 ms.",
)  # fmt: skip
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground; log to stderr.")
@click.option(
    "--session",
    type=click.Choice(SESSIONS),
    help="The FUSE implementation: unionfs's own loop (direct), or libfuse.  [default: auto]",
)
@click.option(
    "--io",
    type=click.Choice(IO_MODES),
    help="The I/O mode, see above; auto: hybrid as root on Linux 6.9 and later, else cached.  "
         "[default: auto]",
)
@click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS, case_sensitive=False),
    help="The log level. The log goes to syslog, else to /run/unionfs/unionfs.log (of users: "
         "$XDG_RUNTIME_DIR/unionfs/unionfs.log); `unionfs inspect` shows the place.  [default: info]",
)
@progress_option
@click.argument("mountpoint", shell_complete=complete_directories)
def mount(
    lowers: tuple[str, ...],
    image: str | None,
    options: tuple[str, ...],
    storage: tuple[Spec, ...],
    root: str | None,
    foreground: bool,
    log_level: str | None,
    progress: str,
    mountpoint: str,
    **chosen: Any,
) -> int:
    """Mount a union."""
    # For start-up time: --help and completion do not need it.
    from unionfs.daemon.caller import CALLER
    from unionfs.daemon.process import mount as start
    from unionfs.daemon.settle import settle

    if storage:
        CALLER.watches(progress_of(progress))
    with layers_of(image, root, options, progress) as more:
        settings = settle(
            mountpoint, lowers=[*lowers, *more], options=options, log_level=log_level and log_level.lower(),
            storage=storage, storage_root=root, **chosen,
        )  # fmt: skip
        return start(settings, foreground=foreground)


@contextmanager
def layers_of(
    image: str | None, root: str | None, options: tuple[str, ...], progress: str
) -> Iterator[list[str]]:
    """The layers of the image of --image as lowers, which stay during the context."""
    if image is None:
        yield []
        return
    # For start-up time: most mounts are not of images.
    from unionfs.images.rules import DEFAULTS
    from unionfs.images.using import image_layers
    from unionfs.settings.options import parse_options
    from unionfs.storage.root import storage_root
    from unionfs.sys.capabilities import may_use_trusted_xattrs

    notes: list[str] = []
    userxattr = parse_options(options).userxattr or not may_use_trusted_xattrs()
    with ExitStack() as held:
        with shown_progress(f"unpacking {image}", progress) as shown:
            _, paths = held.enter_context(image_layers(
                image, storage_root(root), userxattr=userxattr, rules=DEFAULTS, notes=notes, progress=shown
            ))  # fmt: skip
        tell(*notes)
        yield paths
