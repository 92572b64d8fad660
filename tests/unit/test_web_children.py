"""Children of the web server: their answers, their errors, and those that hang."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio

from unionfs.sys.process import children_of

pytest.importorskip("hypercorn", reason="the extra `web` is not installed")

from tests.support.sanitizer import SANITIZED
from unionfs.errors import UserError
from unionfs.web import children
from unionfs.web.children import Children

pytestmark = pytest.mark.skipif(
    SANITIZED, reason="the children's limit of memory is less than AddressSanitizer takes"
)


async def ask(action: Callable[[], Any]) -> Any:
    error = None
    async with trio.open_nursery() as nursery:
        try:
            return await Children(nursery).ask(action)
        except UserError as raised:  # the nursery goes on, as the server's
            error = raised
    raise error


def refusing(error: BaseException) -> Callable[[], Any]:
    def refuse() -> Any:
        raise error

    return refuse


async def test_answers() -> None:
    assert await ask(lambda: {"a": [1, None, "\udcff<\n"]}) == {"a": [1, None, "\udcff<\n"]}
    assert await ask(lambda: "x" * 5_000_000) == "x" * 5_000_000
    assert await ask(os.getppid) == os.getpid()
    assert await ask(lambda: sorted(map(int, os.listdir("/proc/self/fd")))[:3]) == [0, 1, 2]


@pytest.mark.parametrize(("error", "text"), [
    (UserError("the thing, the cause; the cure."), "the thing, the cause; the cure."),
    (PermissionError(13, "Permission denied", "/a\nb"), r"'/a\\nb': permission denied"),
    (MemoryError(), "too much to show"),
])  # fmt: skip
async def test_errors(error: BaseException, text: str) -> None:
    with pytest.raises(UserError, match=text):
        await ask(refusing(error))


async def test_too_much_memory_is_not_the_servers() -> None:
    with pytest.raises(UserError, match="too much to show"):
        await ask(lambda: len(bytearray(3 << 30)))


async def test_an_end_without_an_answer(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no answer"):
        await ask(lambda: os._exit(0))
    with pytest.raises(UserError, match="no answer"):
        await ask(refusing(ZeroDivisionError("what it was")))
    assert "what it was" in capfd.readouterr().err


async def test_those_that_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are killed, and as many as there may be delay, but do not stop, the next ones."""
    monkeypatch.setattr(children, "_SECONDS", 0.2)
    others = children_of(os.getpid())
    async with trio.open_nursery() as nursery:
        asked = Children(nursery)
        pids = []

        async def hang() -> None:
            with pytest.raises(UserError, match="no answer"):
                await asked.ask(partial(time.sleep, 1000))

        async with trio.open_nursery() as several:
            for _ in range(20):
                several.start_soon(hang)
            await trio.sleep(0.1)
            pids = children_of(os.getpid())
        assert await asked.ask(lambda: 1) == 1
    assert len(set(pids) - set(others)) >= children._MOST_CHILDREN
    assert set(children_of(os.getpid())) <= set(others)


async def test_places_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_QUEUE_SECONDS", 0.1)
    async with trio.open_nursery() as nursery:
        asked = Children(nursery)
        for _ in range(children._MOST_CHILDREN):
            nursery.start_soon(asked.ask, partial(time.sleep, 1000))
        await trio.sleep(0.05)
        with pytest.raises(UserError, match="too many pages"):
            await asked.ask(lambda: 1)
        nursery.cancel_scope.cancel()
