"""Extended attributes: of nodes, and copied along at copy-up."""

from __future__ import annotations

import errno
import os
from typing import Final

from unionfs.union.markers import Markers

_NOT_KEPT: Final = (errno.EOPNOTSUPP,)


def copy_xattrs(markers: Markers, source: tuple[bytes, bool], target: tuple[bytes, bool]) -> None:
    """Copy all xattrs but the overlay's own; ACLs are among them. Paths come with "follow the last link".

    As overlayfs (copy_up.c, ovl_copy_xattr): what the upper's filesystem cannot keep is left out, except
    ACLs and ``security.*``, which grant or take rights.
    """
    try:
        names = os.listxattr(source[0], follow_symlinks=source[1])
    except OSError as error:
        if error.errno in _NOT_KEPT:
            return
        raise
    for text in names:
        name = os.fsencode(text)
        if markers.is_private(name):
            continue
        value = os.getxattr(source[0], name, follow_symlinks=source[1])
        try:
            os.setxattr(target[0], name, value, follow_symlinks=target[1])
        except OSError as error:
            if error.errno not in _NOT_KEPT or name.startswith((b"security.", b"system.posix_acl_")):
                raise
