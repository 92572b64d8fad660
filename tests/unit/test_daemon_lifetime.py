"""What a daemon does from the reason to end until its last users are cut off; nothing is mounted."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NoReturn

import pytest
import trio
from trio.testing import MockClock

from tests.support import signals
from unionfs.daemon import lifetime
from unionfs.daemon.settle import settle

SETTINGS = settle("/m", lowers=["/l"], trusted_xattrs=True)


class _Exit(BaseException):
    """The end of the process."""


class _Steps:
    """Records the steps of the end and the messages to the service manager, each with its time."""

    def __init__(self) -> None:
        self.made: list[tuple[str, float]] = []
        self.began = 0.0
        self.is_gone: bool | OSError = True
        self.on_disk = True

    def note(self, what: str) -> None:
        self.made.append((what, round(trio.current_time() - self.began, 3)))

    def unmount(self, device: str) -> bool:
        self.device = device
        if isinstance(self.is_gone, OSError):
            raise self.is_gone
        return self.is_gone

    def finish(self) -> bool:
        self.note("finish")
        return self.on_disk

    def tell(self, *states: str) -> None:
        for state in states:
            self.note(state)

    def exit(self, code: int) -> NoReturn:
        self.note(f"exit {code}")
        raise _Exit


async def _at_once(function: Callable[..., bool], *values: object, abandon_on_cancel: bool) -> bool:
    await trio.lowlevel.checkpoint()
    return function(*values)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> _Steps:
    found = _Steps()
    monkeypatch.setattr(trio.to_thread, "run_sync", _at_once)  # the clock would jump meanwhile
    monkeypatch.setattr(lifetime, "end_from_within", found.unmount)
    monkeypatch.setattr(lifetime, "close_connections", lambda: found.note("close_connections"))
    monkeypatch.setattr(lifetime.logging, "shutdown", lambda: found.note("shutdown"))
    monkeypatch.setattr(os, "_exit", found.exit)
    return found


def _made(steps: _Steps, *, device: str = "0:9", manager: bool = True) -> lifetime.Lifetime:
    told: Any = steps if manager else None
    found = lifetime.Lifetime(SETTINGS, steps.finish, told, foreground=True)
    if device:
        found.mounted(device)
    steps.began = trio.current_time()
    return found


async def _until_exit(*tasks: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(task)

    with pytest.raises(BaseExceptionGroup) as caught:
        await run()
    assert caught.group_contains(_Exit)


TOLD = [("STOPPING=1", 0), ("STATUS=Unmounting /m", 0)]


def _cut_off(seconds: float, code: int = 0) -> list[tuple[str, float]]:
    return [(step, seconds) for step in ("finish", "close_connections", "shutdown", f"exit {code}")]


IN_USE = ("STATUS=Unmounted, but in use: served for at most 60 seconds", 0.1)


async def test_users_that_do_not_finish(
    autojump_clock: MockClock, steps: _Steps, caplog: pytest.LogCaptureFixture
) -> None:
    """The exit code says whether the upper is on disk."""
    caplog.set_level(logging.INFO, lifetime.log.name)
    for on_disk, code in ((True, 0), (False, 1)):
        steps.on_disk = on_disk
        steps.made.clear()
        caplog.clear()
        one = _made(steps)
        with pytest.raises(_Exit):
            await one._end(trio.CancelScope(), "SIGTERM", 60)
        assert steps.device == "0:9"
        assert steps.made == [*TOLD, IN_USE, *_cut_off(60.1, code)]
        assert one.is_ending
        assert caplog.messages == [
            "SIGTERM: unmounting /m",
            "/m is unmounted, but in use: it is served for at most 60 seconds; another signal ends it",
            "/m is still in use: its users are cut off",
        ]


async def test_another_signal(autojump_clock: MockClock, steps: _Steps) -> None:
    """One that comes while it is unmounted is not the second one."""
    one = _made(steps, manager=False)

    async def act() -> None:
        await trio.sleep(0.05)
        one._at_once.set()
        await trio.sleep(10)
        assert steps.made == []
        await one._end(trio.CancelScope(), "a second one", 60)  # does nothing
        one.cut_off()

    await _until_exit(lambda: one._end(trio.CancelScope(), "SIGTERM", 60), act)
    assert steps.made == _cut_off(10.05)


async def test_the_owner_is_gone(
    autojump_clock: MockClock, steps: _Steps, caplog: pytest.LogCaptureFixture
) -> None:
    """It waits two seconds without a message."""
    one = _made(steps)
    with pytest.raises(_Exit):
        await one._end(trio.CancelScope(), "process 7 has ended", 2)
    assert steps.made == [*TOLD, *_cut_off(2.1)]
    assert "is served for at most" not in caplog.text


async def test_a_mount_that_is_covered(
    autojump_clock: MockClock, steps: _Steps, caplog: pytest.LogCaptureFixture
) -> None:
    """It stays where it is until the process ends."""
    steps.is_gone = False
    with pytest.raises(_Exit):
        await _made(steps)._end(trio.CancelScope(), "SIGTERM", 60)
    assert steps.made == [*TOLD, *_cut_off(2.1)]
    assert "/m is covered by another mount: it ends with the daemon" in caplog.messages


async def test_a_mount_that_cannot_be_unmounted(
    autojump_clock: MockClock, steps: _Steps, caplog: pytest.LogCaptureFixture
) -> None:
    steps.is_gone = OSError(1, "Not permitted")
    with pytest.raises(_Exit):
        await _made(steps)._end(trio.CancelScope(), "SIGTERM", 60)
    assert steps.made == [*TOLD, *_cut_off(0.1)]
    assert "unmounting failed" in caplog.messages
    assert "Not permitted" in caplog.text


async def test_an_order_to_cut_off(
    autojump_clock: MockClock, steps: _Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts the end by a signal, and nobody is waited for."""
    sent = []
    monkeypatch.setattr(os, "kill", lambda *values: sent.append(values))
    one = _made(steps)
    one.cut_off()
    assert sent == [(os.getpid(), signal.SIGTERM)]
    with pytest.raises(_Exit):
        await one._end(trio.CancelScope(), "SIGTERM", 60)
    assert steps.made == [*TOLD, *_cut_off(0.1)]


