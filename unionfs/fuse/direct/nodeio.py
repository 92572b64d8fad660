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
from typing import Final

from unionfs.core.files import Handle
from unionfs.core.iomodes import IoModes
from unionfs.core.node import Attributes, Node
from unionfs.core.state import State
from unionfs.core.validity import valid
from unionfs.fuse.protocol import Decision, Timeout
from unionfs.fuse.protocol.flags import FOPEN_KEEP_CACHE

_AWAITED: Final = 64


class NodeIos(IoModes):
    """Decides the I/O mode of every open according to the kernel's rules."""

    def __init__(self, fd: int, decision: Decision, state: State | None = None) -> None:
        """``fd``: the device. ``state``: as in `IoModes`."""
        super().__init__(
            fd, uppers=decision.passthrough_upper, keeps=decision.lower_programs_only,
            through_flags=decision.passthrough_open_flags, cached_flags=decision.file_open_flags,
            state=state,
        )  # fmt: skip
        self._decision = decision

    def figures(self) -> dict[str, int]:
        """JSON-able."""
        return {
            "opened_with_backing_file": self.passed_through,
            "backing_files": self.registered - len(self.kept),
            "backing_files_kept": len(self.kept),
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
        only once, after ESTALE, so no reader may hold the lower again before. Applies to the newest of
        such files."""
        self.awaited[node.ino] = None
        if len(self.awaited) > _AWAITED:
            del self.awaited[next(iter(self.awaited))]

    def asks_for_program(self, handle: Handle) -> bool:
        """Whether the mode of an open, which decides that of the node, depends on whether it is a program."""
        if not self._decision.lower_programs_only or handle.node.data_in_place or handle.node in self.kept:
            return False
        return self._wants_backing(handle, program=True)

    def opened(self, handle: Handle, *, program: bool = False) -> tuple[int, int]:
        """Count an open; returns FOPEN_* flags and the backing id for the answer."""
        if handle.node.data_in_place:
            return self.opened_in_place(handle)
        if self._wants_backing(handle, program=program or handle.node in self.kept):
            self.register(handle)
        return self.opened_elsewhere(handle)

    def mode_of(self, handle: Handle) -> tuple[int, int]:
        """FOPEN_* flags and backing id of an open that a former daemon counted."""
        if handle.through:
            assert handle.node.use is not None
            return self._decision.passthrough_open_flags, handle.node.use.backing_id
        return self._decision.file_open_flags & ~FOPEN_KEEP_CACHE, 0

    def valid(self, node: Node, attributes: Attributes) -> Timeout:
        """The validity of a node's attributes."""
        return valid(node, attributes.lasting)

    def _wants_backing(self, handle: Handle, *, program: bool) -> bool:
        """Whether a file of a lower is to pass through."""
        node, decision = handle.node, self._decision
        use = node.use
        if use is None or use.through or use.cached:
            return False  # it has a mode
        if not node.territory.lasting or not decision.passthrough_lower:
            return False
        if use.filled or node.ino in self.awaited:
            return False
        if decision.lower_programs_only and not program:
            return False
        st = handle.file.st
        return st is None or st.st_size > decision.small_lower


def stale() -> OSError:
    """The error that makes the kernel look the name up again before it opens (fs/namei.c, do_filp_open)."""
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))
