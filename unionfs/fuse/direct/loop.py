"""The loop of the direct session: reads and answers requests, and stays fair to other tasks of the process.

Rules:
- `core.loop` reads, polls, and answers what needs no decision; what it returns is handled here. It returns
  every two milliseconds, for a checkpoint.
- A handler that does not wait is answered in line. One that waits continues in a task, and takes over the
  receive buffer if its data is there.
- Files used by a copy-up are closed right after the answer, while the caller wakes up.
- A notice about changed attributes is sent before the answer, so no process sees old ones after it.
- Latency, from reading the request to writing the answer, is measured only on demand.
"""

from __future__ import annotations

import errno
import logging
import mmap
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from unionfs.core.loop import FAIR, WAIT, Channel, new_buffer
from unionfs.core.memo import Memo, Wanted
from unionfs.fuse.asides import KILLED_SECONDS, Asides
from unionfs.fuse.direct.device import Device
from unionfs.fuse.direct.nodelimit import NodeLimit
from unionfs.fuse.direct.refusing import NO_ANSWER, OPCODE_UNIQUE, refuse_all
from unionfs.fuse.fence import Fence
from unionfs.fuse.inline import PENDING, begin, finish
from unionfs.fuse.invalidations import Invalidations
from unionfs.fuse.latency import Latencies
from unionfs.fuse.protocol import (
    Decision,
    Opcode,
    ProtocolError,
    Reply,
    Request,
    decoder,
    encode,
    notify,
    receive_buffer_size,
)
from unionfs.fuse.protocol import requests as rq
from unionfs.sys.process import is_being_killed
from unionfs.union.tree import Union

log = logging.getLogger(__name__)

Answer = Callable[[Any], Reply | None]
Waiting = Callable[[Any], Coroutine[Any, Any, Reply | None]]

_BURST_SECONDS: Final = 0.002
"""A burst of requests is over when none arrives for that long; see `core.idling`."""
_RESIZED_SECONDS: Final = 0.05
"""The delay of the notice about a directory's changed size."""
_HELD_SECONDS: Final = 0.0005
_HELD_BY_SERVER_SECONDS: Final = 2.0
"""With slow layers, how long the whole mount may wait for requests in progress."""


