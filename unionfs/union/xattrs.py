"""Extended attributes: of nodes, and copied along at copy-up."""

from __future__ import annotations

import errno
import os
from typing import Final

from unionfs.union.markers import Markers
from unionfs.union.places import Place

CAPABILITY: Final = b"security.capability"
ACL_DEFAULT: Final = b"system.posix_acl_default"
_NOT_KEPT: Final = (errno.EOPNOTSUPP,)


def copy_xattrs(
    markers: Markers, source: tuple[bytes | int, bool], target: tuple[bytes | int, bool]
) -> list[bytes]:
    """Copy all xattrs, ACLs included, except the overlay's own. Returns the names of all of them.

    Each path or fd comes with "follow the last link" (always true for an fd).

    As overlayfs (copy_up.c, ovl_copy_xattr), skips what the upper's filesystem does not support, except ACLs
    and ``security.*``, which grant or deny rights. Unlike overlayfs, also skips what has vanished, and
    malformed capabilities (EINVAL, security/commoncap.c): they grant nothing, and a user who may set an empty
    value could otherwise keep others from changing the file, or from creating any in the directory.
    """
    try:
        names = [os.fsencode(name) for name in os.listxattr(source[0], follow_symlinks=source[1])]
    except OSError as error:
        if error.errno in _NOT_KEPT:
            return []
        raise
    for name in names:
        if markers.is_private(name):
            continue
        try:
            value = os.getxattr(source[0], name, follow_symlinks=source[1])
        except OSError as error:
            if error.errno == errno.ENODATA or (error.errno == errno.EINVAL and name == CAPABILITY):
                continue
            raise
        try:
            os.setxattr(target[0], name, value, follow_symlinks=target[1])
        except OSError as error:
            if error.errno not in _NOT_KEPT or name.startswith((b"security.", b"system.posix_acl_")):
                raise
    return names


def default_acl(place: Place, dir_fd: int) -> bytes:
    """The default ACL of a real directory, of which ``dir_fd`` is an fd; b"" without one."""
    acl = place.default_acl
    if acl is None:
        try:
            acl = os.getxattr(b"/proc/self/fd/%d" % dir_fd, ACL_DEFAULT)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
            acl = b""
        if place.layer.is_upper:  # which nobody else changes
            place.know_default_acl(acl)
    return acl
