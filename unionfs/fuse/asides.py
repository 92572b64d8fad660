"""Calls on slow layers, for requests that were put aside: made in threads, of which each layer has some.

A request that needs a call on a slow layer is unwound (`core.memo`); its session has the calls made here, and
then answers it anew. The threads make raw system calls on fds of their own, and touch nothing else. So the
loop goes on whatever a layer does, and a request whose caller was killed is just dropped: what its call
returns later is thrown away.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Final

import trio

from unionfs.core.marks import close_with
from unionfs.core.memo import Call, Memo
from unionfs.core.places import Layer
from unionfs.sys.process import is_being_killed

#: The threads of a layer; more calls wait for one.
_THREADS: Final = 16
#: Of a request that wants many calls, a thread makes so many at least.
_AT_ONCE: Final = 8
#: A layer that has not answered for so long is reported.
_HANGS_SECONDS: Final = 1.0
#: How often a session without interrupts asks whether a caller is being killed.
_KILLED_SECONDS: Final = 0.1


class Asides:
    """The calls on slow layers of one mount."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._layers = {layer.slow: layer for layer in layers if layer.slow}
        self._limiters = {number: trio.CapacityLimiter(_THREADS) for number in self._layers}
        #: Of each thread that is making calls: the layer, and since when.
        self._since: dict[object, tuple[int, float]] = {}
        self._aside = 0
        self._closers = {number: _Closer() for number in self._layers}
        if self._layers:
            close_with(self._close)

    @property
    def needed(self) -> bool:
        """Whether there are slow layers."""
        return bool(self._layers)

    def figures(self) -> dict[str, object]:
        """JSON-able: what requests wait for."""
        if not self._layers:
            return {}
        now = time.monotonic()
        hung: dict[str, float] = {}
        for number, since in list(self._since.values()):
            path = self._layers[number].path
            if now - since > max(_HANGS_SECONDS, hung.get(path, 0)):
                hung[path] = round(now - since, 3)
        return {"requests_aside": self._aside, "hung_layers": hung}

    async def make(self, memo: Memo) -> None:
        """Make the calls that a request wants."""
        self._aside += 1
        try:
            parts = [part for calls in _by_layer(memo.wanted()) for part in _divided(calls)]
            if len(parts) == 1:
                await self._make(memo, parts[0])
                return
            async with trio.open_nursery() as nursery:
                for part in parts:
                    nursery.start_soon(self._make, memo, part)
        finally:
            self._aside -= 1

    async def make_for(self, memo: Memo, pid: int) -> None:
        """The same, for a session that is not told of signals. Raises InterruptedError if the process
        ``pid`` is being killed; 0: unknown."""
        killed = False
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal killed
                while not is_being_killed(pid):  # noqa: ASYNC110 - nothing tells it
                    await trio.sleep(_KILLED_SECONDS)
                killed = True
                nursery.cancel_scope.cancel()

            if pid:
                nursery.start_soon(watch)
            await self.make(memo)
            nursery.cancel_scope.cancel()
        if killed and memo.wanted():
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))

    async def _make(self, memo: Memo, calls: Sequence[Call]) -> None:
        number = calls[0].layer
        limiter = self._limiters[number]
        # A request whose caller was killed does not wait for the thread.
        await trio.to_thread.run_sync(
            self._make_all, number, memo, calls, abandon_on_cancel=True, limiter=limiter
        )
        memo.made(calls)

    def _make_all(self, number: int, memo: Memo, calls: Sequence[Call]) -> None:
        """In a thread."""
        me = object()
        for call in calls:
            self._since[me] = number, time.monotonic()
            try:
                call.make(memo)
            finally:
                del self._since[me]

    def _close(self, fd: int, number: int) -> None:
        closer = self._closers.get(number)
        if closer is None:  # of another mount of this process
            os.close(fd)
        else:
            closer.close(fd)


class _Closer:
    """Closes files of a slow layer, where close(2) sends a FLUSH and waits for the answer."""

    def __init__(self) -> None:
        self._fds: SimpleQueue[int] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def close(self, fd: int) -> None:
        """Close an fd soon."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._fds.put(fd)

    def _run(self) -> None:
        while True:
            fd = self._fds.get()
            with suppress(OSError):
                os.close(fd)


def _by_layer(calls: Iterable[Call]) -> list[list[Call]]:
    found: dict[int, list[Call]] = {}
    for call in calls:
        found.setdefault(call.layer, []).append(call)
    return list(found.values())


def _divided(calls: Sequence[Call]) -> list[Sequence[Call]]:
    """Calls for several threads."""
    size = max(_AT_ONCE, -(-len(calls) // (_THREADS // 2)))
    return [calls[first : first + size] for first in range(0, len(calls), size)]
