"""Asks the kernel for its FUSE features without mounting.

A FUSE superblock sends FUSE_INIT when created; fsopen(2) creates one that is not mounted and disappears when
its fds are closed.
"""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from typing import Final

from unionfs.sys.detached import filesystem
from unionfs.sys.fds import Owned, Returned

# include/uapi/linux/fuse.h: struct fuse_in_header, then major, minor, max_readahead, flags, flags2
_IN_HEADER_SIZE: Final = 40
_INIT_IN = struct.Struct("=5I")
_FUSE_INIT: Final = 26
_FUSE_INIT_EXT: Final = 1 << 30
_FUSE_PASSTHROUGH: Final = 1 << 37


def init_flags() -> int | None:
    """Return the 64 flags of the kernel's FUSE_INIT; None if unavailable (not root, an old kernel)."""
    offer = init_offer()
    return None if offer is None else offer[1]


def init_offer() -> tuple[int, int] | None:
    """Return the minor version and the 64 flags of the kernel's FUSE_INIT; None as in `init_flags`."""
    parameters = (("rootmode", "40000"), ("user_id", str(os.geteuid())), ("group_id", str(os.getegid())))
    try:
        with ExitStack() as stack:
            with Returned(os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)) as device:
                stack.enter_context(filesystem("fuse", (("fd", str(device)), *parameters)))
            # The device is closed first: that aborts the connection, so nothing waits for an answer.
            with Owned(device):
                return _offer(os.read(device, 1 << 17))
    except OSError:
        return None


def _offer(message: bytes) -> tuple[int, int] | None:
    if len(message) < _IN_HEADER_SIZE + _INIT_IN.size or message[4:8] != struct.pack("=I", _FUSE_INIT):
        return None
    _, minor, _, flags, flags2 = _INIT_IN.unpack_from(message, _IN_HEADER_SIZE)
    return int(minor), int(flags) | (int(flags2) << 32 if flags & _FUSE_INIT_EXT else 0)


def offers_passthrough() -> bool | None:
    """Return whether the kernel offers passthrough (Linux 6.9, CONFIG_FUSE_PASSTHROUGH); None: unknown."""
    flags = init_flags()
    return None if flags is None else bool(flags & _FUSE_PASSTHROUGH)
