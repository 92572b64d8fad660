"""When a daemon shares its memory with the others of its resident."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing

from tests.support.worker import REPOSITORY
from unionfs.daemon import sharing


class _Pages:
    """Stands for the pages in common; notes at which time of the clock it is asked for what."""

    def __init__(self) -> None:
        self.made: list[tuple[str, float]] = []
        self.begins, self.steps = True, 3
        self.error: OSError | None = None

    def _note(self, what: str) -> None:
        self.made.append((what, trio.current_time()))

    def begin(self) -> bool:
        self._note("begin")
        if self.error is not None:
            raise self.error
        return self.begins

    def adopt(self) -> Iterator[int]:
        for number in range(self.steps):
            self._note("step")
            yield number + 1

    def close(self) -> None:
        self._note("close")


@pytest.fixture
def pages() -> _Pages:
    return _Pages()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether this process has one thread, at each look; then it has."""
    found: list[bool] = []
    monkeypatch.setattr(sharing, "_is_alone", lambda: found.pop(0) if found else True)
    return found


async def _share(pages: Any, clock: trio.testing.MockClock) -> list[tuple[str, float]]:
    clock.autojump_threshold = 0
    began = trio.current_time()
    await sharing.share_memory(pages)
    return [(what, time - began) for what, time in pages.made]


async def test_at_the_first_try(
    pages: _Pages, threads: list[bool], autojump_clock: trio.testing.MockClock
) -> None:
    """In steps between which the loop answers."""
    answered = 0

    async def answer() -> None:
        nonlocal answered
        while True:
            await trio.lowlevel.checkpoint()
            answered += 1

    assert await _share(pages, autojump_clock) == [("begin", 2), *[("step", 2)] * 3, ("close", 2)]
    pages.steps = 20
    given: Any = pages
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        assert await sharing._adopt(given)
        nursery.cancel_scope.cancel()
    assert answered >= 2


async def test_beside_threads(
    pages: _Pages, threads: list[bool], autojump_clock: trio.testing.MockClock
) -> None:
    """It waits until worker threads have ended, also those that start meanwhile."""
    threads[:] = [False, True, True, False, True, True, True, True, True]
    found = await _share(pages, autojump_clock)
    assert found == [
        ("begin", 17), ("step", 17), ("begin", 77), ("step", 77), ("step", 77), ("step", 77), ("close", 77),
    ]  # fmt: skip


async def test_it_gives_up(
    pages: _Pages, threads: list[bool], autojump_clock: trio.testing.MockClock
) -> None:
    pages.begins = False
    found = await _share(pages, autojump_clock)
    assert found == [("begin", 2), ("begin", 17), ("begin", 77), ("close", 77)]


async def test_an_error(
    pages: _Pages,
    threads: list[bool],
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It costs memory alone."""
    caplog.set_level(logging.DEBUG, sharing.log.name)
    pages.error = OSError(12, "Cannot allocate memory")
    assert await _share(pages, autojump_clock) == [("begin", 2), ("close", 2)]
    assert caplog.messages == ["memory is not shared: [Errno 12] Cannot allocate memory"]


THREADS = """
import threading
from unionfs.daemon.sharing import _is_alone
ends = threading.Event()
thread = threading.Thread(target=ends.wait)
for step in (thread.start, ends.set):
    print(_is_alone())
    step()
thread.join()
"""


def test_the_threads_of_a_process() -> None:
    """Those of another one, since this one may have any."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\nFalse\n"
