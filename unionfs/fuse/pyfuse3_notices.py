"""What the pyfuse3 session tells the kernel: outdated attributes, data and names."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable

import pyfuse3

log = logging.getLogger(__name__)


def invalidate_attributes(ids: Iterable[int]) -> None:
    """Make the kernel request the attributes of nodes again. May block."""
    for id_ in ids:
        _send(pyfuse3.invalidate_inode, pyfuse3.InodeT(id_), True)


class Notices:
    """See `unionfs.fuse.refreshing.Kernel`."""

    keeps_sizes = False

    def close_kept(self) -> None:
        pass

    def forget_name(self, parent: int, name: bytes) -> None:
        _send(pyfuse3.invalidate_entry, pyfuse3.InodeT(parent), pyfuse3.FileNameT(name))

    def forget_node(self, id_: int) -> bool:
        return _send(pyfuse3.invalidate_inode, pyfuse3.InodeT(id_))


def _send(notice: Callable[..., None], *arguments: object) -> bool:
    """Send a notice; returns False for an object that the kernel does not know (any more)."""
    try:
        notice(*arguments)
    except OSError as failure:
        if failure.errno not in (errno.ENOENT, errno.ENOSYS, errno.ENOTCONN, errno.ENODEV):
            log.warning("the kernel refused a notice: %s", failure.strerror)
        return False
    return True
