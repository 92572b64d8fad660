"""`unionfs refresh`: lowers that were changed from outside are looked at again."""

from __future__ import annotations

import time
from typing import Final, Protocol

import trio

from unionfs.fuse.copying import CopyUps
from unionfs.fuse.directories import Directories
from unionfs.union.refreshing import Outdated, Refresh
from unionfs.union.tree import Union

_FAIR_NS: Final = 2_000_000


class Kernel(Protocol):
    """What a session tells the kernel."""

    @property
    def keeps_sizes(self) -> bool:
        """Whether the kernel accepts no other size of a file that it knows, as with writeback."""

    def drop_prepared(self) -> None:
        """Drop answers prepared before their request."""

    def forget(self, outdated: Outdated) -> None:
        """Make the kernel forget. Blocks: the kernel may wait for requests that the session serves."""


class Refreshing:
    """Refreshes one mount; one refresh at a time."""

    def __init__(self, union: Union, directories: Directories, copy_ups: CopyUps) -> None:
        self._union = union
        self._directories = directories
        self._copy_ups = copy_ups
        self._kernel: Kernel | None = None
        self._since_ns = time.time_ns()
        self._one = trio.Lock()

    def serve(self, kernel: Kernel) -> None:
        """Set the session's side."""
        self._kernel = kernel

    async def refresh(self) -> None:
        """Make changes of the lowers visible, also those of files that are open or mapped."""
        if self._kernel is None:
            return
        async with self._one:
            began = time.time_ns()
            work = Refresh(
                self._union, self._since_ns, self._copy_ups.is_running, new_nodes=self._kernel.keeps_sizes
            )
            fair_until = time.monotonic_ns() + _FAIR_NS
            for _ in work.steps():
                if time.monotonic_ns() > fair_until:
                    await trio.lowlevel.checkpoint()
                    fair_until = time.monotonic_ns() + _FAIR_NS
            self._directories.clear()
            self._kernel.drop_prepared()
            await trio.to_thread.run_sync(self._kernel.forget, work.outdated)
            self._since_ns = began
