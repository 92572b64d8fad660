"""The I/O mode of a node: through the page cache of the mount, or directly by the kernel (passthrough).

Rules (fs/fuse/iomode.c and fs/fuse/passthrough.c of Linux 6.18):
- A node has one I/O mode at a time. An open with a backing file during a cached open, an open without one
  during an open with one, or an open with another backing id, fails with EIO. So the first open decides, and
  its mode holds until the last close.
- A node has one backing id, counted; the last close unregisters it.
- After a copy-up the opens that exist keep the lower's file as their backing file. A new open gets another
  node: see `NodeTable.supersede`.
- How long attributes are valid while such a file is open for writing: see `core.answers`. Only times can be
  stale: a store through a mapping does not change the size.
"""

from __future__ import annotations

import errno
import os

from unionfs.core.answers import valid
from unionfs.core.files import Handle, Use
from unionfs.core.node import Attributes, Node
from unionfs.fuse.direct.device import Device
from unionfs.fuse.protocol import Decision, Timeout
from unionfs.fuse.protocol.flags import FOPEN_KEEP_CACHE


class NodeIos:
    """Decides the I/O mode of every open according to the kernel's rules."""

    def __init__(self, device: Device, decision: Decision) -> None:
        self._device = device
        self._decision = decision
        #: Opens with a backing file, and opens whose backing file the kernel refused.
        self.passed_through = 0
        self.refused = 0

    def figures(self) -> dict[str, int]:
        """JSON-able."""
        return {
            "opened_with_backing_file": self.passed_through,
            "backing_files": self._device.backing_files,
            "backing_files_refused": self.refused,
        }

    def is_outdated(self, node: Node) -> bool:
        """Whether the backing file in use is no longer the node's, so it cannot be opened again."""
        use = node.use
        return use is not None and use.through > 0 and use.of_upper != node.data_in_place

    def holds_lower(self, node: Node) -> bool:
        """Whether the lower's file is open in passthrough, so a writer cannot join."""
        use = node.use
        return use is not None and use.through > 0 and not use.of_upper and not node.data_in_place

    def opened(self, handle: Handle) -> tuple[int, int]:
        """Count an open; returns FOPEN_* flags and the backing id for the answer."""
        node = handle.node
        use = node.use
        assert use is not None
        if use.through == 0 and use.cached == 0 and self._wants_backing(use, handle):
            self._register(use, node, handle)
        use.opened(handle)
        if handle.through:
            self.passed_through += 1
            return self._decision.passthrough_open_flags, use.backing_id
        flags = self._decision.file_open_flags
        if use.written or not node.territory.lasting:
            flags &= ~FOPEN_KEEP_CACHE  # older cached data may be outdated
        elif not node.data_in_place:
            use.fill()
        return flags, 0

    def valid(self, node: Node, attributes: Attributes) -> Timeout:
        """The validity of a node's attributes."""
        return valid(node, attributes.lasting)

    def _wants_backing(self, use: Use, handle: Handle) -> bool:
        node, decision = handle.node, self._decision
        if not node.territory.lasting:
            return False  # others change bound storage too, so use the page cache
        if node.data_in_place:
            return decision.passthrough_upper
        if not decision.passthrough_lower or use.filled:
            return False
        st = handle.file.st
        return st is None or st.st_size > decision.small_lower

    def _register(self, use: Use, node: Node, handle: Handle) -> None:
        try:
            backing_id = self._device.register(handle.file.fd)
        except OSError as error:
            if error.errno in (errno.EBADF, errno.EFAULT):
                raise
            self.refused += 1  # this file uses the page cache
            return
        use.passes_through(backing_id, of_upper=node.data_in_place)


def stale() -> OSError:
    """The error that makes the kernel look the name up again before it opens (fs/namei.c, do_filp_open)."""
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))
