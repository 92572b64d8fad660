"""A launcher's call, over the socket between the two; each is served in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from unionfs.daemon import handover
from unionfs.daemon.caller import CALLER, MustRunThere
from unionfs.daemon.handover import OUTDATED, Run, serve

IDENTITY = "version 1"
MAGIC = 0x31534655


def header(text: bytes, arguments: int, variables: int, *, magic: int = MAGIC, umask: int = 0o022) -> bytes:
    return struct.pack("=5I", magic, len(text), arguments, variables, umask) + text


def call(
    *words: str, identity: str = IDENTITY, umask: int = 0o022, more: Mapping[str, str] | None = None
) -> bytes:
    """What a launcher sends: with this process's environment and more."""
    variables = {**(more or {}), **os.environ, **(more or {})}
    parts = [identity, *words, *(f"{name}={value}" for name, value in variables.items())]
    text = b"".join(os.fsencode(part) + b"\0" for part in parts)
    return header(text, len(words), len(variables), umask=umask)


class Process:
    """The process that serves a call."""

    def __init__(
        self,
        run: Run = lambda *_: 0,
        *,
        before: Callable[[], object] = lambda: None,
        is_current: bool = True,
    ) -> None:
        self.launcher, connection = socket.socketpair()
        self.launcher.settimeout(60)
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                self.launcher.close()
                before()
                code = serve(connection, IDENTITY, run, None, lambda: is_current)
            finally:
                os._exit(code)
        connection.close()

    def accepted(self, sent: bytes) -> int:
        """Send a call, which it accepts; returns its pidfd."""
        self.launcher.sendall(sent)
        answer, fds, _, _ = socket.recv_fds(self.launcher, 1, 1)
        assert answer == b"A"
        return fds[0]

    def go(self, directory: Path, files: Sequence[int], word: bytes = b"G") -> None:
        fd = os.open(directory, os.O_PATH)
        socket.send_fds(self.launcher, [word], [fd, *files])
        os.close(fd)

    def rest(self) -> bytes:
        """All that it still says. What it has not read resets the connection (net/unix/af_unix.c)."""
        found = b""
        with suppress(ConnectionResetError):
            while more := self.launcher.recv(64):
                found += more
        return found

    def end(self) -> tuple[bytes, int]:
        """All that it still says, and its exit code."""
        said = self.rest()
        self.launcher.close()
        return said, os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def answered(sent: bytes, **more: Any) -> tuple[bytes, int]:
    process = Process(**more)
    with suppress(BrokenPipeError):  # what is refused by its header is not read
        process.launcher.sendall(sent)
        process.launcher.shutdown(socket.SHUT_WR)
    return process.end()


class Files:
    """Standard files of a launcher."""

    def __init__(self, place: Path) -> None:
        self.place = place
        (place / "in").write_text("input")
        self.fds = [os.open(place / "in", os.O_RDONLY)]
        self.fds += [os.open(place / name, os.O_WRONLY | os.O_CREAT) for name in ("out", "err")]

    def close(self) -> tuple[str, str]:
        """What has been written."""
        for fd in self.fds:
            os.close(fd)
        return (self.place / "out").read_text(), (self.place / "err").read_text()


def done(place: Path, sent: bytes, **more: Any) -> tuple[bytes, int, str, str]:
    """Its last words and its exit code, and what a call wrote that goes on."""
    files, process = Files(place), Process(**more)
    os.close(process.accepted(sent))
    process.go(place, files.fds)
    said, code = process.end()
    return said, code, *files.close()


def _report(program: str, arguments: Sequence[str]) -> int:
    launcher = CALLER.launcher
    umask = os.umask(0)
    state = {
        "program": program, "arguments": list(arguments), "directory": os.getcwd(), "umask": umask,
        "input": sys.stdin.read(), "mark": os.environ.get("MARK"), "left": os.environ.get("LEFT"),
        "number": os.environ.get("NUMBER"), "timeout": "none" if launcher is None else launcher.gettimeout(),
        "terminates": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "files": resource.getrlimit(resource.RLIMIT_NOFILE), "fds": len(os.listdir("/proc/self/fd")),
        "zone": time.tzname[0], "name": Path("/proc/self/comm").read_text(),
    }  # fmt: skip
    print(json.dumps(state))
    print("warned", file=sys.stderr, end="")
    return 7


