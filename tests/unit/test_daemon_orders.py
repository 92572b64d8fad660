"""Orders and questions to the daemon of a mount; here this process answers for one."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unionfs.daemon import orders, runtime
from unionfs.daemon.answering import listen
from unionfs.daemon.differences import follows_redirects, upper_in_memory
from unionfs.daemon.live import LiveMount
from unionfs.daemon.settle import settle
from unionfs.daemon.stats import MountGoneError, NoAnswerError, sample
from unionfs.errors import UserError
from unionfs.fuse.latency import Histogram
from unionfs.settings.features import Features
from unionfs.sys.mountinfo import mounted_at
from unionfs.sys.process import start_time


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry for one test."""
    path = tmp_path / "unionfs"
    path.mkdir(mode=0o700)
    monkeypatch.setattr(runtime, "candidates", lambda: [str(path)])
    return path


def _mount(directory: Path, pid: int | None = None) -> LiveMount:
    # A mount that exists everywhere replaces the union.
    proc = mounted_at("/proc")
    assert proc is not None
    number = os.getpid() if pid is None else pid
    settings = settle("/proc", lowers=["/usr"], trusted_xattrs=True)
    return LiveMount(
        settings, number, start_time(number) or 0, proc.device, 1.0, (), directory=str(directory)
    )


@contextmanager
def _answering(mount: LiveMount, *answers: Any) -> Iterator[Sequence[Any]]:
    """Answer the questions to a mount, one after the other; yields them."""
    with runtime.RuntimeDirectory(mount.directory) as directory:
        listener, questions = listen(directory.address(f"{mount.name}.sock")), list[Any]()

    def speak() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                questions.append(json.loads(connection.recv(4096)))
                connection.sendall(json.dumps(answer).encode())

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    with listener:
        yield questions
        thread.join(10)


def test_orders_in_questions() -> None:
    assert orders.order_in({"order": "sync"}) == "sync"
    assert orders.order_in({}) is orders.order_in({"order": 1}) is None


def test_an_order_that_is_carried_out(directory: Path) -> None:
    mount = _mount(directory)
    with _answering(mount, orders.done()) as questions:
        orders.give(mount, "sync", "written", "try again")
    assert questions == [{"order": "sync"}]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (orders.failed("the disk is full"), "/proc cannot be written: the disk is full; make room."),
        (orders.failed("it is over; wait"), "/proc cannot be written: it is over; wait."),
        ({"done": 1}, "(pid {pid}) is of an earlier version; mount it again."),
        ({"failed": 1}, "(pid {pid}) is of an earlier version; mount it again."),
    ],
)
def test_an_order_that_is_not(directory: Path, answer: dict[str, Any], text: str) -> None:
    mount = _mount(directory)
    with _answering(mount, answer), pytest.raises(UserError) as caught:
        orders.give(mount, "sync", "written", "make room")
    assert str(caught.value).startswith("/proc cannot be written: ")
    assert str(caught.value).endswith(text.format(pid=os.getpid()))


def test_an_order_to_nobody(directory: Path) -> None:
    for give in (
        lambda mount: orders.give(mount, "sync", "written", "try again"),
        lambda mount: orders.ask_for(mount, {"order": "snapshot"}),
    ):
        with pytest.raises(
            UserError, match=rf"/proc.*its daemon \(pid {os.getpid()}\) ended or does not answer"
        ):
            give(_mount(directory))


def test_an_order_with_an_answer(directory: Path) -> None:
    mount, question = _mount(directory), {"order": "snapshot", "name": "a"}
    with _answering(
        mount, {"done": True, "name": "a"}, *(orders.failed(why) for why in ("no", "no; do"))
    ) as asked:
        assert orders.ask_for(mount, question) == {"done": True, "name": "a"}
        with pytest.raises(UserError, match=r"^/proc cannot change its layers: no; try again\.$"):
            orders.ask_for(mount, question)
        with pytest.raises(UserError, match=r"^no; do\.$"):
            orders.ask_for(mount, question)
    assert asked == [question] * 3


