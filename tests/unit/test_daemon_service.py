"""The daemon without a mount: what a failure leaves, answers, and when it ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trio

from tests.support import signals
from unionfs.daemon import lifetime
from unionfs.daemon import service as subject
from unionfs.daemon.runtime import RuntimeDirectory
from unionfs.daemon.settle import settle
from unionfs.errors import MountRefusedError, UserError
from unionfs.fuse.errors import SessionError
from unionfs.settings.mount import MountSettings
from unionfs.sys.process import start_time


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RuntimeDirectory]:
    (tmp_path / "run").mkdir(mode=0o700)
    before = os.umask(0)
    with RuntimeDirectory(str(tmp_path / "run")) as opened:
        yield opened
    os.umask(before)


@pytest.mark.parametrize("what", ["confine", "Union", "Operations"])
def test_a_failure_leaves_nothing_open(
    tmp_path: Path, directory: RuntimeDirectory, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    settings = MountSettings(
        mountpoint=str(tmp_path / "merged"), lowers=(str(tmp_path / "lower"),),
        upper=str(tmp_path / "upper"), work=str(tmp_path / "work"), read_only=False,
        session="auto", io="auto", fsname="x", subtype="unionfs",
        allow_other=False, allow_root=False, volatile=False, userxattr=True, flags=(), security=(),
        log_level="info", mounted_by=os.getuid(),
    )  # fmt: skip

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    for name in ("confine", "Union", "Operations"):
        monkeypatch.setattr(subject, name, broken if name == what else lambda *_, **__: None)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="open files"):
        subject.Service(settings, directory, lambda: None, None, foreground=True)
    assert set(os.listdir("/proc/self/fd")) == before
    assert os.listdir(tmp_path / "run") == []


@pytest.fixture
def settings(tmp_path: Path) -> MountSettings:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    return settle(
        str(tmp_path / "merged"), lowers=[str(tmp_path / "lower")], upper=str(tmp_path / "upper"),
        work=str(tmp_path / "work"), trusted_xattrs=False,
    )  # fmt: skip


Make = Callable[..., subject.Service]


@pytest.fixture
def make(
    directory: RuntimeDirectory, settings: MountSettings, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Make]:
    """Services with open layers; nothing is mounted, and this process keeps its rights."""
    monkeypatch.setattr(subject, "confine", lambda _: None)
    made = []

    def service(**changes: Any) -> subject.Service:
        found = subject.Service(
            replace(settings, **changes), directory, lambda: None, None, foreground=True
        )
        made.append(found)
        return found

    yield service
    for one in made:
        one._finish()


def test_what_a_service_leaves(make: Make, directory: RuntimeDirectory) -> None:
    """Nothing open, no lock and no entry; and that the upper is on disk. Files get the modes that they are
    made with: the kernel has applied the caller's umask."""
    before = set(os.listdir("/proc/self/fd"))
    os.umask(0o077)
    service = make()
    assert os.umask(0) == 0
    assert [name for name in directory.names() if name.startswith("mounting-")] != []
    assert service._finish() is True
    assert set(os.listdir("/proc/self/fd")) == before
    assert directory.names() == []