class Loop:
    """Reads and answers the requests of one mount until it is gone."""

    def __init__(
        self,
        device: Device,
        decision: Decision,
        union: Union,
        requests: Counter[str],
        answers: Mapping[Opcode, Answer],
        waiting: Mapping[Opcode, Waiting],
        latencies: Latencies,
        channel: Channel,
        invalidations: Invalidations | None = None,
        asides: Asides | None = None,
        limit: NodeLimit | None = None,
        fence: Fence | None = None,
    ) -> None:
        self._device = device
        self._fence = fence
        self._channel = channel
        self._union = union
        self._new = new_buffer if union.state is None else _present_buffer
        self._files = union.files
        self._files.defer()
        self._requests = requests
        self._decode = decoder(decision.flags)
        self._size = receive_buffer_size(decision.reply.max_write)
        self._new_buffer()
        self._answers = {int(opcode): answer for opcode, answer in answers.items()}
        self._invalidations = invalidations or Invalidations()
        self._tells_resized = False
        self._waiting = {int(opcode): handler for opcode, handler in waiting.items()}
        for opcode in decision.enosys:
            self._answers.pop(opcode, None)
            self._waiting.pop(opcode, None)
        self._names = {int(opcode): opcode.name.lower() for opcode in Opcode}
        #: Requests answered in tasks: the cancel scope of the task, and the pid of the caller.
        self._running: dict[int, tuple[trio.CancelScope, int]] = {}
        self._latencies = latencies
        self._hold: trio.Event | None = None
        #: How many of `_running` wait for slow layers, and have changed nothing.
        self._waiting_aside = 0
        #: Makes calls on slow layers, if there are any; see `core.memo`.
        self._asides = asides if asides is not None and asides.needed else None
        if self._asides is not None:
            channel.puts_aside()
        self._limit = limit

    @asynccontextmanager
    async def held(self, seconds: float) -> AsyncIterator[None]:
        """Within the context no request is read, and none is being answered: those that come wait, as do
        those that are aside. Raises ``TimeoutError`` if some are not answered within that time, or within two
        seconds where layers are slow."""
        while self._hold is not None:
            await self._hold.wait()
        released = self._hold = trio.Event()
        if self._asides is not None:
            seconds = min(seconds, _HELD_BY_SERVER_SECONDS)
        try:
            with trio.move_on_after(seconds):
                while self._in_progress:  # noqa: ASYNC110 - an event would cost every request
                    await trio.sleep(_HELD_SECONDS)
            if self._in_progress:
                raise TimeoutError(f"{self._in_progress} requests are in progress for {seconds:.0f} seconds")
            yield
        finally:
            self._hold = None
            released.set()

    @property
    def _in_progress(self) -> int:
        return len(self._running) - self._waiting_aside

    def _new_buffer(self) -> None:
        self._buffer = self._new(self._size)
        self._view = memoryview(self._buffer)
        self._channel.read_into(self._buffer)

    async def run(self) -> None:
        """Serve until the mount is gone. Raises ConnectionAbortedError, in a group, if disconnected."""
        async with trio.open_nursery() as self._nursery:
            await self._read_requests()
            self._nursery.cancel_scope.cancel()

    async def _read_requests(self) -> None:
        channel, deferred = self._channel, self._files.deferred
        serve, latencies, invalidations = self.serve, self._latencies, self._invalidations
        limit, fence = self._limit, self._fence
        while True:
            while self._hold is not None:
                await self._hold.wait()
            if fence is not None and not fence.passes and not await fence.passed(self._device.fd):
                await refuse_all(self._device, self._view)
                return
            try:
                size = channel.next()
            except OSError as error:
                if self._device.has_ended(error):
                    return
                continue
            if invalidations.soon or invalidations.now:
                self._announce()  # of what `core` has copied up
            if size <= 0 and limit is not None and limit.exceeded:
                self._nursery.start_soon(limit.give_back)
            if size == WAIT:
                if channel.holds:
                    with trio.move_on_after(_BURST_SECONDS):
                        await trio.lowlevel.wait_readable(self._device.fd)
                        channel.waited()
                        continue
                    channel.let_go()
                await trio.lowlevel.wait_readable(self._device.fd)
                channel.waited()
            elif size == FAIR:
                await trio.lowlevel.checkpoint()
                channel.rested()
            else:
                if latencies.watched:
                    self._measured(size)
                else:
                    serve(size)
                if deferred:
                    self._files.close_deferred()

    def serve(self, size: int) -> bool:
        """Answer the request in the buffer; returns True if it started a task for the answer."""
        memo = None if self._asides is None else self._channel.memo_of_last()
        message = None
        if memo is not None and memo.used:
            message = bytes(self._view[:size])
        try:
            request = self._decode(self._view, size)
        except ProtocolError as error:
            log.error("invalid request from the kernel: %s", error)
            if error.unique is not None:
                self._device.answer(encode.error(error.unique, errno.EIO))
            return False
        number = request.number
        if message is not None:
            return self._put_aside(request, memo, message)
        self._requests[self._names.get(number, "unknown")] += 1
        try:
            if memo is None:
                reply = self._begin(request, None)
            else:
                with memo:
                    reply = self._begin(request, memo)
        except Wanted:
            return self._put_aside(request, memo)
        except BaseException as error:
            reply = self._failed(request, error)
        if reply is PENDING:
            return True
        self._reply(reply)  # type: ignore[arg-type]
        return False

    def _begin(self, request: Request, memo: Memo | None) -> object:
        """The answer, or PENDING if a task was started for it."""
        answer = self._answers.get(request.number)
        if answer is not None:
            return answer(request)
        waiting = self._waiting.get(request.number)
        if waiting is None:
            return self._other(request)
        coroutine = waiting(request)
        begun = begin(coroutine)
        if begun is PENDING:
            self._in_task(request, memo, finish(coroutine, memo))
        return begun

    def _in_task(self, request: Request, memo: Memo | None, rest: Awaitable[Reply | None]) -> None:
        if "data" in request.fields:
            self._new_buffer()
        if memo is not None:
            self._channel.renew_memo()
        # Recorded before its task runs: the next request may already be its INTERRUPT, which the kernel sends
        # once (fs/fuse/dev.c, request_wait_answer).
        scope = trio.CancelScope()
        self._running[request.unique] = scope, request.pid
        self._nursery.start_soon(self._finish, request, memo, rest, scope)

    # -- requests that wait for slow layers -----------------------------------------------------------

    def _put_aside(self, request: Request, memo: Memo | None, message: bytes | None = None) -> bool:
        """Answer a request that wants calls on slow layers: in line while the layers answer quickly, else in
        a task. ``message``: its bytes, if `core` is to try first. Returns whether a task was started."""
        assert memo is not None
        assert self._asides is not None
        reply: object = None
        while True:
            try:
                if not self._asides.made_at_once(memo):
                    self._in_task(request, memo, self._anew(request, memo, message))
                    return True
                if message is not None:
                    if self._channel.again(message, memo):
                        break  # it is sent
                    if memo.wanted():
                        continue
                    message = None
                    self._requests[self._names.get(request.number, "unknown")] += 1
                with memo:
                    reply = self._begin(request, memo)
            except Wanted:
                continue
            except BaseException as error:
                reply = self._failed(request, error)
            break
        if reply is PENDING:
            return True
        memo.close()
        self._channel.renew_memo()
        self._reply(reply)  # type: ignore[arg-type]
        return False

    async def _anew(self, request: Request, memo: Memo, message: bytes | None = None) -> Reply | None:
        """Make the calls that a request wants and answer it anew, until it wants none."""
        assert self._asides is not None
        while True:
            self._waiting_aside += 1
            try:
                await self._asides.make(memo)
                await self._may_go_on()
            finally:
                self._waiting_aside -= 1
            if message is not None:
                if self._channel.again(message, memo):
                    return None  # it is sent
                if memo.wanted():
                    continue
                message = None
                self._requests[self._names.get(request.number, "unknown")] += 1
            try:
                return await self._answered(request, memo)
            except Wanted:
                continue

    async def _may_go_on(self) -> None:
        """Wait as before reading a request. Raises OSError (EIO) if the upper's lease was lost meanwhile."""
        while True:
            if self._hold is not None:
                await self._hold.wait()
            elif self._fence is not None and not self._fence.passes:
                await self._fence.must_pass()
            else:
                return

    async def _answered(self, request: Request, memo: Memo) -> Reply | None:
        waiting = self._waiting.get(request.number)
        if waiting is not None:
            return await finish(waiting(request), memo)
        answer = self._answers.get(request.number)
        with memo:
            return self._other(request) if answer is None else answer(request)

    # -- measuring latencies --------------------------------------------------------------------------

    def _measured(self, size: int) -> None:
        number, unique = OPCODE_UNIQUE.unpack_from(self._buffer)
        began = self._latencies.clock()
        if number in NO_ANSWER or not self._latencies.goes_on(began):
            if not self._channel.answer(size):
                self.serve(size)
            return
        self._latencies.begin(unique, began)
        if self._channel.answer(size) or not self.serve(size):
            self._latencies.end(unique, self._names.get(number, "unknown"))

    # -- answers --------------------------------------------------------------------------------------

    def _other(self, request: Request) -> Reply | None:
        if isinstance(request, rq.Interrupt):
            self._interrupt(request.interrupted)
        if request.number in NO_ANSWER:
            return None
        return encode.error(request.unique, errno.ENOSYS)

    def _reply(self, reply: Reply | None) -> None:
        if self._invalidations.listings:
            # Cached data of a directory never waits for a request.
            self._send([notify.inval_inode(id_) for id_ in self._invalidations.take_listings()])
        if self._invalidations.soon or self._invalidations.now:
            self._announce()
        if reply is not None:
            self._device.answer(reply)
        if self._device.later:
            self._nursery.start_soon(trio.to_thread.run_sync, self._send, self._device.take_later())

    def _announce(self) -> None:
        """Send the notices about copied nodes, and let those about sizes be sent."""
        # In line: the copied node is held by its request, see `Device.notify`.
        self._send(_ask_again(self._invalidations.take_now()))
        if self._invalidations.soon and not self._tells_resized:
            self._tells_resized = True
            self._nursery.start_soon(self._tell_resized)

    async def _tell_resized(self) -> None:
        """Send notices of sizes with a delay: after each copy-up they would make a walker query each time."""
        await trio.sleep(_RESIZED_SECONDS)
        self._tells_resized = False
        await trio.to_thread.run_sync(self._send, _ask_again(self._invalidations.take_soon()))

    def _send(self, notices: list[Reply]) -> None:
        for notice in notices:
            self._device.notify(notice)

    def _failed(self, request: Request, error: BaseException) -> Reply | None:
        """The answer to a request whose handler raised. Re-raises errors outside the request."""
        if request.number in NO_ANSWER:
            log.error("%r failed", request, exc_info=error)
            return None
        if isinstance(error, OSError):
            return encode.error(request.unique, error.errno or errno.EIO)
        if not isinstance(error, Exception):
            raise error
        log.error("%r failed", request, exc_info=error)
        return encode.error(request.unique, errno.EIO)

    async def _finish(
        self, request: Request, memo: Memo | None, rest: Awaitable[Reply | None], scope: trio.CancelScope
    ) -> None:
        unique = request.unique
        reply: Reply | None = encode.error(unique, errno.EINTR)
        with scope:
            try:
                try:
                    reply = await rest
                except Wanted:
                    assert memo is not None
                    reply = await self._anew(request, memo)
            except Exception as error:
                reply = self._failed(request, error)
            finally:
                del self._running[unique]
        if memo is not None:
            memo.close()
        self._reply(reply)
        self._latencies.end(unique, self._names.get(request.number, "unknown"))
        if self._files.deferred:
            self._files.close_deferred()

    def _interrupt(self, unique: int) -> None:
        """Handle a caller's signal. Only a caller that it kills gets EINTR: others do not expect it. The
        kernel tells of the first signal only."""
        running = self._running.get(unique)
        if running is None:
            return
        if is_being_killed(running[1]):
            running[0].cancel()
        else:
            self._nursery.start_soon(self._watch_caller, unique, *running)

    async def _watch_caller(self, unique: int, scope: trio.CancelScope, pid: int) -> None:
        while unique in self._running:
            if is_being_killed(pid):
                scope.cancel()
                return
            await trio.sleep(KILLED_SECONDS)


def _present_buffer(size: int) -> mmap.mmap:
    """A buffer for requests of a mount that outlives its daemon. All its pages are there: a process that is
    being killed gets no more, and the request that it was just reading fails with EIO (fs/fuse/dev.c,
    fuse_dev_do_read; mm/gup.c, __get_user_pages). It is shared memory, of which neither fork(2) nor
    `core.samepages` exchanges pages."""
    return mmap.mmap(-1, size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)


def _ask_again(ids: list[int]) -> list[Reply]:
    """Notices that invalidate the attributes of nodes."""
    return [notify.inval_inode(id_, -1, 0) for id_ in ids]
