"""The I/O mode of a node: through the page cache of the mount, or directly by the kernel (passthrough).

Rules (fs/fuse/iomode.c and fs/fuse/passthrough.c of Linux 6.18):
- A node has one I/O mode at a time. An open with a backing file during a cached open, an open without one
  during an open with one, or an open with another backing id, fails with EIO. So the first open decides, and
  its mode holds until the last close.
- A node has one backing id, counted; the last close unregisters it, or keeps a program's for the next open.
- After a copy-up the opens that exist keep the lower's file as their backing file. New opens for reading join
  them as long as the copy has the same data (a change of metadata alone): so a program that runs stays
  ETXTBSY, and locks meet. Any other new open gets another node: see `NodeTable.supersede`.
- With an upper, hybrid does this only to programs: files that begin as ELF files do. They are not changed in
  place while they are in use: package managers replace them by rename, and execve(2) denies writing.
  Permission bits and FMODE_EXEC (0x20 in the flags of OPEN) do not count: libraries have neither, and scripts
  have both, but are edited in place.
- How long attributes are valid while such a file is open for writing: see `core.validity`.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from typing import Final

from unionfs.core.files import Handle, OpenFile, Use
from unionfs.core.node import Attributes, Node
from unionfs.core.validity import valid
from unionfs.fuse.direct.device import Device
from unionfs.fuse.protocol import Decision, Timeout
from unionfs.fuse.protocol.flags import FOPEN_KEEP_CACHE

_AWAITED: Final = 64
_KEPT: Final = 256


class NodeIos:
    """Decides the I/O mode of every open according to the kernel's rules."""

    def __init__(self, device: Device, decision: Decision) -> None:
        self._device = device
        self._decision = decision
        #: Opens with a backing file, and opens whose backing file the kernel refused.
        self.passed_through = 0
        self.refused = 0
        #: Inode numbers of lower files whose writer is about to come back, after ESTALE; the newest of them.
        self._awaited: OrderedDict[int, None] = OrderedDict()
        #: Programs whose last open was closed: their backing files stay open and registered for the next one,
        #: which saves half of its time; those used last.
        self._kept: OrderedDict[Node, tuple[int, OpenFile]] = OrderedDict()

    def figures(self) -> dict[str, int]:
        """JSON-able."""
        return {
            "opened_with_backing_file": self.passed_through,
            "backing_files": self._device.backing_files - len(self._kept),
            "backing_files_kept": len(self._kept),
            "backing_files_refused": self.refused,
        }

    def is_outdated(self, node: Node, *, writes: bool) -> bool:
        """Whether the backing file in use is no longer the node's, so an open that ``writes`` (or reads other
        data) cannot join."""
        use = node.use
        if use is None or use.through == 0 or use.of_upper == node.data_in_place:
            return False
        return writes or use.resized

    def holds_lower(self, node: Node) -> bool:
        """Whether the lower's file is open in passthrough, so a writer cannot join."""
        use = node.use
        return use is not None and use.through > 0 and not use.of_upper and not node.data_in_place

    def await_writer(self, node: Node) -> None:
        """Keep a lower's file from passthrough until it is copied up: the kernel repeats the writer's open
        only once, so no reader may hold the lower again before."""
        self._awaited[node.ino] = None
        if len(self._awaited) > _AWAITED:
            self._awaited.popitem(last=False)

    def asks_for_program(self, handle: Handle) -> bool:
        """Whether the mode of an open, which decides that of the node, depends on whether it is a program."""
        if not self._decision.lower_programs_only or handle.node.data_in_place or handle.node in self._kept:
            return False
        return self._wants_backing(handle, program=True)

    def opened(self, handle: Handle, *, program: bool = False) -> tuple[int, int]:
        """Count an open; returns FOPEN_* flags and the backing id for the answer."""
        node = handle.node
        use = node.use
        assert use is not None
        if self._awaited and node.data_in_place:
            self._awaited.pop(node.ino, None)
        if self._wants_backing(handle, program=program or node in self._kept):
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

    def released(self, handle: Handle) -> None:
        """Count a close."""
        node, use = handle.node, handle.node.use
        assert use is not None
        backing_id = use.closed(handle)
        if not backing_id:
            return
        gone = node.in_place or node.unlinked or node.successor is not None
        if gone or not self._decision.lower_programs_only:
            self._device.unregister(backing_id)
            return
        self._kept[node] = backing_id, handle.file.take()
        if len(self._kept) > _KEPT:
            self._let_go(*self._kept.popitem(last=False)[1])

    def let_go(self) -> None:
        """Close the files kept for the next open: others may have replaced them in the lower."""
        while self._kept:
            self._let_go(*self._kept.popitem()[1])

    def valid(self, node: Node, attributes: Attributes) -> Timeout:
        """The validity of a node's attributes."""
        return valid(node, attributes.lasting)

    def _wants_backing(self, handle: Handle, *, program: bool) -> bool:
        node, decision = handle.node, self._decision
        use = node.use
        if use is None or use.through or use.cached:
            return False  # it has a mode
        if not node.territory.lasting:
            return False  # others change bound storage too, so use the page cache
        if node.data_in_place:
            return decision.passthrough_upper
        if not decision.passthrough_lower or use.filled or node.ino in self._awaited:
            return False
        if decision.lower_programs_only and not program:
            return False
        st = handle.file.st
        return st is None or st.st_size > decision.small_lower

    def _let_go(self, backing_id: int, file: OpenFile) -> None:
        self._device.unregister(backing_id)
        file.release()

    def _register(self, use: Use, node: Node, handle: Handle) -> None:
        kept = self._kept.pop(node, None)
        if kept is not None:
            backing_id, file = kept
            if file is handle.file:
                file.release()
                use.passes_through(backing_id, of_upper=False)
                return
            self._let_go(backing_id, file)  # it was copied up
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
