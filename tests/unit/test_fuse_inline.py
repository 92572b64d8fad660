"""Handlers started in line and finished in a task."""

from __future__ import annotations

import importlib.util

import pytest
import trio
import trio.lowlevel
import trio.testing

from unionfs.fuse.inline import PENDING, begin, finish, in_thread, may_wait


async def _answers(value: int) -> int:
    return value


async def _fails() -> int:
    raise FileNotFoundError(2, "gone")


def test_what_does_not_wait_is_done_at_once() -> None:
    assert begin(_answers(7)) == 7
    with pytest.raises(FileNotFoundError):
        begin(_fails())


async def test_what_runs_in_a_thread_waits() -> None:
    coroutine = in_thread(int, "7")
    assert begin(coroutine) is PENDING
    assert await finish(coroutine) == 7


def test_outside_of_begin_nothing_has_to_be_said() -> None:
    """As in a session with a task per request, after any other handler."""
    fresh = importlib.util.find_spec("unionfs.fuse.inline")
    assert fresh is not None
    assert fresh.loader is not None
    module = importlib.util.module_from_spec(fresh)
    fresh.loader.exec_module(module)
    with pytest.raises(StopIteration):
        module.may_wait().send(None)


async def test_what_waits_goes_on_in_a_task() -> None:
    order: list[str] = []

    async def handler() -> str:
        order.append("begun")
        await may_wait()
        order.append("in a task")
        await trio.lowlevel.checkpoint()
        return "result"

    coroutine = handler()
    assert begin(coroutine) is PENDING
    order.append("something else")
    assert await finish(coroutine) == "result"
    assert order == ["begun", "something else", "in a task"]


async def test_what_fails_after_waiting() -> None:
    async def handler() -> None:
        await may_wait()
        await trio.lowlevel.checkpoint()
        raise OSError(5, "late")

    coroutine = handler()
    assert begin(coroutine) is PENDING
    with pytest.raises(OSError, match="late"):
        await finish(coroutine)


async def test_waiting_means_nothing_in_an_ordinary_task() -> None:
    """As in a session with a task per request; also after a handler was started in line."""
    assert begin(_answers(1)) == 1
    await may_wait()

    async def handler() -> int:
        await may_wait()
        await may_wait()  # a second time, now in the task
        return await in_thread(lambda: 3)

    coroutine = handler()
    assert begin(coroutine) is PENDING
    assert await finish(coroutine) == 3
    assert await handler() == 3


async def test_a_failed_beginning_leaves_no_trace() -> None:
    with pytest.raises(FileNotFoundError):
        begin(_fails())
    await may_wait()  # not treated as a handler started in line


async def test_cancelling_reaches_the_handler() -> None:
    """It can clean up, and its exception propagates."""
    seen: list[str] = []

    async def handler() -> None:
        await may_wait()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            seen.append("cancelled")
            raise
        finally:
            seen.append("cleaned up")

    coroutine = handler()
    assert begin(coroutine) is PENDING
    with trio.CancelScope() as scope:
        scope.cancel()
        await finish(coroutine)
    assert scope.cancelled_caught
    assert seen == ["cancelled", "cleaned up"]


async def test_a_cancelled_handler_may_answer_all_the_same() -> None:
    async def handler() -> str:
        await may_wait()
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
        return "answer"

    coroutine = handler()
    assert begin(coroutine) is PENDING
    with trio.CancelScope() as scope:
        scope.cancel()
        assert await finish(coroutine) == "answer"


async def test_many_side_by_side() -> None:
    """Several started handlers wait for one another, and end in any order."""
    event = trio.Event()
    results: list[int] = []

    async def handler(number: int) -> int:
        await may_wait()
        await event.wait()
        return number

    async def rest(coroutine: object) -> None:
        results.append(await finish(coroutine))  # type: ignore[arg-type]

    coroutines = [handler(number) for number in range(5)]
    assert all(begin(coroutine) is PENDING for coroutine in coroutines)
    async with trio.open_nursery() as nursery:
        for coroutine in coroutines:
            nursery.start_soon(rest, coroutine)
        await trio.testing.wait_all_tasks_blocked()
        assert results == []
        event.set()
    assert sorted(results) == [0, 1, 2, 3, 4]


async def test_what_waits_without_saying_so_fails_loudly() -> None:
    """Nothing would resume it: the request would never be answered."""
    cleared: list[str] = []

    async def handler() -> None:
        try:
            await trio.lowlevel.checkpoint()
        finally:
            cleared.append("up")

    coroutine = handler()  # referenced, so that its deletion does not end it
    with pytest.raises(RuntimeError, match=r"handler waits without may_wait"):
        begin(coroutine)
    assert cleared == ["up"]
