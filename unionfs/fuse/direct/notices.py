"""What the direct session tells the kernel after a refresh.

Each name is invalidated by itself. FUSE_NOTIFY_INC_EPOCH (7.44) would invalidate all at once, but then the
kernel drops every name at its next use (fs/fuse/dir.c, fuse_dentry_revalidate), along with what is mounted
below it (fs/dcache.c, d_invalidate): volumes, and the /proc of a container.
"""

from __future__ import annotations

from unionfs.fuse.direct.ahead import Ahead
from unionfs.fuse.direct.device import Device
from unionfs.fuse.protocol import notify
from unionfs.fuse.refreshing import NO_NAME
from unionfs.union.refreshing import Outdated


class Notices:
    """See `unionfs.fuse.refreshing.Kernel`."""

    def __init__(self, device: Device, ahead: Ahead, *, keeps_sizes: bool) -> None:
        self._device = device
        self._ahead = ahead
        self.keeps_sizes = keeps_sizes

    def drop_prepared(self) -> None:
        self._ahead.drop()

    def forget(self, outdated: Outdated) -> None:
        for parent, name in outdated.names:
            self._device.notify(notify.inval_entry(parent, name))
        for id_, parent in outdated.nodes.items():
            if not self._device.notify(notify.inval_inode(id_)):
                self._device.notify(notify.inval_entry(parent, NO_NAME))
                self._device.notify(notify.inval_inode(id_))