def test_a_call_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has what the launcher has, and nothing of the process that forked it."""

    def before() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.environ["LEFT"], os.environ["NUMBER"], os.environ["TZ"] = "of the resident", "1", "UTC"
        os.umask(0)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft // 2, hard))

    monkeypatch.delenv("LEFT", raising=False)
    more = {"MARK": "here", "NUMBER": "2", "TZ": "XYZ-3"}
    fds = len(os.listdir("/proc/self/fd")) + 4  # the connection, and the files that this process has for it
    said, code, out, err = done(
        tmp_path, call("/a/unionfs", "mount", "x y", umask=0o027, more=more), run=_report, before=before
    )
    assert (said, code, err) == (b"R\7", 0, "warned")
    assert json.loads(out) == {
        "program": "unionfs", "arguments": ["mount", "x y"], "directory": str(tmp_path), "umask": 0o027,
        "input": "input", "mark": "here", "left": None, "number": "2", "timeout": None, "terminates": True,
        "files": list(resource.getrlimit(resource.RLIMIT_NOFILE)), "fds": fds, "zone": "XYZ",
        "name": "unionfs\n",
    }  # fmt: skip


def test_lines_of_stderr_are_written_at_once(tmp_path: Path) -> None:
    """The caller waits, and sees bytes that are not valid text."""

    def run(*_: object) -> int:
        print("f\udcff", file=sys.stderr)
        return (tmp_path / "err").read_text() == "f\\udcff\n"

    assert done(tmp_path, call("unionfs"), run=run)[0] == b"R\1"


def test_the_process_is_the_one_of_the_pidfd(tmp_path: Path) -> None:
    """The launcher sends it signals by it."""
    process = Process()
    pidfd = process.accepted(call("unionfs"))
    assert f"Pid:\t{process.pid}\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    assert process.end() == (b"", -signal.SIGKILL)


def _fails(*_: object) -> int:
    raise ValueError("what went wrong")


def _must_run_there(*_: object) -> int:
    raise MustRunThere


def test_commands_that_fail(tmp_path: Path) -> None:
    """An exception ends as in a process of its own: with a traceback."""
    said, code, _, err = done(tmp_path, call("unionfs"), run=_fails)
    assert (said, code) == (b"R\1", 0)
    assert err.startswith("Traceback")
    assert err.endswith("ValueError: what went wrong\n")


def test_a_command_for_the_launcher_s_own_process(tmp_path: Path) -> None:
    assert done(tmp_path, call("unionfs"), run=_must_run_there) == (b"N", 0, "", "")


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    """As in a full filesystem: the launcher gets to know how the command ended."""

    def run(*_: object) -> int:
        print("lost")
        return 3

    files = Files(tmp_path)
    os.close(files.fds[1])
    files.fds[1] = os.open("/dev/full", os.O_WRONLY)
    process = Process(run)
    os.close(process.accepted(call("unionfs")))
    process.go(tmp_path, files.fds)
    assert process.end() == (b"R\3", 0)
    files.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        call("unionfs")[:19],
        call("unionfs")[:-1],
        header(b"version 1\0a\0X=1\0", 1, 1, magic=MAGIC + 1),
        struct.pack("=5I", MAGIC, (16 << 20) + 1, 1, 0, 0),
        header(b"version 1\0X=1\0", 0, 1),
        header(b"version 1\0a\0X=1\0", 1, 0),
        header(b"version 1\0a\0X=1\0", 1, 2),
        header(b"version 1\0a\0X=1\0", 2, 1),
        header(b"version 1\0", 0, 0),
    ],
    ids=range(10),
)  # fmt: skip
def test_what_is_no_call(sent: bytes) -> None:
    """Nothing is answered: the launcher runs the call itself."""
    assert answered(sent) == (b"", 0)


def test_a_long_call(tmp_path: Path) -> None:
    """It comes in pieces."""
    words = ["x" * 100_000 for _ in range(20)]
    said, _, out, _ = done(tmp_path, call("unionfs", *words), run=_report)
    assert said == b"R\7"
    assert json.loads(out)["arguments"] == words


def test_the_longest_call(tmp_path: Path) -> None:
    """16 MiB; a longer one is none."""
    room = (16 << 20) - (len(call("unionfs", "")) - 20)
    assert done(tmp_path, call("unionfs", "x" * room))[0] == b"R\0"
    assert answered(call("unionfs", "x" * (room + 1))) == (b"", 0)


def test_a_header_in_pieces(tmp_path: Path) -> None:
    files, process = Files(tmp_path), Process(_report)
    process.launcher.sendall(call("unionfs", "a")[:10])
    time.sleep(0.05)
    os.close(process.accepted(call("unionfs", "a")[10:]))
    process.go(tmp_path, files.fds)
    assert process.end() == (b"R\7", 0)
    assert json.loads(files.close()[0])["arguments"] == ["a"]


def test_other_versions() -> None:
    """Of the launcher, or of the files on disk: the resident is to end."""
    assert answered(call("unionfs", identity="version 2")) == (b"S", OUTDATED)
    assert answered(call("unionfs"), is_current=False) == (b"S", OUTDATED)


@pytest.mark.parametrize("name", ["PYTHONOPTIMIZE", "LD_PRELOAD", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_only_a_new_process_reads(name: str) -> None:
    assert answered(call("unionfs", more={name: "1"})) == (b"N", 0)


@pytest.mark.parametrize(
    ("words", "is_alike"),
    [
        ({"LC_ALL": "C"}, True), ({"LC_ALL": "POSIX"}, True), ({"LC_ALL": "de_DE.utf8"}, True),
        ({"LC_ALL": "de_DE.UTF-8"}, True), ({"LC_ALL": "de_DE.ISO-8859-1"}, False),
        ({"LC_CTYPE": "de_DE"}, False), ({"LANG": "de_DE"}, False),
        ({"LC_ALL": "", "LC_CTYPE": "", "LANG": ""}, True),
        ({"LC_ALL": "C", "LC_CTYPE": "de_DE"}, True), ({"LC_CTYPE": "C.UTF-8", "LANG": "de_DE"}, True),
    ],
)  # fmt: skip
def test_the_encoding_of_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, str], is_alike: bool
) -> None:
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        monkeypatch.delenv(name, raising=False)
    sent = call("unionfs", more=words)
    if is_alike:
        assert done(tmp_path, sent)[0] == b"R\0"
    else:
        assert answered(sent) == (b"N", 0)


def test_other_rights(root: None) -> None:
    """They cannot be had: here the launcher has more."""
    assert answered(call("unionfs"), before=lambda: os.setgroups([*os.getgroups(), 4711])) == (b"N", 0)


def test_what_cannot_be_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a hard limit, if the process may not raise it."""

    def unreachable(_: int) -> None:
        raise PermissionError(1, "out of reach")

    monkeypatch.setattr(handover, "take_over", unreachable)
    assert answered(call("unionfs")) == (b"N", 0)


@pytest.mark.parametrize("word", [b"", b"X"])
def test_a_launcher_that_does_not_go_on(tmp_path: Path, word: bytes) -> None:
    """It runs the call itself."""
    files, process = Files(tmp_path), Process(_report)
    os.close(process.accepted(call("unionfs")))
    if word:
        process.go(tmp_path, files.fds, word)
    process.launcher.shutdown(socket.SHUT_WR)
    assert process.end() == (b"", 0)
    assert files.close() == ("", "")


def test_a_launcher_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for for ever."""
    monkeypatch.setattr(handover, "_SECONDS", 0.1)
    process = Process()
    process.launcher.sendall(call("unionfs")[:30])
    assert process.end() == (b"", 0)


def test_files_that_cannot_be_had(tmp_path: Path) -> None:
    """A launcher whose standard files are closed sends fewer; a directory may be unreachable."""
    files = Files(tmp_path)
    process = Process(_report)
    os.close(process.accepted(call("unionfs")))
    process.go(tmp_path, files.fds[:2])
    assert process.end() == (b"N", 0)
    process = Process(_report)
    os.close(process.accepted(call("unionfs")))
    process.go(tmp_path / "in", files.fds)
    assert process.end() == (b"N", 0)
    assert files.close() == ("", "")
