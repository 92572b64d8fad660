"""Where the launcher is looked for, and what it is given."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from unionfs.daemon import launcher
from unionfs.errors import UserError


@pytest.mark.parametrize("program", ["-c", "", "unionfs"])
def test_not_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    planted = tmp_path / launcher.NAME
    planted.write_text("#!/bin/sh\n")
    planted.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNIONFS_RESIDENT_SECONDS", raising=False)
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys, "executable", "")
    assert launcher.find() is None
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "unionfs")])
    assert launcher.find() == str(planted)


@pytest.mark.parametrize(("seconds", "is_found"), [("0", False), ("1", True), ("", True), ("00", True)])
def test_a_user_who_wants_no_resident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: str, is_found: bool
) -> None:
    (tmp_path / launcher.NAME).write_text("#!/bin/sh\n")
    (tmp_path / launcher.NAME).chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "unionfs")])
    monkeypatch.setenv("UNIONFS_RESIDENT_SECONDS", seconds)
    assert (launcher.find() is not None) == is_found


def test_beside_the_script_or_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script first, where a link to it leads; only what can be executed."""
    monkeypatch.delenv("UNIONFS_RESIDENT_SECONDS", raising=False)
    for name in ("script", "python", "links"):
        (tmp_path / name).mkdir()
        (tmp_path / name / launcher.NAME).write_text("#!/bin/sh\n")
        (tmp_path / name / launcher.NAME).chmod(0o755)
    (tmp_path / "script/unionfs").touch()
    (tmp_path / "links/unionfs").symlink_to(tmp_path / "script/unionfs")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "links/unionfs")])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python/python3"))
    assert launcher.find() == str(tmp_path / "script" / launcher.NAME)
    (tmp_path / "script" / launcher.NAME).chmod(0o644)
    assert launcher.find() == str(tmp_path / "python" / launcher.NAME)
    (tmp_path / "python" / launcher.NAME).unlink()
    assert launcher.find() is None


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """In place of the launcher: it runs its arguments in a shell."""
    path = tmp_path / launcher.NAME
    path.write_text('#!/bin/sh\neval "$1"\n')
    path.chmod(0o755)
    return path


def test_calls_that_are_handed_over(program: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All at once; what they say is shown, and nothing else of them."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    fds = os.listdir("/proc/self/fd")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        launcher.hand_over(
            str(program), [[f"echo one >{fifo}"], [f"cat {fifo} >&2; echo two >&2; echo three"], ["cat"]]
        )
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) - before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert blocked == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    assert capfd.readouterr() == ("", "one\ntwo\n")
    assert os.listdir("/proc/self/fd") == fds


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("echo 'unionfs: it is busy.' >&2; exit 1", "it is busy."),
        ("echo 'odd: it is busy.' >&2; exit 3", "odd: it is busy."),
        ("exit 1", "the mount failed without a reason; try again."),
        ("kill -9 $$", "the mount failed without a reason; try again."),
    ],
)
def test_a_call_that_fails(program: Path, tmp_path: Path, command: str, text: str) -> None:
    """After the others have ended; signals arrive again."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(UserError) as caught:
        launcher.hand_over(str(program), [[command], [f"sleep 0.2; touch {tmp_path}/done"]])
    assert str(caught.value) == text
    assert (tmp_path / "done").exists()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_call_that_is_interrupted(program: Path, number: signal.Signals) -> None:
    """The launcher gets to know it once; it says why the mount failed."""
    received: list[int] = []
    before = signal.signal(number, lambda found, _: received.append(found))
    command = "trap 'echo \"unionfs: interrupted.\" >&2; exit 1' TERM; while :; do sleep 0.05; done"
    # To this thread, as in a process without others.
    timer = threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), number))
    timer.start()
    try:
        with pytest.raises(UserError, match=r"^interrupted\.$"):
            launcher.hand_over(str(program), [[command]])
    finally:
        timer.join()
        signal.signal(number, before)
    assert received == [number]
