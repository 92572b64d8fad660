"""The terminal of `unionfs run`: a separate pty for the container, as with `docker run -it`."""

from __future__ import annotations

import os
import signal
import termios

import pytest

from tests.mount.cli_calls import gone, wait_for
from tests.mount.run_calls import Containers, Terminal
from tests.support.patience import patient
from unionfs.sys.process import children_of

BASH = ("/usr/bin/bash", "--norc", "--noprofile")


def test_size_and_its_changes(box: Containers) -> None:
    script = "trap 'stty size; exit' WINCH; stty size; while :; do sleep 0.05; done"
    terminal = Terminal(box, "--rm", "--", "sh", "-c", script)
    terminal.wait_for(b"31 97")
    terminal.resize(40, 120)
    terminal.wait_for(b"40 120")
    assert terminal.end() == 0


def test_nothing_written_last_is_lost(box: Containers) -> None:
    terminal = Terminal(box, "--rm", "--", "seq", "1", "60000")
    terminal.wait_for(b"\n60000\r\n")
    assert terminal.end() == 0
    # Nor while no program has the terminal open.
    script = "exec </dev/null >/dev/null 2>&1; sleep 0.5; seq 1 2000 > /dev/tty"
    terminal = Terminal(box, "--rm", "--", "sh", "-c", script)
    terminal.wait_for(b"\n2000\r\n")
    assert terminal.end() == 0


@pytest.mark.parametrize("end", ["exit", "term", "kill", "refused"])
def test_settings_are_restored(box: Containers, end: str) -> None:
    """Also when the runner is killed: by its cleanup process."""
    command = ["nothing-like-it"] if end == "refused" else ["sh", "-c", "echo up; read x; exit 3"]
    terminal = Terminal(box, "--rm", "--", *command, shell='read x; "$@"; echo code-$?; read x')
    before = terminal.settings()
    terminal.type(b"\n")
    if end != "refused":
        terminal.wait_for(b"up")
        assert wait_for(lambda: terminal.settings() != before)
        if end == "exit":
            terminal.type(b"\r")
        else:
            os.kill(child(terminal.pid), getattr(signal, f"SIG{end.upper()}"))
    code = {"exit": b"3", "term": b"143", "kill": b"137", "refused": b"127"}[end]
    terminal.wait_for(b"code-" + code)
    assert wait_for(lambda: terminal.settings() == before)
    terminal.type(b"\n")
    assert terminal.end() == 0
    assert wait_for(box.is_over)


def child(pid: int) -> int:
    """The only child of a process."""
    (found,) = children_of(pid)
    return found


def test_job_control(box: Containers) -> None:
    terminal = Terminal(box, "--rm", *box.system(), "--", *BASH)
    terminal.wait_for(b"# ")
    terminal.type(b"sleep 60\r")
    assert wait_for(lambda: terminal.runs("sleep"))
    terminal.type(b"\x1a")
    terminal.wait_for(b"Stopped")
    terminal.wait_for(b"# ")
    terminal.type(b"jobs; echo all-$((40 + 2))\r")
    terminal.wait_for(b"Stopped")
    terminal.wait_for(b"all-42")
    terminal.type(b"fg\r")
    assert wait_for(lambda: terminal.runs("sleep"))
    terminal.type(b"\x03")
    terminal.wait_for(b"# ")
    terminal.type(b"exit 7\r")
    assert terminal.end() == 7


def test_in_the_background(box: Containers) -> None:
    """The caller's shell continues and gets the typed input, until the job comes to the foreground."""
    script = "echo started; read line; echo got-$line; exit 5"
    terminal = Terminal(
        box, "--rm", "--", "sh", "-c", script,
        shell='set -m; "$@" & read line; echo shell-$line; fg; echo code-$?',
    )  # fmt: skip
    terminal.wait_for(b"started")
    before = terminal.settings()
    terminal.type(b"one\n")
    terminal.wait_for(b"shell-one")
    assert wait_for(lambda: is_raw(terminal))
    terminal.type(b"two\r")
    terminal.wait_for(b"got-two")
    terminal.wait_for(b"code-5")
    assert terminal.settings() == before
    assert terminal.end() == 0


