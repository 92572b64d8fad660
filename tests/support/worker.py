"""A process with another identity that runs functions for a test.

Permission checks, umask and ownership belong to a process, so a test of an ordinary user's errno needs one.
``Worker(uid=1000, gid=1000, groups=[1001])`` starts it; ``call(function, *args)`` runs a function that pickle
can name (``os.mkdir``, or one at the top of a module) in the worker and returns its result, or raises its
OSError here. A worker that does not answer in time is killed: the test's own process never hangs in a request
that a broken filesystem does not answer.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import select
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support import syscalls
from tests.support.patience import patient
from tests.support.prepared import CONTEXT, Surroundings

REPOSITORY = Path(__file__).resolve().parents[2]


class WorkerFailed(AssertionError):
    """The function raised an exception other than OSError; the text is its traceback."""


class WorkerHung(AssertionError):
    """No answer in time: the filesystem under test does not answer a request."""


def _read_exactly(fd: int, size: int, deadline: float | None) -> bytes:
    data = io.BytesIO()
    while (missing := size - data.tell()) > 0:
        if deadline is not None:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
        chunk = os.read(fd, missing)
        if not chunk:
            raise EOFError
        data.write(chunk)
    return data.getvalue()


def _receive(fd: int, deadline: float | None = None) -> Any:
    (size,) = struct.unpack("<Q", _read_exactly(fd, 8, deadline))
    return pickle.loads(_read_exactly(fd, size, deadline))


def _send(fd: int, message: object) -> None:
    data = pickle.dumps(message)
    data = struct.pack("<Q", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


class Worker:
    """A child process with the given identity (ids of the initial user namespace). ``uid`` 0 stays root."""

    def __init__(
        self,
        uid: int = 0,
        gid: int = 0,
        groups: Sequence[int] = (),
        *,
        modules: Sequence[str] = (),
        timeout: float = 20.0,
    ) -> None:
        self.uid, self.gid, self.timeout = uid, gid, patient(timeout)
        calls, self._to = CONTEXT.Pipe(duplex=False)
        self._from, answers = CONTEXT.Pipe(duplex=False)
        self._process = CONTEXT.Process(
            target=_work,
            args=(calls, answers, Surroundings.here(), (uid, gid, list(groups)), list(modules)),
            daemon=True,
        )
        self._process.start()
        for theirs in (calls, answers):
            theirs.close()

    @property
    def pid(self) -> int:
        """The child's process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the child accepts calls."""
        return self._process.is_alive()

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Send the call without waiting: ``finish`` returns the result."""
        _send(self._to.fileno(), (function, args))

    def finish(self, timeout: float | None = None) -> Any:
        """The result of the call that ``start`` sent. Raises its OSError, WorkerFailed or WorkerHung."""
        try:
            kind, value = _receive(self._from.fileno(), time.monotonic() + (timeout or self.timeout))
        except TimeoutError:
            self.kill()
            raise WorkerHung(f"no answer within {timeout or self.timeout} s") from None
        except EOFError:
            raise WorkerFailed("the worker ended unexpectedly") from None
        if kind == "ok":
            return value
        if kind == "errno":
            raise OSError(*value)
        raise WorkerFailed(value)

    def call(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> Any:
        """Run ``function(*args)`` in the worker and return its result."""
        self.start(function, *args)
        return self.finish(timeout)

    def errno(self, function: Callable[..., Any], *args: Any) -> int:
        """The errno of the call; 0 if it succeeds."""
        try:
            self.call(function, *args)
        except OSError as error:
            return error.errno or 0
        return 0

    def kill(self) -> None:
        """Kill the child; a request that is stuck in the kernel ends with it."""
        self._process.kill()

    def close(self) -> None:
        """End the child in order, or kill it after 5 s."""
        for pipe in (self._to, self._from):
            pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(5)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _become(uid: int, gid: int, groups: Sequence[int]) -> None:
    if os.geteuid() == 0:
        os.setgroups(list(groups))
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        syscalls.set_dumpable()  # /proc/self/fd is root's otherwise


def _work(
    calls: Connection,
    answers: Connection,
    surroundings: Surroundings,
    ids: tuple[int, int, list[int]],
    modules: list[str],
) -> None:
    """The child's loop. Imports the modules before it becomes that user."""
    surroundings.take()
    os.chdir("/")
    for name in modules:
        importlib.import_module(name)
    os.dup2(2, 1)
    _become(*ids)
    os.umask(0o022)
    while True:
        try:
            function, args = _receive(calls.fileno())
        except EOFError:
            return
        try:
            answer: tuple[str, Any] = ("ok", function(*args))
        except OSError as error:
            answer = ("errno", (error.errno, error.strerror))
        except Exception:
            answer = ("failed", traceback.format_exc())
        _send(answers.fileno(), answer)
