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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Final

import trio

from unionfs.core import layercalls
from unionfs.core.marks import close_with
from unionfs.core.memo import Call, Memo, Wanted
from unionfs.core.places import Layer
from unionfs.errors import quoted
from unionfs.sys.process import is_being_killed

#: The threads of a layer; more calls wait for one.
_THREADS: Final = 16
#: Reads of one open file whose beginnings are so near are made one after the other, in the order of the data:
#: the kernel reads ahead with several requests. Programs that read streams (rclone) begin a new one for a
#: read out of order.
_SEQUENCE: Final = 8 << 20
#: Of a request that wants many calls, a thread makes so many at least.
_AT_ONCE: Final = 8
#: So long the loop waits for a layer that answered in this time before: less than it takes to wait aside.
_PATIENCE_SECONDS: Final = 0.0003
#: A layer that has not answered for so long is reported.
_HANGS_SECONDS: Final = 1.0
#: How often it is asked whether a caller is being killed, where the kernel does not tell.
KILLED_SECONDS: Final = 0.1


class Asides:
    """The calls on slow layers of one mount."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._layers = {layer.slow: layer for layer in layers if layer.slow}
        self._pools = {number: _Pool() for number in self._layers}
        #: Calls that were not made at once, of requests that are being put aside.
        self._begun: dict[Memo, _Job] = {}
        self._aside = 0
        self._closers = {number: _Closer() for number in self._layers}
        if self._layers:
            close_with(self._close)

    @property
    def needed(self) -> bool:
        """Whether there are slow layers."""
        return bool(self._layers)

    def figures(self, silent: Mapping[str, float]) -> dict[str, object]:
        """JSON-able: what requests wait for. ``silent``: for how many seconds others wait, by layer."""
        if not self._layers:
            return {}
        now = time.monotonic()
        hung = {path: round(seconds, 3) for path, seconds in silent.items() if seconds > _HANGS_SECONDS}
        for number, pool in self._pools.items():
            longest = max((now - since for since in list(pool.since.values())), default=0.0)
            if longest > _HANGS_SECONDS:
                path = self._layers[number].path
                hung[path] = max(round(longest, 3), hung.get(path, 0.0))
        return {"requests_aside": self._aside, "hung_layers": hung}

    def made_at_once(self, memo: Memo) -> bool:
        """Make the calls that a request wants, if the layer answers in less time than it takes to wait aside.
        Otherwise :meth:`make` must follow."""
        calls = memo.wanted()
        if not calls:
            return True
        pool = self._pools[calls[0].layer]
        if len(calls) > _AT_ONCE or any(call.layer != calls[0].layer for call in calls):
            return False
        reads = len(calls) == 1 and calls[0].read_from is not None
        if not pool.is_quick and not reads:
            return False
        # Reads are given now, in the order of the requests: tasks begin in any order.
        job = _Job(calls)
        pool.give(job, memo)
        if pool.is_quick and job.is_done(_PATIENCE_SECONDS):
            memo.made(calls)
            return True
        pool.is_quick = False
        self._begun[memo] = job
        return False

    async def make(self, memo: Memo) -> None:
        """Make the calls that a request wants."""
        self._aside += 1
        begun = self._begun.pop(memo, None)
        try:
            if begun is not None:
                await begun.done()
                memo.made(begun.calls)
                return
            jobs = [
                self._given(memo, part) for calls in _by_layer(memo.wanted()) for part in _divided(calls)
            ]
            for job in jobs:
                await job.done()
                memo.made(job.calls)
        finally:
            self._aside -= 1

    async def make_for(self, memo: Memo, pid: int, *, is_caller: bool) -> None:
        """The same, for a session that is not told of signals. Raises InterruptedError if the task ``pid`` is
        being killed; 0: unknown. Unless it ``is_caller``, another one may wait when it is gone."""
        killed = False
        failed: OSError | None = None
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal killed
                while not is_being_killed(pid, gone=is_caller):  # noqa: ASYNC110 - nothing tells it
                    await trio.sleep(KILLED_SECONDS)
                killed = True
                nursery.cancel_scope.cancel()

            if pid:
                nursery.start_soon(watch)
            try:
                await self.make(memo)
            except OSError as error:  # the nursery would put it into a group
                failed = error
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed
        if killed and memo.wanted():
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))

    async def make_within(self, memo: Memo, seconds: float) -> None:
        """The same, for work of the mount itself. Raises TimeoutError if a layer does not answer so soon."""
        layer = memo.wanted()[0].layer
        with trio.move_on_after(max(seconds, 0.0)):
            await self.make(memo)
            return
        raise TimeoutError(
            f"the lower {quoted(self._layers[layer].path)} has not answered for {seconds:.0f} seconds; try "
            "again when it does"
        )

    async def all_answer(self, seconds: float) -> None:
        """Ask each slow layer something that no cache answers. Raises TimeoutError as :meth:`make_within`."""
        for layer in self._layers.values():
            memo = Memo()
            try:
                with memo:
                    layercalls.call(os.fstatvfs, layer.root_fd)
            except Wanted:
                await self.make_within(memo, seconds)
            finally:
                memo.close()

    def _given(self, memo: Memo, calls: Sequence[Call]) -> _Job:
        job = _Job(calls)
        self._pools[calls[0].layer].give(job, memo)
        return job

    def _close(self, fd: int, number: int) -> None:
        closer = self._closers.get(number)
        if closer is None:  # of another mount of this process
            os.close(fd)
        else:
            closer.close(fd)


class _Job:
    """Calls that a thread makes."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        #: Of one read: which open file, and where it begins.
        self.read_from = calls[0].read_from if len(calls) == 1 else None
        self._made = threading.Lock()
        self._made.acquire()
        self._tell: Callable[[], object] | None = None
        self._changes = threading.Lock()
        self._error: BaseException | None = None

    def ends(self, error: BaseException | None) -> None:
        """In the thread: the calls are made, but for an ``error`` that is none of a system call."""
        with self._changes:
            self._error = error
            self._made.release()
            tell = self._tell
        if tell is not None:
            with suppress(trio.RunFinishedError):
                tell()

    def is_done(self, seconds: float) -> bool:
        """Wait for the calls, at most so long, in the loop."""
        made = self._made.acquire(timeout=seconds)
        if made and self._error is not None:
            raise self._error
        return made

    async def done(self) -> None:
        """Wait for the calls while others run. If cancelled, they are made nevertheless."""
        event = trio.Event()
        with self._changes:
            if self._made.locked():
                self._tell = partial(trio.lowlevel.current_trio_token().run_sync_soon, event.set)
            else:
                event.set()
        await event.wait()
        if self._error is not None:
            raise self._error


