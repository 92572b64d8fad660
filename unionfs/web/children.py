"""Work in child processes: the server has one thread, and itself touches no storage, which may hang."""

from __future__ import annotations

import json
import os
import resource
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

import trio

from unionfs.errors import UserError, reason_at
from unionfs.sys.calls import PR_SET_PDEATHSIG, prctl
from unionfs.sys.fds import Owned

_MOST_CHILDREN: Final = 8
_MOST_BYTES: Final = 16 << 20
_MOST_MEMORY: Final = 2 << 30
_QUEUE_SECONDS: Final = 5.0
_SECONDS: Final = 20.0


def start_child(action: Callable[[int], object]) -> tuple[int, int]:
    """Fork a child that calls `action` with the fd of a pipe, and ends. Returns its pid and the other end.

    The child has no other fds but the standard ones, and is killed when this process ends. Call it while the
    process has one thread. Raises OSError.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError:
        os.close(reader)
        os.close(writer)
        raise
    if pid:
        os.close(writer)
        return pid, reader
    code = 1
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.closerange(3, writer)
        os.closerange(writer + 1, 2**31 - 1)
        if os.getppid() == parent:
            action(writer)
        code = 0
    except BrokenPipeError:
        pass  # the server has ended
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="backslashreplace"))
    finally:
        os._exit(code)


class Children:
    """Asks functions in children, a few at a time."""

    def __init__(self, nursery: trio.Nursery) -> None:
        """`nursery`: for children that are killed and have not ended yet."""
        self._nursery = nursery
        self._free = trio.Semaphore(_MOST_CHILDREN)

    async def ask(self, action: Callable[[], Any]) -> Any:
        """Return what `action` returns in a child, as a JSON value. Raises UserError, its own or another."""
        with trio.move_on_after(_QUEUE_SECONDS) as queued:
            await self._free.acquire()
        if queued.cancelled_caught:
            raise UserError("too many pages wait for storage that does not answer; try again later.")
        data = bytearray()
        try:
            pid, reader = start_child(partial(_answer, action))
        except BaseException:
            self._free.release()
            raise
        pidfd = os.pidfd_open(pid)
        try:
            with trio.move_on_after(_SECONDS):
                async with trio.lowlevel.FdStream(reader) as pipe:
                    async for chunk in pipe:
                        data += chunk
                        if len(data) > _MOST_BYTES:
                            break
        finally:
            self._nursery.start_soon(self._end, pid, pidfd)
        try:
            answer = json.loads(data)
        except ValueError:
            raise UserError(
                f"there is no answer within {_SECONDS:.0f} seconds: the storage hangs, or there is too much "
                "to show; the command line has no such limit."
            ) from None
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["value"]

    async def _end(self, pid: int, pidfd: int) -> None:
        """Kill a child, and wait for its end: in a system call that hangs, it holds its place until then."""
        with Owned(pidfd):
            os.kill(pid, signal.SIGKILL)
            await trio.lowlevel.wait_readable(pidfd)
            _reap(pid)
            self._free.release()


def _reap(pid: int) -> None:
    """Forget a child that has ended."""
    os.waitpid(pid, os.WNOHANG)


def _answer(action: Callable[[], Any], writer: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = _MOST_MEMORY if hard == resource.RLIM_INFINITY else min(hard, _MOST_MEMORY)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        answer = {"value": action()}
    except UserError as error:
        answer = {"error": str(error)}
    except OSError as error:
        answer = {"error": f"{reason_at(error)}; check the permissions."}
    except MemoryError:
        answer = {"error": "there is too much to show on a page; use the command line."}
    with open(writer, "wb") as pipe:
        pipe.write(json.dumps(answer).encode("ascii"))
