"""Makes changes of the lowers from outside visible: all at once (`unionfs refresh`), or those that the
watches report (`--watch-lower`).

Rules:
- One task empties the kernel's queue of events, so that it does not overflow while another one works. What
  changes meanwhile is collected, each name once.
- The first event is acted upon at once; then events are collected for some milliseconds.
- Requests are served during the work, which is done in small pieces. The kernel forgets what became outdated
  after every few hundred names, so that the first of many do not wait for the last.
- Calls on slow lowers, which cannot be watched, are made in threads, as for requests. One that takes too long
  ends the refresh with an error.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import trio

from unionfs.core.memo import Memo, Wanted, outdate
from unionfs.fuse.asides import Asides
from unionfs.fuse.copying import CopyUps
from unionfs.fuse.directories import Directories
from unionfs.union.refreshing import Outdated, Refresh, Step
from unionfs.union.tree import Union
from unionfs.union.watching import Changed, Watches

log = logging.getLogger(__name__)

_NO_NAME: Final = b"/"
"""No entry has this name. Invalidating it waits for lookups and listings of a directory, which hold its lock
(fs/fuse/dir.c, fuse_reverse_inval_entry). So a node that the kernel did not know is known afterwards, if an
answer with it was on its way."""
_FAIR_NS: Final = 2_000_000
_COLLECT_SECONDS: Final = 0.005
_AT_ONCE: Final = 256
"""The kernel forgets that many names and nodes at a time."""
_ANSWER_SECONDS: Final = 5.0
"""A lower that has not answered for so long is not waited for."""
_HELD_SECONDS: Final = 2.0
"""The same, in all, while no request is served."""


class Kernel(Protocol):
    """What a session tells the kernel."""

    @property
    def keeps_sizes(self) -> bool:
        """Whether the kernel accepts no other size of a file that it knows, as with writeback."""

    def close_kept(self) -> None:
        """Close files kept open for the next open."""

    def forget_name(self, parent: int, name: bytes) -> None:
        """Make the kernel forget a name. Blocks: the kernel may wait for requests that the session serves."""

    def forget_node(self, id_: int) -> bool:
        """The same for the attributes and data, or the listing, of a node. Returns False if the kernel does
        not know it."""


class Refreshing:
    """Refreshes one mount; one refresh at a time."""

    def __init__(
        self, union: Union, directories: Directories, copy_ups: CopyUps, asides: Asides
    ) -> None:
        self._union = union
        self._asides = asides
        self._directories = directories
        self._copy_ups = copy_ups
        self._kernel: Kernel | None = None
        self._since_ns = time.time_ns()
        #: Held while nodes are brought up to date.
        self.one = trio.Lock()

    def serve(self, kernel: Kernel) -> None:
        """Set the session's side."""
        self._kernel = kernel

    async def refresh(self) -> None:
        """Make all changes of the lowers visible, also those of files that are open or mapped. Raises
        TimeoutError if a lower does not answer; then some may be visible."""
        if self._kernel is None:
            return
        async with self.one:
            began = time.time_ns()
            work = self._refresh(self._kernel)
            await self._do(self._kernel, work, work.steps())
            self._since_ns = began

    async def replace(self, still: AbstractAsyncContextManager[None], change: Callable[[], Outdated]) -> None:
        """Change the layers, and show all that differs; ``change`` returns what is outdated besides the known
        nodes. Within the context ``still`` no request is served. Raises what ``change`` raises, and
        TimeoutError if a lower does not answer before that; if it stops later, its names are looked up anew.
        """
        assert self._kernel is not None
        async with self.one:
            await self._asides.all_answer(_ANSWER_SECONDS)
            async with still:
                outdated = change()
                work = self._refresh(self._kernel)
                with trio.CancelScope(shield=True):
                    await self._do_at_once(work)
            found = work.take()
            found.names.extend(outdated.names)
            found.nodes.update(outdated.nodes)
            with trio.CancelScope(shield=True):  # what was done cannot be taken back
                await self.tell(found)

    async def tell(self, outdated: Outdated) -> None:
        """Make the kernel forget it."""
        if self._kernel is not None:
            await self._tell(self._kernel, outdated)

    async def watch(self, watches: Watches) -> None:
        """Make changes visible that the watches report; until cancelled."""
        wake = trio.Event()

        async def work() -> None:
            nonlocal wake
            while True:
                await wake.wait()
                wake = trio.Event()
                changed = watches.take()
                try:
                    await self._apply(changed)
                except Exception:
                    log.exception("changes of the lowers could not be shown")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            while True:
                await trio.lowlevel.wait_readable(watches.fd)
                while watches.read():
                    await trio.lowlevel.checkpoint()
                wake.set()
                await trio.sleep(_COLLECT_SECONDS)

    async def _apply(self, changed: Changed) -> None:
        if changed.everything:
            await self.refresh()
        elif changed and self._kernel is not None:
            async with self.one:
                work = self._refresh(self._kernel)
                await self._do(self._kernel, work, work.steps_for(changed.names))

    def _refresh(self, kernel: Kernel) -> Refresh:
        outdate()
        return Refresh(
            self._union, self._since_ns, self._copy_ups.is_running, new_nodes=kernel.keeps_sizes
        )

    async def _do(self, kernel: Kernel, work: Refresh, steps: Iterator[Step]) -> None:
        fair_until = time.monotonic_ns() + _FAIR_NS
        try:
            for step in steps:
                if self._asides.needed:
                    await self._make(step, _ANSWER_SECONDS)
                else:
                    step.look()
                if work.outdated >= _AT_ONCE:
                    await self._tell(kernel, work.take())
                elif time.monotonic_ns() > fair_until:
                    await trio.lowlevel.checkpoint()
                else:
                    continue
                fair_until = time.monotonic_ns() + _FAIR_NS
        finally:
            await self._tell(kernel, work.take())

    async def _do_at_once(self, work: Refresh) -> None:
        """Everything, without a pause."""
        until = trio.current_time() + _HELD_SECONDS
        for step in work.steps():
            try:
                await self._make(step, until - trio.current_time())
            except OSError:
                work.lose(step)

    async def _make(self, step: Step, seconds: float) -> None:
        """Make a step, and the calls on slow lowers that it wants. Raises TimeoutError if one is late."""
        memo = Memo()
        try:
            while True:
                try:
                    with memo:
                        step.look()
                    return
                except Wanted:
                    await self._asides.make_within(memo, seconds)
        finally:
            memo.close()

    async def _tell(self, kernel: Kernel, outdated: Outdated) -> None:
        for id_ in outdated.nodes:
            self._directories.drop(id_)
        kernel.close_kept()
        await trio.to_thread.run_sync(_forget, kernel, outdated)
        outdated.forgotten()


def _forget(kernel: Kernel, outdated: Outdated) -> None:
    for parent, name in outdated.names:
        kernel.forget_name(parent, name)
    for id_, parent in outdated.nodes.items():
        if not kernel.forget_node(id_):
            kernel.forget_name(parent, _NO_NAME)
            kernel.forget_node(id_)