class _Pool:
    """The threads of a layer. A program that ends does not wait for them."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[_Job, Memo]] = SimpleQueue()
        #: Reads by their open files: those that are being made, and those that wait for their turn.
        self._reading: dict[int, tuple[list[_Job], list[tuple[_Job, Memo]]]] = {}
        self._threads = 0
        #: Jobs that are not done.
        self._open = 0
        self._counting = threading.Lock()
        #: Of each thread that is making a call: since when.
        self.since: dict[object, float] = {}
        #: Whether the last call took less time than the loop has patience for.
        self.is_quick = True

    def give(self, job: _Job, memo: Memo) -> None:
        """Let a thread make calls. Raises OSError (EAGAIN) if there is none, and none can be started."""
        if self._threads < min(self._open + 1, _THREADS):
            self._start()
        with self._counting:
            self._open += 1
            if job.read_from is not None and not self._is_next(job, memo, job.read_from[0]):
                return
        self._jobs.put((job, memo))

    def _is_next(self, job: _Job, memo: Memo, file: int) -> bool:
        """Whether a read may be made now, or has to wait for those before it. Call it with the lock."""
        made, waiting = self._reading.setdefault(file, ([], []))
        if _comes_after(job, made) or _comes_after(job, (other for other, _ in waiting)):
            waiting.append((job, memo))
            return False
        made.append(job)
        return True

    def _read(self, job: _Job, file: int) -> None:
        """A read is made: those whose turn it is come next. Call it with the lock."""
        made, waiting = self._reading[file]
        made.remove(job)
        if not made and not waiting:
            del self._reading[file]
            return
        for one in sorted(waiting, key=lambda one: _begin_of(one[0])):
            others = (other for other, _ in waiting if other is not one[0])
            if not _comes_after(one[0], made) and not _comes_after(one[0], others):
                waiting.remove(one)
                made.append(one[0])
                self._jobs.put(one)

    def _start(self) -> None:
        try:
            threading.Thread(target=self._run, daemon=True).start()
        except RuntimeError as error:  # a limit of the user or the machine
            if not self._threads:
                raise OSError(errno.EAGAIN, str(error)) from None
        else:
            self._threads += 1

    def _run(self) -> None:
        me = object()
        while True:
            job, memo = self._jobs.get()
            error: BaseException | None = None
            try:
                for call in job.calls:
                    began = self.since[me] = time.monotonic()
                    call.make(memo)
                    self.is_quick = time.monotonic() - began < _PATIENCE_SECONDS
            except BaseException as failure:
                error = failure
            self.since.pop(me, None)
            with self._counting:
                self._open -= 1
                if job.read_from is not None:
                    self._read(job, job.read_from[0])
            job.ends(error)
            del job, memo


class _Closer:
    """Closes files of a slow layer, where close(2) sends a FLUSH and waits for the answer."""

    def __init__(self) -> None:
        self._fds: SimpleQueue[int] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def close(self, fd: int) -> None:
        """Close an fd soon."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # a limit of the user or the machine
                os.close(fd)
                return
            self._thread = thread
        self._fds.put(fd)

    def _run(self) -> None:
        while True:
            fd = self._fds.get()
            with suppress(OSError):
                os.close(fd)


def _begin_of(read: _Job) -> int:
    assert read.read_from is not None
    return read.read_from[1]


def _comes_after(read: _Job, others: Iterable[_Job]) -> bool:
    """Whether a read is one of a sequence with other reads, after them."""
    begin = _begin_of(read)
    return any(0 < begin - _begin_of(other) <= _SEQUENCE for other in others)


def _by_layer(calls: Iterable[Call]) -> list[list[Call]]:
    found: dict[int, list[Call]] = {}
    for call in calls:
        found.setdefault(call.layer, []).append(call)
    return list(found.values())


def _divided(calls: Sequence[Call]) -> list[Sequence[Call]]:
    """Calls for several threads."""
    size = max(_AT_ONCE, -(-len(calls) // (_THREADS // 2)))
    return [calls[first : first + size] for first in range(0, len(calls), size)]
