"""What the daemon tells the kernel unasked, as buffers for one writev(2).

Rules:
- `unique` is 0 and the error field is the notification's code (fs/fuse/dev.c, fuse_dev_do_write).
- writev(2) gives the outcome at once: ENOENT means the kernel has no such inode or entry, which is as good as
  done; ENOTEMPTY (DELETE of a directory in use), EINVAL (the kernel does not know the code).
- INVAL_INODE, INVAL_ENTRY, DELETE, STORE and PRUNE take locks that a request in flight may hold: send them
  from a thread that no request waits for.
- A number is the protocol that brought the notification; those without are older than 7.23 (Linux 3.15).

Source: include/uapi/linux/fuse.h 7.45 and fs/fuse/dev.c, fuse_notify, of Linux 6.18.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from unionfs.fuse.protocol.encode import Buffer, Reply
from unionfs.fuse.protocol.flags import EXPIRE_ONLY, Notify
from unionfs.fuse.protocol.structs import LAYOUTS, OUT_HEADER_SIZE


def _layout(name: str) -> struct.Struct:
    return struct.Struct("=IiQ" + LAYOUTS[name].format)


_BARE: Final = struct.Struct("=IiQ")
_POLL: Final = _layout("fuse_notify_poll_wakeup_out")
_INVAL_INODE: Final = _layout("fuse_notify_inval_inode_out")
_INVAL_ENTRY: Final = _layout("fuse_notify_inval_entry_out")
_DELETE: Final = _layout("fuse_notify_delete_out")
_STORE: Final = _layout("fuse_notify_store_out")
_RETRIEVE: Final = _layout("fuse_notify_retrieve_out")
_PRUNE: Final = _layout("fuse_notify_prune_out")


def inval_inode(nodeid: int, offset: int = 0, length: int = 0) -> Reply:
    """Forget the attributes and ACLs of `nodeid`, and cached data of `length` bytes from `offset`.

    Length 0 or less: to the end. A negative offset: no data, attributes only. A directory's listing goes too.
    """
    return [_INVAL_INODE.pack(_INVAL_INODE.size, Notify.INVAL_INODE, 0, nodeid, offset, length)]


def inval_entry(parent: int, name: bytes) -> Reply:
    """Forget the entry `name` (or its absence) in directory `parent`, and what is below it."""
    return _entry(parent, name, 0)


def expire_entry(parent: int, name: bytes) -> Reply:
    """Look `name` up again before it is next used, but leave what is mounted on it alone (7.38)."""
    return _entry(parent, name, EXPIRE_ONLY)


def _entry(parent: int, name: bytes, flags: int) -> Reply:
    size = _INVAL_ENTRY.size + len(name) + 1
    return [_INVAL_ENTRY.pack(size, Notify.INVAL_ENTRY, 0, parent, len(name), flags), name + b"\0"]


def delete(parent: int, child: int, name: bytes) -> Reply:
    """`name` is gone from directory `parent`, where it was `child`: unhash it and tell inotify."""
    size = _DELETE.size + len(name) + 1
    return [_DELETE.pack(size, Notify.DELETE, 0, parent, child, len(name)), name + b"\0"]


def store(nodeid: int, offset: int, *data: Buffer) -> Reply:
    """Put `data` into the page cache of `nodeid` at `offset`; may make the file longer."""
    size = sum(map(len, data))
    return [_STORE.pack(_STORE.size + size, Notify.STORE, 0, nodeid, offset, size), *data]


def retrieve(notify_unique: int, nodeid: int, offset: int, size: int) -> Reply:
    """Ask for cached data; it comes as the request NOTIFY_REPLY with unique `notify_unique`."""
    return [_RETRIEVE.pack(_RETRIEVE.size, Notify.RETRIEVE, 0, notify_unique, nodeid, offset, size)]


def poll_wakeup(kh: int) -> Reply:
    """Whoever polls with handle `kh` should ask again."""
    return [_POLL.pack(_POLL.size, Notify.POLL, 0, kh)]


def resend() -> Reply:
    """Send every request in flight again, with UNIQUE_RESEND in its unique (7.40, HAS_RESEND)."""
    return [_BARE.pack(OUT_HEADER_SIZE, Notify.RESEND, 0)]


def inc_epoch() -> Reply:
    """Look every entry of the mount up again before it is next used (7.44)."""
    return [_BARE.pack(OUT_HEADER_SIZE, Notify.INC_EPOCH, 0)]


def prune(nodeids: Sequence[int]) -> Reply:
    """Drop these inodes from the cache if nobody uses them; FORGETs follow (7.45)."""
    size = _PRUNE.size + 8 * len(nodeids)
    return [_PRUNE.pack(size, Notify.PRUNE, 0, len(nodeids)), struct.pack(f"={len(nodeids)}Q", *nodeids)]