def _fails(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device", "/the/disk")


@pytest.mark.parametrize("volatile", [False, True])
def test_an_upper_that_cannot_be_written(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, volatile: bool
) -> None:
    """The caller that waits for the end gets the error; a volatile upper is not synced at all."""
    service = make(volatile=volatile)
    monkeypatch.setattr(subject.LayerStack, "sync_upper", _fails)
    assert service._finish() is volatile
    assert ("the upper could not be written to disk" in caplog.text) is not volatile
    monkeypatch.undo()


async def test_orders(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be carried out is a reason in the answer; a question without one gets figures."""
    service = make()

    async def sync(*_: object) -> None:
        _fails()

    async def refuse(*_: object) -> None:
        raise UserError("it is over; mount it again.")

    assert await service._answer({"order": "nonsense"}) == {"failed": "its daemon does not know that order"}
    assert await service._answer({"order": "refresh"}) == {"done": True}
    assert await service._answer({"order": "sync"}) == {"done": True}
    monkeypatch.setattr(subject, "sync", sync)
    assert await service._answer({"order": "sync"}) == {"failed": "no space left on device"}
    monkeypatch.setattr(subject, "sync", refuse)
    assert await service._answer({"order": "sync"}) == {"failed": "it is over; mount it again"}
    assert await service._answer({"order": "exchange"}) == {"failed": "it was not asked for"}
    found = await service._answer({"order": "snapshot"})
    assert "can have no snapshots: " in found["failed"] or found["done"]
    figures = await service._answer({})
    assert figures["settings"] == service._settings().to_json()
    assert (figures["device"], figures["since"], figures["ending"]) == ("", None, False)
    assert isinstance(figures["upper_fd"], int)
    assert "latencies" not in figures
    assert "latencies" in await service._answer({"watch_seconds": 1})
    json.dumps(figures)


def test_a_mount_that_is_covered(make: Make) -> None:
    """What lies at the mountpoint counts only if it is a FUSE mount."""
    serving = make()._serving
    serving.settings = replace(serving.settings, mountpoint="/proc")
    assert serving.locate() is None
    assert serving.device == ""


async def test_a_union_without_an_upper(make: Make) -> None:
    service = make(upper=None, work=None, read_only=True)
    assert (await service._answer({}))["upper_fd"] is None
    assert await service._answer({"order": "sync"}) == {"done": True}
    failed = (await service._answer({"order": "snapshot"}))["failed"]
    assert failed.endswith("can have no snapshots: it has no upper; mount it with an upper on a disk")


def test_errors_of_the_session(make: Make) -> None:
    """One sentence; before there is a mount it says how to get one."""
    service = make()
    refused = service._explained(SessionError("what happened"))
    assert isinstance(refused, MountRefusedError)
    service._serving.device = "0:99"
    for text in ("what happened", "what happened."):
        found = service._explained(SessionError(text))
        assert (type(found), str(found)) == (UserError, "what happened.")
    service._serving.device = ""


def test_the_cause_of_a_group() -> None:
    """The one that is for the user, however deep; else the first."""
    cause, other = UserError("it."), ValueError("x")
    group = BaseExceptionGroup("", [other, BaseExceptionGroup("", [other, cause])])
    assert subject._cause(group) is cause
    assert subject._cause(BaseExceptionGroup("", [BaseExceptionGroup("", [other]), KeyError()])) is other
    session = SessionError("it")
    assert subject._cause(BaseExceptionGroup("", [KeyboardInterrupt(), session])) is session


def test_layers_that_cannot_be_opened(make: Make, directory: RuntimeDirectory) -> None:
    """Since the check, which was before, they have gone; nothing is left."""
    before = set(os.listdir("/proc/self/fd"))
    for changes, name in (
        ({"lowers": ("/none",)}, "/none"), ({"upper": "/none"}, "/none"), ({"work": "/none"}, "/none"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{name} cannot be opened: no such file or directory; check"):
            make(**changes)
        assert set(os.listdir("/proc/self/fd")) == before
        assert directory.names() == []


def test_lowers_that_cannot_be_watched(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "Inotify", _fails)
    with pytest.raises(UserError, match=r"the lowers cannot be watched: .*; raise fs\.inotify\."):
        make(watch_lower=True)
    monkeypatch.undo()


class TestEnd:
    """`Lifetime`: until the mount is gone; here none is there."""

    @pytest.fixture(autouse=True)
    def _signals(self) -> Iterator[None]:
        with signals.restored(lifetime._SIGNALS):
            yield

    def made(self, settings: MountSettings, *, foreground: bool = True) -> lifetime.Lifetime:
        return lifetime.Lifetime(settings, _fails, None, foreground=foreground)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    async def test_by_a_signal(self, settings: MountSettings, number: signal.Signals) -> None:
        """One that came before is not lost; then they do not end the process."""
        lifetime.hold_signals()
        signal.pthread_kill(threading.get_ident(), number)  # a daemon has no other thread by then
        one, session = self.made(settings), trio.CancelScope()
        async with trio.open_nursery() as nursery:
            with session:
                await nursery.start(one.watch_signals, session)
                await trio.sleep_forever()
            nursery.cancel_scope.cancel()
        assert session.cancelled_caught
        assert one.is_ending
        assert signal.getsignal(number) == signal.SIG_IGN

    async def test_a_lost_terminal(self, settings: MountSettings) -> None:
        """It ends a mount in the foreground alone."""
        lifetime.hold_signals()
        one, session = self.made(settings, foreground=False), trio.CancelScope()
        went_on = False
        async with trio.open_nursery() as nursery:
            with session:
                await nursery.start(one.watch_signals, session)
                os.kill(os.getpid(), signal.SIGHUP)
                await trio.sleep(0.2)
                assert not one.is_ending
                went_on = True
                one.cut_off()
                await trio.sleep_forever()
            nursery.cancel_scope.cancel()
        assert went_on  # else the session was cancelled before
        assert one.is_ending

    async def test_with_its_owner(self, settings: MountSettings) -> None:
        """Also one that has ended before, or whose pid is another process's by now."""
        with subprocess.Popen(["sleep", "60"]) as process:  # noqa: ASYNC220
            started = start_time(process.pid)
            assert started is not None
            one, session = self.made(replace(settings, lives_with=(process.pid, started))), trio.CancelScope()
            went_on = False
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.watch_owner, session)
                with session:
                    await trio.sleep(0.2)
                    assert not one.is_ending
                    went_on = True
                    process.kill()
                    await trio.sleep_forever()
            assert went_on
            assert one.is_ending
        for owner in ((process.pid, started), (os.getpid(), 1)):
            one, session = self.made(replace(settings, lives_with=owner)), trio.CancelScope()
            with session:
                await one.watch_owner(session)
                await trio.lowlevel.checkpoint()
            assert session.cancelled_caught
        one, session = self.made(settings), trio.CancelScope()
        await one.watch_owner(session)
        assert (one.is_ending, session.cancel_called) == (False, False)
