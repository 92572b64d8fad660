"""Copies a file's attributes: owner, mode, times and xattrs, including ACLs.

The caller chooses which xattrs to copy and which errors to tolerate.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from unionfs.core import layercalls
from unionfs.sys.fds import Owned

ALL: Final = b""
"""All xattrs of a file, where one name is expected."""
OWNER: Final = b"owner"

ACL_ACCESS: Final = b"system.posix_acl_access"
ACL_DEFAULT: Final = b"system.posix_acl_default"
_ACLS: Final = frozenset(map(os.fsdecode, (ACL_ACCESS, ACL_DEFAULT)))

Failed = Callable[[bytes, OSError], None]
"""Called with an xattr name, ALL or OWNER, and the error; returns to skip the attribute, or raises."""


class FileAttributes(NamedTuple):
    """The attributes to set on a copy."""

    mode: int  # as st_mode
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    xattrs: Mapping[bytes, bytes]


def attributes(status: os.stat_result, xattrs: Mapping[bytes, bytes]) -> FileAttributes:
    return FileAttributes(
        status.st_mode, status.st_uid, status.st_gid, status.st_atime_ns, status.st_mtime_ns, xattrs
    )


def unsupported(name: bytes, error: OSError) -> None:
    """Raise the error of an attribute that cannot be set. Skips xattrs that the filesystem does not support,
    as overlayfs does (copy_up.c), except ACLs and ``security.*``, which grant or deny rights.
    """
    if (
        error.errno != errno.EOPNOTSUPP
        or name == OWNER
        or name.startswith((b"security.", b"system.posix_acl_"))
    ):
        raise error


def read_xattrs(
    place: int | bytes, wanted: Callable[[bytes], bool], failed: Failed, *, follow: bool = True
) -> dict[bytes, bytes]:
    """Return the xattrs of an fd (not O_PATH) or a path; none on a filesystem without xattrs.

    Skips one that is removed concurrently. Raises what ``failed`` raises.
    """
    try:
        names = layercalls.call(os.listxattr, place, follow_symlinks=follow)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            failed(ALL, error)
        return {}
    found = {}
    for name in map(os.fsencode, names):
        if wanted(name):
            try:
                found[name] = layercalls.call(os.getxattr, place, name, follow_symlinks=follow)
            except OSError as error:
                if error.errno != errno.ENODATA:
                    failed(name, error)
    return found


def drop_acls(place: int | bytes) -> None:
    """Remove the ACLs that a new directory, an fd or path, has from the one that it was made in. Raises
    OSError.
    """
    try:
        names = os.listxattr(place)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return
    for name in _ACLS.intersection(names):
        os.removexattr(place, name)


def write(
    at: int,
    name: bytes | None,
    new: FileAttributes,
    failed: Failed,
    *,
    owner: bool = True,
    times: bool = True,
) -> None:
    """Set the attributes of ``name``, which may be a symlink, in the directory ``at``, or of the fd ``at`` if
    ``name`` is None. Calls ``failed`` for errors of owner and xattrs; raises other errors.

    The order matters: chown(2) clears set-id bits and capabilities, an ACL changes the mode, and a ``user.``
    xattr needs write permission, which the new mode may not grant (xattr(7)).
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
    if name is None:
        os.chmod(at, stat.S_IMODE(new.mode))
    elif not stat.S_ISLNK(new.mode):
        # Not by name: chmod(2) follows a symlink that the filesystem's server may have put there meanwhile.
        with Owned(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)) as fd:
            if not stat.S_ISLNK(os.fstat(fd).st_mode):
                os.chmod(b"/proc/self/fd/%d" % fd, stat.S_IMODE(new.mode))
    if times:
        os.utime(target, ns=(new.atime_ns, new.mtime_ns), dir_fd=where, follow_symlinks=follow)
