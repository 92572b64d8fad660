"""Directories of the lowers that an upper hides for good, such as itself inside of a lower."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from unionfs.sys.fds import Owned

_OPAQUE: Final = "overlay.opaque"
_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _name(userxattr: bool) -> str:
    return f"{'user' if userxattr else 'trusted'}.{_OPAQUE}"


def parts_below(outer: str, inner: str) -> tuple[str, ...] | None:
    """Return the names that lead from a directory to another; None if it is not below. Paths are absolute."""
    above = outer.rstrip("/") + "/"
    return tuple(inner[len(above) :].split("/")) if inner.startswith(above) else None


def hide(upper: str, lower: str, parts: Sequence[str], *, userxattr: bool) -> None:
    """Make an opaque directory of the upper at the path `parts` of the lower. Raises OSError.

    It and the directories above it get the lower's owners, modes and times. Whatever the union does with them
    later, the lower's directory is not reached: an opaque directory stays opaque when it is renamed, and its
    removal leaves a whiteout.
    """
    if is_hidden(upper, parts, userxattr=userxattr):
        return
    here, there = Owned(os.open(upper, _FLAGS)), Owned(os.open(lower, _PATH))
    for part in parts:
        with here as parent, there as source:
            # The hidden one need not be readable.
            there = Owned(os.open(part, _PATH, dir_fd=source))
            try:
                os.mkdir(part, 0o700, dir_fd=parent)
                here = Owned(os.open(part, _FLAGS, dir_fd=parent))
                _copy_attributes(there, here)
            except FileExistsError:
                here = Owned(os.open(part, _FLAGS, dir_fd=parent))
    with here as hidden, there:
        os.setxattr(hidden, _name(userxattr), b"y")


def _copy_attributes(source: Owned, target: Owned) -> None:
    status = os.fstat(source.fd)
    with suppress(PermissionError):
        os.fchown(target.fd, status.st_uid, status.st_gid)
    os.fchmod(target.fd, stat.S_IMODE(status.st_mode))
    os.utime(target.fd, ns=(status.st_atime_ns, status.st_mtime_ns))


def is_hidden(upper: str, parts: Sequence[str], *, userxattr: bool) -> bool:
    """Return whether no lower is read at the path `parts`.

    That is so if the upper has an opaque directory there or above, or anything else, such as a whiteout.
    """
    path = upper
    for part in parts:
        path = f"{path}/{part}"
        try:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                return True
        except FileNotFoundError:
            return False
        with suppress(OSError):
            if os.getxattr(path, _name(userxattr), follow_symlinks=False) == b"y":
                return True
    return False
