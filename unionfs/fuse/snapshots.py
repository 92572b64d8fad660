"""Snapshots of a union that is served: the layers change between two requests, and the kernel learns what is
outdated."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import trio

from unionfs.core.opening import Handles
from unionfs.core.places import Layer
from unionfs.fuse.refreshing import Refreshing
from unionfs.union.copyup import CopyUp
from unionfs.union.refreshing import Outdated
from unionfs.union.relayering import relayer
from unionfs.union.stacking import Copied, Stacking
from unionfs.union.tree import Union

_SECONDS: Final = 30.0
"""How long requests in progress may take."""


class Requests(Protocol):
    """The session's loop."""

    def held(self, seconds: float) -> AbstractAsyncContextManager[None]:
        """Within the context no request is answered. Raises TimeoutError."""


class Snapshots:
    """Changes the layers of one mount."""

    def __init__(self, union: Union, copy_up: CopyUp, handles: Handles, refreshing: Refreshing) -> None:
        self._union = union
        self._copy_up = copy_up
        self._handles = handles
        self._refreshing = refreshing
        self._requests: Requests | None = None

    def serve(self, requests: Requests) -> None:
        """Set the session's side; without it there are no snapshots."""
        self._requests = requests

    @property
    def possible(self) -> bool:
        """Whether the session can pause its requests."""
        return self._requests is not None

    async def take(self, fd: int, path: str, commit: Callable[[], None]) -> tuple[list[Copied], float]:
        """Put the empty directory ``fd`` on top of the upper; ``commit`` exchanges the two on disk.

        Returns the files that were open for writing, and for how many seconds no request was answered. Raises
        ``OSError``, ``LayerError``, ``TimeoutError``; then nothing has changed.
        """
        assert self._requests is not None
        async with self._refreshing.one:
            async with self._requests.held(_SECONDS):
                began = time.monotonic()
                stacking = Stacking(self._union, self._copy_up, self._handles.all())
                with stacking.on_top(fd, path):
                    copied = stacking.move_written()
                    commit()
                stacking.finish()
                seconds = time.monotonic() - began
            with trio.CancelScope(shield=True):  # what was done cannot be taken back
                await self._refreshing.tell(Outdated(names=stacking.outdated))
        return copied, seconds

    async def replace(
        self, fd: int, path: str, lowers: list[Layer | tuple[str, int]], commit: Callable[[], None]
    ) -> None:
        """Go on with the empty directory ``fd`` as the upper over ``lowers``: known ones, and paths with an
        fd each. ``commit`` and errors as in :meth:`take`."""
        assert self._requests is not None
        requests = self._requests

        def change() -> Outdated:
            return relayer(self._union, self._handles.all(), fd, path, lowers, commit)

        await self._refreshing.replace(requests.held(_SECONDS), change)
