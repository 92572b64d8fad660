"""Runs a handler in line, and in a task only when it must wait.

Most requests are answered without waiting, and starting a task for each would cost more than the answer. So a
session runs a handler's coroutine where it read the request. A handler that must wait calls `may_wait` before
it uses trio; the rest of it then runs in a task.

    result = begin(coroutine)               # its result, or PENDING, or its exception
    if result is PENDING:
        nursery.start_soon(finish, coroutine)

In a session that runs every request in a task, `may_wait` does nothing.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final, TypeVar, TypeVarTuple

import trio

from unionfs.core.memo import Memo

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class _Pending:
    """The result of `begin` for a coroutine that must wait."""


PENDING: Final = _Pending()
_inline = False


@types.coroutine
def _leave() -> Generator[_Pending, None, None]:
    yield PENDING


async def may_wait() -> None:
    """Declare that the handler is about to wait: the rest runs in a task."""
    if _inline:
        await _leave()


async def in_thread(function: Callable[[*_Ts], _T], *arguments: *_Ts) -> _T:
    """Run a slow function in a worker thread. It runs to its end even if the caller is cancelled."""
    await may_wait()
    return await trio.to_thread.run_sync(function, *arguments)


def begin(coroutine: Coroutine[Any, Any, _T]) -> _T | _Pending:
    """Run a coroutine to its end or its first wait. Raises its exceptions.

    RuntimeError for one that waits for trio without `may_wait`: nothing would wake it.
    """
    global _inline
    _inline = True
    try:
        trap: object = coroutine.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    finally:
        _inline = False
    if trap is not PENDING:
        coroutine.close()
        raise RuntimeError(f"{getattr(coroutine, '__qualname__', coroutine)} waits without may_wait")
    return PENDING


@types.coroutine
def finish(coroutine: Coroutine[Any, Any, _T], memo: Memo | None = None) -> Generator[Any, Any, _T]:
    """Run the rest of a coroutine for which `begin` returned PENDING, or one that has not begun; await it in
    a task. ``memo``: that of its request."""
    # `await` refuses a coroutine that has begun, so this forwards the values it yields and receives.
    step: Callable[[Any], Any] = coroutine.send
    value: Any = None
    while True:
        try:
            if memo is None:
                trap = step(value)
            else:
                with memo:
                    trap = step(value)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        try:
            value = yield trap
            step = coroutine.send
        except BaseException as error:
            value, step = error, coroutine.throw
