"""What the direct session tells the kernel after a refresh.

Each name is invalidated by itself. FUSE_NOTIFY_INC_EPOCH (7.44) would invalidate all at once, but then the
kernel drops every name at its next use (fs/fuse/dir.c, fuse_dentry_revalidate), along with what is mounted
below it (fs/dcache.c, d_invalidate): volumes, and the /proc of a container.
"""

from __future__ import annotations

from unionfs.fuse.direct.device import Device
from unionfs.fuse.direct.nodeio import NodeIos
from unionfs.fuse.protocol import notify


class Notices:
    """See `unionfs.fuse.refreshing.Kernel`."""

    def __init__(self, device: Device, ios: NodeIos, *, keeps_sizes: bool) -> None:
        self._device = device
        self._ios = ios
        self.keeps_sizes = keeps_sizes

    def close_kept(self) -> None:
        self._ios.let_go()

    def forget_name(self, parent: int, name: bytes) -> None:
        self._device.notify(notify.inval_entry(parent, name))

    def forget_node(self, id_: int) -> bool:
        return self._device.notify(notify.inval_inode(id_))
