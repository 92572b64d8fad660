"""Which layers are asked whether their server answers, and what a caller can interrupt."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.hung_calls import Server, prepare
from tests.support.patience import patient
from unionfs.daemon import silent
from unionfs.daemon.caller import CALLER
from unionfs.errors import UserError
from unionfs.sys.process import children_of


def test_the_layers_of_a_union() -> None:
    assert list(silent.layers_of(["/a", "/b"], "/u", "/w")) == [
        ("lower", "/a"), ("lower", "/b"), ("upper", "/u"), ("work", "/w"),
    ]  # fmt: skip
    assert list(silent.layers_of(["/a"], None, None)) == [("lower", "/a"), ("upper", ""), ("work", "")]


def test_what_lies_below_a_mountpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As realpath(3) finds it, but without a request below the mountpoint, which need not exist here."""
    (tmp_path / "dir").mkdir()
    for name, target in (
        ("absolute", "/remote/x"), ("relative", "dir/../away"), ("away", "../" * 20 + "remote"),
        ("inside", "dir"), ("loop", "loop"), ("dot", "./dir/.//.."),
    ):  # fmt: skip
        (tmp_path / name).symlink_to(target)
    place, remote = str(tmp_path), {"/remote"}

    def lies(path: str, mountpoints: set[str] = remote) -> bool:
        return silent._lies_below(path, mountpoints)

    for path in (
        "/remote", "/remote/", "/remote/a/b", "//remote", "/x/../remote", f"{place}/absolute",
        f"{place}/absolute/more", f"{place}/relative", f"{place}/away", f"{place}/inside/../away",
    ):  # fmt: skip
        assert lies(path), path
    for path in (
        "/", "/remotely", "/remote/..", "/remo/te", f"{place}/dir", f"{place}/inside", f"{place}/dot",
        f"{place}/loop", f"{place}/none", "/x/remote",
    ):  # fmt: skip
        assert not lies(path), path
    assert lies("/any", {"/"})
    assert lies(f"{place}/dot/dir/x", {f"{place}/dir"})
    assert lies(f"{place}/dot", {f"{place}/dir"})  # the way leads through it
    assert not lies("/zero\0byte")
    monkeypatch.chdir(tmp_path)
    assert lies("absolute")
    assert lies("dir", {place})
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert not lies("relative")


def test_many_links(tmp_path: Path) -> None:
    """As many as the kernel follows: MAXSYMLINKS, include/linux/namei.h."""
    (tmp_path / "0").symlink_to("/remote")
    for number in range(1, 41):
        (tmp_path / str(number)).symlink_to(str(number - 1))
    assert silent._lies_below(f"{tmp_path}/39", {"/remote"})
    assert not silent._lies_below(f"{tmp_path}/40", {"/remote"})


def test_a_process_that_asks_ends_with_its_parent(tmp_path: Path) -> None:
    """It asks nothing if that has ended before the kernel was told to signal it."""
    for parent, answered in ((os.getpid(), True), (1, False)):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                silent._ask([str(tmp_path)], writer, parent)
            finally:
                os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        with open(reader, "rb") as answers:
            assert (answers.read() != b"") is answered


def test_nothing_is_left_of_one_that_has_answered(tmp_path: Path) -> None:
    others = set(children_of(os.getpid()))
    with silent._asking([str(tmp_path)]) as reader:
        (pid,) = set(children_of(os.getpid())) - others
        assert os.read(reader, 2) != b""
        assert os.read(reader, 2) == b""
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, 0)


def test_interruptible_within_the_context() -> None:
    """Only where Ctrl-C raised KeyboardInterrupt before."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with silent.interruptible():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for other in (signal.SIG_IGN, lambda *_: None):
        before = signal.signal(signal.SIGINT, other)
        try:
            with silent.interruptible():
                assert signal.getsignal(signal.SIGINT) == other
            assert signal.getsignal(signal.SIGINT) == other
        finally:
            signal.signal(signal.SIGINT, before)
    with pytest.raises(ValueError, match="within"), silent.interruptible():
        raise ValueError("within")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def served(root: None, area: Path) -> Iterator[Server]:
    prepare(area)
    server = Server(area / "source", area / "served")
    try:
        yield server
    finally:
        server.go_on()
        server.end()


def _children() -> set[str]:
    return set(map(str, children_of(os.getpid())))


def test_layers_that_answer(served: Server, area: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The child that has asked is gone, and nothing of it is open; what does not exist is not waited for."""
    fds, children = os.listdir("/proc/self/fd"), _children()
    silent.await_layers([("lower", str(area / "served")), ("upper", str(area / "served/none")), ("work", "")])
    silent.await_layers([("lower", "/usr"), ("upper", ""), ("work", "")])
    silent.await_layers([])
    assert os.listdir("/proc/self/fd") == fds
    while left := _children() - children:
        os.waitpid(int(left.pop()), 0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("order", [1, -1])
def test_the_layer_that_does_not_answer_is_named(
    served: Server, area: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    """Once; the ones that the same server shows wait with it."""
    monkeypatch.setattr(silent, "_TELL_SECONDS", 0.1)
    served.stop()
    threading.Timer(patient(1), served.go_on).start()
    layers = [("lower", str(area / "served/a")), ("upper", str(area / "served/b")), ("work", "/usr")][::order]
    silent.await_layers(layers)
    role, path = layers[0] if order == 1 else layers[1]
    assert capfd.readouterr().err.startswith(f"unionfs: the {role} {path} has not answered for 0 seconds; ")


def test_the_first_that_does_not_answer_is_named(
    served: Server, area: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those before it, which another server has shown."""
    monkeypatch.setattr(silent, "_TELL_SECONDS", patient(0.5))
    (area / "other").mkdir()
    other = Server(area / "source", area / "other")
    try:
        served.stop()
        threading.Timer(patient(2), served.go_on).start()
        layers = [("lower", str(area / "other")), ("lower", "/usr"), ("lower", str(area / "other/only"))]
        silent.await_layers([*layers, ("upper", str(area / "served")), ("work", str(area / "other"))])
        lines = capfd.readouterr().err.splitlines()
        assert [line.partition(" has not")[0] for line in lines] == [f"unionfs: the upper {area}/served"]
    finally:
        other.end()


def test_a_child_that_is_killed(served: Server, area: Path) -> None:
    """It is not waited for any more: whatever is wrong, the caller finds out."""
    children = _children()

    def kill() -> None:
        for child in _children() - children:
            os.kill(int(child), signal.SIGKILL)

    served.stop()
    threading.Timer(patient(0.5), kill).start()
    silent.await_layers([("lower", str(area / "served"))])


def test_a_launcher_that_ends(served: Server, area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its call is not waited for."""
    here, there = socket.socketpair()
    monkeypatch.setattr(CALLER, "_launcher", here)
    served.stop()
    with here:
        there.close()
        with pytest.raises(
            UserError, match=f"waiting for the lower {area}/served was interrupted; try again"
        ):
            silent.await_layers([("lower", str(area / "served"))])
