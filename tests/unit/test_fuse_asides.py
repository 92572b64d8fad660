"""Calls on slow layers, made in threads: what a request gets, and who waits for a layer that hangs."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
        self.hung = 0

    def go_on(self) -> None:
        self._answers.set()

    def hang(self, fd: int) -> int:
        """A call that returns 7."""
        self.hung += 1
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
    assert slow.hung == 1
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


class Read:
    """A call that reads a file from an offset on."""

    answers = threading.Event()

    def __init__(self, layer: int, file: int, offset: int, done: list[tuple[int, int]]) -> None:
        self.layer, self.read_from, self._done = layer, (file, offset), done

    def make(self, memo: object) -> None:
        self._done.append(self.read_from)
        assert self.answers.wait(patient(60))


class Wants:
    """The memo of a request that wants one call."""

    def __init__(self, call: Read) -> None:
        self._call = call

    def wanted(self) -> list[Read]:
        return [self._call]

    def made(self, calls: list[Read]) -> None:
        assert calls == [self._call]


async def test_reads_of_one_file_are_made_in_order(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each file one at a time, those that follow in the order of the data; others do not wait for them."""
    monkeypatch.setattr(Read, "answers", threading.Event())
    begun: list[tuple[int, int]] = []
    near, far = 1 << 20, 1 << 30
    order = [(1, 0), (1, 3 * near), (1, near), (2, near), (1, 2 * near), (1, far)]
    memos: list[Any] = [Wants(Read(slow.layer.slow, *one, begun)) for one in order]
    with trio.fail_after(patient(20)):
        async with trio.open_nursery() as nursery:
            for memo in memos:
                assert not slow.asides.made_at_once(memo)
                nursery.start_soon(slow.asides.make, memo)
            while len(begun) < 3:  # noqa: ASYNC110 - threads do it
                await trio.sleep(0.01)
            await trio.sleep(0.1)
            assert sorted(begun) == [(1, 0), (1, far), (2, near)]
            Read.answers.set()
    assert len(begun) == len(order)
    assert [one for one in begun if one[0] == 1 and one[1] < far] == [
        (1, 0), (1, near), (1, 2 * near), (1, 3 * near)
    ]  # fmt: skip


async def test_many_calls_on_two_layers(slow: Slow, tmp_path: Path) -> None:
    """Each is made once, in several threads of its layer."""
    (tmp_path / "other").mkdir()
    fd = os.open(tmp_path / "other", os.O_PATH)
    other = Layer(1, str(tmp_path / "other"), fd, is_upper=False)
    other.is_slow()
    calls = Asides([slow.layer, other])
    made: list[tuple[int, int]] = []
    threads: set[int] = set()

    def note(_: int, layer: int, number: int) -> int:
        made.append((layer, number))
        threads.add(threading.get_ident())
        return number

    memo = Memo()
    wanted = [(layer, number) for layer in range(2) for number in range(30)]
    for layer, number in wanted:
        with pytest.raises(Wanted), memo:
            layercalls.call(note, (slow.fd, fd)[layer], layer, number)
    assert not calls.made_at_once(memo)
    with trio.fail_after(patient(20)):
        await calls.make(memo)
    assert sorted(made) == wanted
    assert len(threads) > 1
    with memo:
        assert layercalls.call(note, fd, 1, 29) == 29
    assert sorted(made) == wanted
    memo.close()
    os.close(fd)
