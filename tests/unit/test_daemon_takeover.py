"""Which of its ways a daemon takes that finds a dead one; `tests/mount/test_outliving.py` runs them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unionfs.core.state import VERSION, StateError
from unionfs.daemon import takeover
from unionfs.daemon.settle import settle


class _Steps:
    """Stands for the state, the holder and the service; each says what is asked of it."""

    def __init__(self, directory: Path) -> None:
        settings = settle("/m", lowers=["/l"], trusted_xattrs=True)
        self.entry: Any = SimpleNamespace(directory=str(directory), pid=77)
        self.settings, self.state, self.holder = settings, self, "the holder's pid"
        self.died = 3, False
        self.forks = iter([True])
        self.served = True
        self.made: list[str] = []

    def fork(self, _: object) -> bool:
        self.made.append("fork")
        return next(self.forks)

    def find_free(self) -> None:
        self.made.append("find_free")

    def run(self) -> bool:
        self.made.append("run")
        return self.served

    def service(self, *_: object, holder: object, former: object, foreground: bool) -> _Steps:
        assert (holder, former, foreground) == (self, self, False)
        return self


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Steps]:
    found = _Steps(tmp_path)
    monkeypatch.setattr(takeover, "dead_daemon", lambda _: None)
    monkeypatch.setattr(takeover, "FormerDaemon", lambda _: found)

    def holder(state: object, pid: object) -> _Steps:
        assert (state, pid) == (found, found.holder)
        return found

    monkeypatch.setattr(takeover, "Holder", holder)
    monkeypatch.setattr(takeover, "Service", found.service)
    handlers = logging.getLogger().handlers[:]
    yield found
    logging.getLogger().handlers[:] = handlers


Messages = Callable[[], list[str]]


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Messages:
    """What the daemon logs, whichever handlers it has."""
    found: list[str] = []
    for level in ("warning", "critical", "exception"):
        monkeypatch.setattr(takeover.log, level, lambda text, *values: found.append(text % values))
    return lambda: found


def test_it_serves(steps: _Steps, messages: Messages) -> None:
    assert takeover.take_over(steps) == 0  # type: ignore[arg-type]
    assert steps.made == ["fork", "run"]
    assert messages() == ["daemon 77 ended (deaths: 3); this one takes over"]
    assert len(logging.getLogger().handlers) == 1  # its own
    steps.served, steps.forks = False, iter([True])
    assert takeover.take_over(steps) == 1  # type: ignore[arg-type]


def test_the_next_one_goes_the_same_way(steps: _Steps, messages: Messages) -> None:
    """A holder forks the next daemon from itself: there `fork` returns again."""
    steps.forks = iter([False, False, True])
    assert takeover.take_over(steps) == 0  # type: ignore[arg-type]
    assert steps.made == ["fork", "find_free", "fork", "find_free", "fork", "run"]


def test_one_death_too_many(steps: _Steps, messages: Messages) -> None:
    """No holder is left for another daemon."""
    steps.died = 11, True
    assert takeover.take_over(steps) == 1  # type: ignore[arg-type]
    assert steps.made == []
    assert messages() == [
        "daemon 77 died, one too many within a minute: "
        "all requests fail with EIO until the mount is unmounted"
    ]


def test_a_union_to_mount_anew(steps: _Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeover, "dead_daemon", lambda _: "what it kept")
    monkeypatch.setattr(takeover, "mount_anew", lambda *values: 5 if values == (steps, "what it kept") else 6)
    assert takeover.take_over(steps) == 5  # type: ignore[arg-type]
    assert steps.made == []


def test_the_log_of_the_dead_daemon_is_closed(
    steps: _Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is another mount's if the process has been forked from one; errors go to stderr."""
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger().addHandler(handler)

    def broken(_: object) -> None:
        raise StateError("it is too short")

    monkeypatch.setattr(takeover, "dead_daemon", broken)
    assert takeover.take_over(steps) == 2  # type: ignore[arg-type]
    assert handler not in logging.getLogger().handlers
    assert handler.stream is None
    error = "unionfs: the state of a dead daemon cannot be used: it is too short\n"
    assert capsys.readouterr().err == error


def test_an_error_is_logged(steps: _Steps, messages: Messages, monkeypatch: pytest.MonkeyPatch) -> None:
    """The callers of a dead daemon must not see it."""
    monkeypatch.setattr(takeover, "FormerDaemon", lambda _: 1 // 0)
    assert takeover.take_over(steps) == 1  # type: ignore[arg-type]
    assert messages() == ["the daemon failed"]


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert takeover.main("--version") == 0
    assert capsys.readouterr().out == f"{VERSION}\n"
    for word in ("1000000", "0"):  # no fd, and none of a state
        assert takeover.main(word) == 2
        assert capsys.readouterr().err.startswith("unionfs: the state of a dead daemon cannot be used: ")
    monkeypatch.setattr(takeover, "State", lambda fd: ("state", fd))
    monkeypatch.setattr(takeover, "take_over", lambda state: 5 if state == ("state", 12) else 6)
    assert takeover.main("12") == 5
