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
    """Copy all xattrs but the overlay's own; ACLs are among them. Gives the names of all there are.

    Paths, or fds, come with "follow the last link" (always, with an fd).

    As overlayfs (copy_up.c, ovl_copy_xattr): what the upper's filesystem cannot keep is left out, except
    ACLs and ``security.*``, which grant or take rights. Unlike there, what has vanished is left out, and so
    are capabilities that are malformed (EINVAL, security/commoncap.c), which grant nothing: whoever may set
    an empty value would keep others from changing the file, or from making any in the directory.
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
            place.default_acl = acl
    return acl
