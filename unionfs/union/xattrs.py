"""Extended attributes of nodes, and their copies at copy-up."""

from __future__ import annotations

import errno
import os
from typing import Final

from unionfs.core import layercalls
from unionfs.core.places import Place
from unionfs.core.state import State
from unionfs.sys.attributes import ACL_DEFAULT, read_xattrs
from unionfs.union.markers import Markers
from unionfs.union.rights import Rights

CAPABILITY: Final = b"security.capability"


def copied_xattrs(
    markers: Markers, rights: Rights, fd: int, *, path_only: bool = False
) -> dict[bytes, bytes]:
    """The xattrs of an object of a lower that a copy-up copies: all, including ACLs, except the overlay's
    own.

    ``path_only``: ``fd`` was opened with O_PATH. ``rights`` read what the object's mode denies to its owner.

    Unlike overlayfs (copy_up.c, ovl_copy_xattr), skips vanished xattrs and malformed capabilities (EINVAL,
    security/commoncap.c): they grant nothing, and a user who may set an empty value could otherwise keep
    others from changing the file, or from creating any in the directory.
    """
    place = b"/proc/self/fd/%d" % fd if path_only else fd
    denied: dict[bytes, bytes] = {}

    def failed(name: bytes, error: OSError) -> None:
        if error.errno == errno.EACCES and name:
            denied[name] = rights.getxattr(fd, name, error, upper=False)
        elif error.errno != errno.EINVAL or name != CAPABILITY:
            raise error

    return read_xattrs(place, lambda name: not markers.is_private(name), failed) | denied


def existed_before(state: State | None, path: bytes, name: bytes, unique: int) -> bool | None:
    """For another daemon, record whether an xattr exists that the request ``unique`` adds or removes.

    Returns what a former daemon recorded for a request that is sent again; None: it had not begun.
    """
    if state is None:
        return None
    former = state.xattr_existed(unique)
    if former is None:
        state.changes_xattr(unique, os.fsdecode(name) in os.listxattr(path))
    return former


def default_acl(place: Place, dir_fd: int) -> bytes:
    """The default ACL of a real directory, b"" without one; ``dir_fd`` is an fd of it."""
    acl = place.default_acl
    if acl is None:
        try:
            acl = layercalls.call(os.getxattr, b"/proc/self/fd/%d" % dir_fd, ACL_DEFAULT)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
            acl = b""
        if place.layer.is_upper:  # only this daemon changes it
            place.know_default_acl(acl)
    return acl
