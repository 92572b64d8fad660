"""`mount -o remount`: changes the flags of a live mount; the layers stay as they are."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from unionfs.daemon import live
from unionfs.daemon.settle import absolute_mountpoint
from unionfs.errors import UserError, quoted, reason
from unionfs.settings.options import split_options
from unionfs.sys.mountinfo import mounted_at
from unionfs.sys.remount import FLAGS, READ_ONLY, remount

_TYPE = "fuse.unionfs"
_OPPOSITES = {
    "rw": "ro", "suid": "nosuid", "dev": "nodev", "exec": "noexec", "async": "sync",
    "symfollow": "nosymfollow", "atime": "noatime", "diratime": "nodiratime", "norelatime": "relatime",
    "nostrictatime": "strictatime", "nolazytime": "lazytime",
}  # fmt: skip


def is_remount(options: Iterable[str]) -> bool:
    """Return whether the arguments of `-o` contain `remount`."""
    return any(name == "remount" for argument in options for name, _ in split_options(argument))


def flags_of(options: Iterable[str]) -> int:
    """Return the flags of the `-o` arguments; the last word about a flag counts.

    mount(8) completes the words with those of the live mount and of fstab. Options that are not flags, such
    as the layers, are ignored, as by the kernel.
    """
    flags = 0
    for argument in options:
        for name, _ in split_options(argument):
            if name in FLAGS:
                flags |= FLAGS[name]
            elif name in _OPPOSITES:
                flags &= ~FLAGS[_OPPOSITES[name]]
    return flags


def change(mountpoint: str, options: Iterable[str]) -> None:
    """Give the mount the flags of the `-o` arguments. Raises UserError."""
    path = absolute_mountpoint(mountpoint)
    mount = mounted_at(path)
    if mount is None or mount.fstype != _TYPE:
        raise UserError(f"{quoted(path)} is not a unionfs mount; `unionfs ls` lists active mounts.")
    flags = flags_of(options)
    entry = live.find_by_device(mount.device)
    if not flags & READ_ONLY and entry is not None:
        settings = entry.settings
        if settings.upper is None and settings.upper_tmpfs is None:
            raise UserError(
                f"{quoted(path)} cannot be remounted read-write: it has no upper; mount it again with one."
            )
    try:
        remount(mount, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            cure = "close the files that are open for writing there"
        else:
            cure = "run the command as root"
        raise UserError(f"{quoted(path)} cannot be remounted: {reason(error)}; {cure}.") from error
