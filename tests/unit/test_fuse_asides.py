"""Calls on slow layers, made in threads: what a request gets, and who waits for a layer that hangs."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.support.patience import patient
from unionfs.core import layercalls, marks
from unionfs.core.memo import Memo, Wanted
from unionfs.core.places import Layer
from unionfs.fuse import asides
from unionfs.fuse.asides import Asides

NOBODY = 2**22 + 1
"""Above PID_MAX_LIMIT: no process has it."""


class Slow:
    """A slow layer, whose calls wait until :meth:`go_on`."""

    def __init__(self, top: Path) -> None:
        self.path, self.fd = str(top), os.open(top, os.O_PATH)
        self.layer = Layer(0, self.path, self.fd, is_upper=False)
        self.layer.is_slow()
        self.asides = Asides([self.layer])
        self._answers = threading.Event()

    def go_on(self) -> None:
        self._answers.set()

    def hang(self, fd: int) -> int:
        """A call that returns 7."""
        assert self._answers.wait(patient(60))
        return 7

    def wants(self, function: Callable[[int], object]) -> Memo:
        """The memo of a request that needs a call."""
        memo = Memo()
        with pytest.raises(Wanted), memo:
            layercalls.call(function, self.fd)
        return memo

    def result(self, memo: Memo, function: Callable[[int], object]) -> object:
        """What the request gets when it is answered anew."""
        with memo:
            found: object = layercalls.call(function, self.fd)
        memo.close()
        return found


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Slow]:
    found = Slow(tmp_path)
    yield found
    found.go_on()
    marks.close_with(None)
    os.close(found.fd)


def seven(fd: int) -> int:
    return 7


def refuse(fd: int) -> int:
    raise OSError(errno.EACCES, "refused")


def fail(fd: int) -> int:
    raise LookupError("no error of a system call")


def test_a_quick_layer_is_waited_for(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asides, "_PATIENCE_SECONDS", 60)
    for function in (seven, refuse, fail):
        memo = slow.wants(function)
        if function is fail:
            with pytest.raises(LookupError):
                slow.asides.made_at_once(memo)
        else:
            assert slow.asides.made_at_once(memo)
            assert slow.asides.made_at_once(memo)  # it wants no more
        if function is seven:
            assert slow.result(memo, seven) == 7
        elif function is refuse:
            with pytest.raises(PermissionError):
                slow.result(memo, refuse)
        memo.close()


async def test_a_layer_that_hangs(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, others go on, and the layer is not waited for again until it has answered quickly."""
    monkeypatch.setattr(asides, "_HANGS_SECONDS", 0.01)
    memo = slow.wants(slow.hang)
    assert slow.asides.figures({}) == {"requests_aside": 0, "hung_layers": {}}
    assert not slow.asides.made_at_once(memo)
    with trio.fail_after(patient(20)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slow.asides.make, memo)
            while not slow.asides.figures({})["hung_layers"]:  # noqa: ASYNC110 - nothing tells it
                await trio.sleep(0.01)
            other = slow.wants(seven)
            assert not slow.asides.made_at_once(other)
            await slow.asides.make(other)
            assert slow.result(other, seven) == 7
            figures = slow.asides.figures({})
            assert figures["requests_aside"] == 1
            assert list(figures["hung_layers"]) == [slow.path]  # type: ignore[call-overload]
            slow.go_on()
    assert slow.result(memo, slow.hang) == 7
    assert slow.asides.figures({}) == {"requests_aside": 0, "hung_layers": {}}


def test_other_waits_are_named_too(slow: Slow) -> None:
    assert slow.asides.figures({"/a": 0.9, "/b": 5.0})["hung_layers"] == {"/b": 5.0}
    assert Asides([]).figures({"/b": 5.0}) == {}


async def test_errors(slow: Slow) -> None:
    """That of a system call is its result; any other one reaches who waits."""
    slow.asides.made_at_once(slow.wants(slow.hang))  # from now on the layer is not waited for
    memo = slow.wants(refuse)
    await slow.asides.make(memo)
    with pytest.raises(PermissionError):
        slow.result(memo, refuse)
    memo.close()
    memo = slow.wants(fail)
    with pytest.raises(LookupError):
        await slow.asides.make(memo)
    memo.close()


async def test_work_of_the_mount_waits_for_a_time(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    memo = slow.wants(slow.hang)
    with pytest.raises(TimeoutError, match=r"has not answered for 0 seconds"):
        await slow.asides.make_within(memo, 0.05)
    memo.close()
    monkeypatch.setattr(os, "fstatvfs", slow.hang)
    with pytest.raises(TimeoutError):
        await slow.asides.all_answer(0.05)
    slow.go_on()
    await slow.asides.all_answer(patient(20))


async def test_a_caller_that_is_gone(slow: Slow) -> None:
    """Its request ends, unless another process may be waiting instead."""
    memo = slow.wants(slow.hang)
    with trio.fail_after(patient(20)):
        with pytest.raises(InterruptedError):
            await slow.asides.make_for(memo, NOBODY, is_caller=True)
        for pid, is_caller in ((NOBODY, False), (0, True), (os.getpid(), True)):
            with trio.move_on_after(0.3) as waited:
                await slow.asides.make_for(memo, pid, is_caller=is_caller)
            assert waited.cancelled_caught
        slow.go_on()
        await slow.asides.make_for(memo, os.getpid(), is_caller=True)
    assert slow.result(memo, slow.hang) == 7