async def test_before_there_is_a_mount(autojump_clock: MockClock, steps: _Steps) -> None:
    one, session = _made(steps, device=""), trio.CancelScope()
    assert not one.is_ending
    await one._end(session, "SIGTERM", 60)
    assert session.cancel_called
    assert steps.made == TOLD
    other = trio.CancelScope()
    await one._end(other, "SIGTERM", 60)
    assert not other.cancel_called


async def test_the_session_ends_meanwhile(autojump_clock: MockClock, steps: _Steps) -> None:
    """The usual end: nobody uses the mount, so this task is cancelled."""
    with trio.move_on_after(0.05):
        await _made(steps)._end(trio.CancelScope(), "SIGTERM", 60)
    assert steps.made == TOLD


async def test_another_daemon_goes_on(autojump_clock: MockClock, steps: _Steps) -> None:
    """The answer to the order goes out first."""
    one = _made(steps)

    async def act() -> None:
        await trio.sleep(5)
        one.leave()
        await trio.sleep(1)

    await _until_exit(one.watch_leaving, act)
    assert steps.made == [("shutdown", 5.1), ("exit 0", 5.1)]


class TestSignals:
    @pytest.fixture(autouse=True)
    def _signals(self) -> Iterator[None]:
        with signals.restored(lifetime._SIGNALS):
            yield

    def test_they_are_held(self) -> None:
        lifetime.hold_signals()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= set(lifetime._SIGNALS)
        assert {signal.getsignal(number) for number in lifetime._SIGNALS} == {signal.SIG_IGN}

    async def test_two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first starts the end, with its name and a minute; the second ends the wait."""
        lifetime.hold_signals()
        steps = _Steps()
        one, session = _made(steps), trio.CancelScope()
        ends: list[tuple[object, ...]] = []
        ended = trio.Event()

        async def end(*values: object) -> None:
            await trio.lowlevel.checkpoint()
            ends.append(values)
            one._ending = True
            ended.set()

        monkeypatch.setattr(one, "_end", end)
        async with trio.open_nursery() as nursery:
            await nursery.start(one.watch_signals, session)
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(lifetime._SIGNALS)
            os.kill(os.getpid(), signal.SIGINT)
            with trio.fail_after(10):
                await ended.wait()
                assert not one._at_once.is_set()
                os.kill(os.getpid(), signal.SIGTERM)
                await one._at_once.wait()
            nursery.cancel_scope.cancel()
        assert ends == [(session, "SIGINT", 60)]