def test_the_daemon_after_an_exchange(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one with the same device; it is waited for."""
    mount = _mount(directory)
    mount.save()
    with subprocess.Popen(["sleep", "60"]) as other, subprocess.Popen(["sleep", "60"]) as stranger:
        elsewhere = mounted_at("/dev") or mounted_at("/")
        assert elsewhere is not None
        replace(_mount(directory, stranger.pid), device=elsewhere.device, since=0.0).save()
        threading.Timer(0.2, _mount(directory, other.pid).save).start()
        try:
            with _answering(mount, orders.done()) as questions:
                assert orders.exchange(mount) == other.pid
            assert questions == [{"order": "exchange"}]
        finally:
            other.kill()
            stranger.kill()
    monkeypatch.setattr(orders, "_EXCHANGE_SECONDS", 0.2)
    with (
        _answering(mount, orders.done()),
        pytest.raises(UserError, match=r"/proc has no new daemon after 0 seconds; see the log\."),
    ):
        orders.exchange(mount)


def test_an_exchange_that_is_refused(directory: Path) -> None:
    mount = _mount(directory)
    with _answering(mount, orders.failed("it has no holder")), pytest.raises(UserError) as caught:
        orders.exchange(mount)
    assert str(caught.value) == ("/proc cannot be upgraded: it has no holder; unmount it and mount it again.")


def test_the_upper_in_memory(directory: Path) -> None:
    """By its daemon's fd, if it says one."""
    mount = _mount(directory)
    with _answering(mount, {"upper_fd": 7}, {"upper_fd": None}, {}):
        assert upper_in_memory(mount) == f"/proc/{os.getpid()}/fd/7"
        for _ in range(2):
            with pytest.raises(UserError, match="only it can reach an upper in memory"):
                upper_in_memory(mount)
    with pytest.raises(UserError, match="does not answer"):
        upper_in_memory(mount)


@pytest.mark.parametrize(
    ("redirects", "in_user_xattrs", "in_trusted_xattrs"),
    [(None, False, True), ("on", True, True), ("follow", True, True), ("off", False, True),
     ("nofollow", False, False)],
)  # fmt: skip
def test_whose_redirects_are_read(
    redirects: str | None, in_user_xattrs: bool, in_trusted_xattrs: bool
) -> None:
    settings = settle("/m", lowers=["/l"], trusted_xattrs=True)
    settings = replace(settings, features=Features(redirect_dir=redirects))
    assert follows_redirects(settings) == in_trusted_xattrs
    assert follows_redirects(replace(settings, userxattr=True)) == in_user_xattrs


ANSWER = {
    "clock_ns": 5, "settings": {"session": "direct", "io": "hybrid"},
    "figures": {"requests": {"lookup": 3}, "nodes": 1}, "latencies": {"lookup": Histogram().to_json()},
}  # fmt: skip


def test_a_sample(directory: Path) -> None:
    mount = _mount(directory)
    with _answering(mount, ANSWER) as questions:
        found = sample(mount, 2.5)
    assert questions == [{"watch_seconds": 2.5}]
    assert (found.clock_ns, found.session, found.io) == (5, "direct", "hybrid")
    assert (found.requests, found.figures) == ({"lookup": 3}, {"nodes": 1})
    assert found.latencies["lookup"].count == 0


@pytest.mark.parametrize("name", [*ANSWER, "requests", "session"])
def test_a_sample_of_another_version(directory: Path, name: str) -> None:
    """Of which something is missing, or is something else."""
    mount = _mount(directory)
    answers: list[Any] = [json.loads(json.dumps(ANSWER)) for _ in range(2)]
    for answer in answers:
        place = {"requests": answer["figures"], "session": answer["settings"]}.get(name, answer)
        if answer is answers[0]:
            del place[name]
        elif name != "session":
            place[name] = "x"
        else:
            answer["settings"] = 3
    with _answering(mount, *answers):
        for _ in answers:
            with pytest.raises(UserError, match=rf"/proc \(pid {os.getpid()}\) is of another version"):
                sample(mount, 1)


def test_why_there_is_no_sample(directory: Path) -> None:
    """The mount is gone, its daemon has died, or does not answer."""
    mount = _mount(directory)
    with pytest.raises(NoAnswerError, match="does not answer; it is stopped, or waits"):
        sample(mount, 1)
    with pytest.raises(UserError, match="has died; run `unionfs cleanup /proc`") as caught:
        sample(replace(mount, started=mount.started + 1), 1)
    assert type(caught.value) is UserError
    with pytest.raises(MountGoneError, match="/proc is not mounted any more"):
        sample(replace(mount, device="0:0"), 1)
