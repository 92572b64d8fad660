"""Copying a file with its attributes: owner, mode, times and xattrs, ACLs among them.

Which xattrs are copied, and which errors are tolerated, is for the caller to say.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

ALL: Final = b""
"""Stands for all xattrs of a file where the name of one is expected."""
OWNER: Final = b"owner"

Failed = Callable[[bytes, OSError], None]
"""Gets the name of an xattr, or ALL or OWNER, and the error; returns if the attribute is to be left out."""


class Attributes(NamedTuple):
    """What is set on a copy."""

    mode: int  # as st_mode
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    xattrs: Mapping[bytes, bytes]


def attributes(status: os.stat_result, xattrs: Mapping[bytes, bytes]) -> Attributes:
    """All attributes of what has this status."""
    return Attributes(
        status.st_mode, status.st_uid, status.st_gid, status.st_atime_ns, status.st_mtime_ns, xattrs
    )


def read_xattrs(
    place: int | bytes, wanted: Callable[[bytes], bool], failed: Failed, *, follow: bool = True
) -> dict[bytes, bytes]:
    """The xattrs of an fd (not O_PATH) or a path; none on a filesystem without xattrs.

    One that vanishes meanwhile is left out. Raises what ``failed`` raises.
    """
    try:
        names = os.listxattr(place, follow_symlinks=follow)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            failed(ALL, error)
        return {}
    found = {}
    for name in map(os.fsencode, names):
        if wanted(name):
            try:
                found[name] = os.getxattr(place, name, follow_symlinks=follow)
            except OSError as error:
                if error.errno != errno.ENODATA:
                    failed(name, error)
    return found


def write(
    at: int,
    name: bytes | None,
    new: Attributes,
    failed: Failed,
    *,
    owner: bool = True,
    times: bool = True,
) -> None:
    """Set the attributes of ``name`` in the directory ``at``, which may be a symlink; without a name those of
    the fd ``at``. ``failed`` is asked about owner and xattrs; other errors are raised.

    In the order in which none undoes another: chown(2) drops set-id bits and capabilities, an ACL changes the
    mode, and a ``user.`` xattr needs write permission, which the mode may take away (xattr(7)).
    """
    follow = name is None
    target, where = (at, None) if name is None else (name, at)
    if owner:
        try:
            os.chown(target, new.uid, new.gid, dir_fd=where, follow_symlinks=follow)
        except OSError as error:
            failed(OWNER, error)
    if new.xattrs:
        place = at if name is None else b"/proc/self/fd/%d/%b" % (at, name)
        for key, value in new.xattrs.items():
            try:
                os.setxattr(place, key, value, follow_symlinks=follow)
            except OSError as error:
                failed(key, error)
    if not stat.S_ISLNK(new.mode):
        os.chmod(target, stat.S_IMODE(new.mode), dir_fd=where)
    if times:
        os.utime(target, ns=(new.atime_ns, new.mtime_ns), dir_fd=where, follow_symlinks=follow)