def test_stopped_and_continued(box: Containers) -> None:
    """A shell has changed the terminal in between; in the foreground it is raw again."""
    script = "echo up; read line; echo got-$line; exit 6"
    terminal = Terminal(
        box, "--rm", "--", "sh", "-c", script,
        shell='set -m; "$@"; echo stopped-$?; stty sane; read x; fg >/dev/null; echo code-$?',
    )  # fmt: skip
    terminal.wait_for(b"up")
    assert wait_for(lambda: is_raw(terminal))
    os.kill(child(terminal.pid), signal.SIGSTOP)
    terminal.wait_for(b"stopped-147")
    assert wait_for(lambda: not is_raw(terminal))
    terminal.type(b"\n")
    assert wait_for(lambda: is_raw(terminal))
    terminal.type(b"typed\r")
    terminal.wait_for(b"got-typed")
    terminal.wait_for(b"code-6")
    assert terminal.end() == 0


def is_raw(terminal: Terminal) -> bool:
    """Whether it passes every character on as it is typed."""
    return not termios.tcgetattr(terminal.fd)[3] & termios.ICANON


@pytest.mark.parametrize(
    ("redirection", "terminals"),
    [
        ("", "012"), ("</dev/null", "12"), (">out", "02"), ("2>err", "01"), ("</dev/null >out", "2"),
        (">out 2>err", "0"), ("</dev/null >out 2>err", ""), ("</dev/null 2>err | cat", ""),
    ],
)  # fmt: skip
def test_redirections(box: Containers, redirection: str, terminals: str) -> None:
    """A file or a pipe stays one: stdout and stderr stay separate."""
    script = "for n in 0 1 2; do test -t $n && echo terminal-$n- > /data/$n; done; echo o-u-t; echo e-r-r >&2"
    terminal = Terminal(
        box, "--name", "kept", "--", "sh", "-c", script,
        shell=f'cd {box.host} && "$@" {redirection}; echo code-$?',
    )  # fmt: skip
    shown = terminal.wait_for(b"code-0")
    terminal.end()
    upper = box.root / "containers/kept/upper/data"
    assert "".join(sorted(os.listdir(upper) if upper.exists() else [])) == terminals
    for word, name in ((b"o-u-t", "out"), (b"e-r-r", "err")):
        if f">{name}" in redirection:
            assert (box.host / name).read_bytes() == word + b"\n"
            assert word not in shown
        else:
            assert word + b"\r\n" in shown


def test_the_terminal_goes_away(box: Containers) -> None:
    script = "trap 'exit 6' HUP; echo up; while :; do sleep 0.05; done"
    terminal = Terminal(box, "--rm", "--", "sh", "-c", script)
    terminal.wait_for(b"up")
    os.close(terminal.fd)
    assert wait_for(lambda: gone(terminal.pid))
    os.waitpid(terminal.pid, 0)
    assert wait_for(box.is_over)
    assert box.kept() == []


def test_nohup(box: Containers) -> None:
    """A hangup ignored by the caller is not passed on, and is not ignored in the container."""
    script = "trap 'echo hup' HUP; trap 'exit 4' TERM; echo up; kill -HUP $$; while :; do sleep 0.05; done"
    process = box.start("--rm", "--", "sh", "-c", script, prefix=["env", "--ignore-signal=HUP"])
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert process.stdout.readline() == "hup\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=patient(20))
        assert (out, process.returncode) == ("", 4)
    finally:
        process.kill()
        process.communicate()


def test_a_session_without_a_terminal(box: Containers) -> None:
    """The container does not get the caller's terminal through unconnected streams either."""
    terminal = Terminal(
        box, "--rm", "--", "sh", "-c", "echo x > /dev/tty && echo reached",
        shell='out=$("$@" </dev/null 2>&1); echo "<$out>"',
    )  # fmt: skip
    shown = terminal.wait_for(b">")
    assert b"reached" not in shown
    assert b"/dev/tty" in shown
    assert terminal.end() == 0
