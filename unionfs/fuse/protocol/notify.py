"""Notifications to the kernel, as buffers for one writev(2).

Rules:
- `unique` is 0 and the error field is the notification's code (fs/fuse/dev.c, fuse_dev_do_write).
- writev(2) returns the outcome: ENOENT if the kernel has no such inode, which is as good as success; EINVAL
  if it does not know the code.
- INVAL_INODE of data, STORE and PRUNE take locks that a request in flight may hold: send them from a thread
  that no request waits for.
- A number is the protocol version of the notification; those without are older than 7.23 (Linux 3.15).

Source: include/uapi/linux/fuse.h 7.45 and fs/fuse/dev.c, fuse_notify, of Linux 6.18.
"""

from __future__ import annotations

import struct
from typing import Final

from unionfs.fuse.protocol.encode import Buffer, Reply
from unionfs.fuse.protocol.flags import Notify
from unionfs.fuse.protocol.structs import LAYOUTS, OUT_HEADER_SIZE


def _layout(name: str) -> struct.Struct:
    return struct.Struct("=IiQ" + LAYOUTS[name].format)


_BARE: Final = struct.Struct("=IiQ")
_INVAL_INODE: Final = _layout("fuse_notify_inval_inode_out")
_INVAL_ENTRY: Final = _layout("fuse_notify_inval_entry_out")
_STORE: Final = _layout("fuse_notify_store_out")
_PRUNE: Final = _layout("fuse_notify_prune_out")


def inval_inode(nodeid: int, offset: int = 0, length: int = 0) -> Reply:
    """Forget the attributes and ACLs of `nodeid`, and cached data of `length` bytes from `offset`.

    Length 0 or less: to the end. A negative offset: no data, attributes only. A directory's listing goes too.
    """
    return [_INVAL_INODE.pack(_INVAL_INODE.size, Notify.INVAL_INODE, 0, nodeid, offset, length)]


def inval_entry(parent: int, name: bytes) -> Reply:
    """Forget the entry `name` of the directory `parent`, also that there is none."""
    size = _INVAL_ENTRY.size + len(name) + 1
    return [_INVAL_ENTRY.pack(size, Notify.INVAL_ENTRY, 0, parent, len(name), 0), name, b"\0"]


def store(nodeid: int, offset: int, *data: Buffer) -> Reply:
    """Put `data` into the page cache of `nodeid` at `offset`; may make the file longer."""
    size = sum(map(len, data))
    return [_STORE.pack(_STORE.size + size, Notify.STORE, 0, nodeid, offset, size), *data]


def resend() -> Reply:
    """Send every request in flight again, with UNIQUE_RESEND in its unique (7.40, HAS_RESEND)."""
    return [_BARE.pack(OUT_HEADER_SIZE, Notify.RESEND, 0)]


def prune(ids: bytes) -> Reply:
    """Give back those of the nodes that no program uses; `ids` are 64-bit numbers (7.45)."""
    return [_PRUNE.pack(_PRUNE.size + len(ids), Notify.PRUNE, 0, len(ids) // 8), ids]
