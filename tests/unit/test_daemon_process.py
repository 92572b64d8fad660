"""The start of a daemon: what its caller waits for, sees and gets; nothing is mounted."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from tests.support.worker import REPOSITORY
from unionfs.daemon import dead, process
from unionfs.daemon.process import CapturedStderr
from unionfs.daemon.settle import settle
from unionfs.errors import DeadMountError, MountRefusedError, UserError
from unionfs.sys.process import children_of

SETTINGS = settle("/m", lowers=["/l"], trusted_xattrs=True)
INTERRUPTED = r"mounting at /m was interrupted; try again\."


class _Left(BaseException):
    """The end of a process that was forked."""


@pytest.fixture(autouse=True)
def _unchanged() -> Iterator[None]:
    """Signals as before, and no handler of logs more."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    loggers = [logging.getLogger(), logging.getLogger(process._LEASES)]
    handlers = [one.handlers[:] for one in loggers]
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for one, before in zip(loggers, handlers, strict=True):
        one.handlers[:] = before


@pytest.fixture
def stderr(capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What is written to fd 2 since the last call."""
    return lambda: capfd.readouterr().err


class TestStderr:
    def test_until_it_is_released(self, stderr: Callable[[], str]) -> None:
        fds = len(os.listdir("/proc/self/fd"))
        captured = CapturedStderr()
        assert captured.text() == ""
        os.write(2, b"  one line\n\n \nanother \n")
        assert captured.text() == "one line; another"
        real = captured.saved()
        os.write(real, b"real")
        os.close(real)
        assert stderr() == "real"
        kept, memory = captured.fds()
        assert not any(map(os.get_inheritable, (kept, memory)))
        assert os.fstat(memory).st_ino == os.fstat(2).st_ino
        for _ in range(2):
            captured.release()
            assert captured.text() == ""
            os.write(2, b"again")
            assert stderr() == "again"
        assert len(os.listdir("/proc/self/fd")) == fds

    def test_much_of_it(self) -> None:
        """Its beginning says what is wrong."""
        captured = CapturedStderr()
        os.write(2, b"x" * 5000)
        assert captured.text() == "x" * 4096
        captured.release()

    def test_discarded(self, stderr: Callable[[], str]) -> None:
        captured = CapturedStderr()
        captured.discard()
        os.write(2, b"nobody reads this")
        assert stderr() == ""
        assert os.fstat(2).st_rdev == os.stat("/dev/null").st_rdev

    def test_the_wait_for_a_lease_is_shown(self, stderr: Callable[[], str]) -> None:
        """Warnings, not the details, and at once."""
        captured = CapturedStderr()
        waits = process._Waits(captured)
        assert waits.level == logging.WARNING
        waits.emit(logging.LogRecord("x", logging.WARNING, "", 1, "it waits for %s", ("a",), None))
        assert stderr() == "unionfs: it waits for a\n"
        captured.release()


def test_why_a_mount_failed() -> None:
    """What a helper printed is added once; an error that is not for users names its type."""
    assert process.explain(ValueError("odd\n  value"), "") == "internal error: ValueError: odd value."
    assert process.explain(ValueError("odd"), "why") == "internal error: ValueError: odd (why)."
    refused = MountRefusedError("/m", "fusermount3 failed")
    found = process.explain(refused, "fusermount3: \n no")
    assert found == " ".join(refused.explained("fusermount3: \n no").split())
    assert "\n" not in found


class TestMakingWay:
    @pytest.fixture
    def made(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        found: list[Any] = []
        monkeypatch.setattr(dead, "clean", lambda mount: found.append(mount))
        return found

    def _checks(self, monkeypatch: pytest.MonkeyPatch, *errors: Exception | None) -> None:
        results = iter(errors)

        def check(_: object) -> None:
            if (error := next(results)) is not None:
                raise error

        monkeypatch.setattr(process.preflight, "check", check)

    def test_dead_mounts(self, monkeypatch: pytest.MonkeyPatch, made: list[Any]) -> None:
        """As many as lie there; then all is checked again."""
        mounts = iter(["upper one", "lower one"])
        monkeypatch.setattr(dead, "own_dead_mount_at", lambda path: next(mounts) + path)
        self._checks(monkeypatch, DeadMountError("dead."), DeadMountError("dead."), None)
        process._make_way(SETTINGS)
        assert made == ["upper one/m", "lower one/m"]
        self._checks(monkeypatch, UserError("bad."))
        with pytest.raises(UserError, match="bad"):
            process._make_way(SETTINGS)

    def test_another_users(self, monkeypatch: pytest.MonkeyPatch, made: list[Any]) -> None:
        monkeypatch.setattr(dead, "own_dead_mount_at", lambda path: None)
        self._checks(monkeypatch, DeadMountError("dead."))
        with pytest.raises(DeadMountError):
            process._make_way(SETTINGS)
        assert made == []


class TestForeground:
    """`_serve_here`, with a session that does what a test says."""

    @pytest.fixture(autouse=True)
    def _here(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        self.told: list[tuple[str, ...]] = []
        self.goes: list[str] = []
        self.watchdog: float | None = None
        monkeypatch.setattr(process, "Manager", lambda: self)
        monkeypatch.setattr(process.CALLER, "goes", lambda: self.goes.append("goes"))
        monkeypatch.setattr(process.logs, "to_stream", lambda level, stream: stream.close())
        before, enabled = os.getcwd(), faulthandler.is_enabled()
        yield
        os.chdir(before)
        if enabled:
            faulthandler.enable()

    @property
    def watchdog_seconds(self) -> float | None:
        return self.watchdog

    def tell(self, *states: str) -> None:
        self.told.append(states)

    def run(self, monkeypatch: pytest.MonkeyPatch, serve: Callable[[Callable[[], None]], bool]) -> int:
        def run(*values: Any, foreground: bool) -> bool:
            assert values[0] is SETTINGS
            assert values[3] is self
            assert foreground
            assert os.getcwd() == "/"
            os.write(2, b"printed\n")
            return serve(values[2])

        monkeypatch.setattr(process, "_serve", run)
        nothing: Any = None
        return process._serve_here(SETTINGS, nothing)

    def test_it_serves(self, monkeypatch: pytest.MonkeyPatch, stderr: Callable[[], str]) -> None:
        fds = len(os.listdir("/proc/self/fd"))
        for on_disk in (True, False):
            self.told.clear()

            def serve(on_usable: Callable[[], None], on_disk: bool = on_disk) -> bool:
                assert self.told == []
                on_usable()
                os.write(2, b"real")
                return on_disk

            assert self.run(monkeypatch, serve) == (0 if on_disk else 1)
            assert stderr() == "real"
            assert self.told == [("READY=1", "STATUS=Mounted at /m")]
        assert self.goes == ["goes", "goes"]
        assert len(os.listdir("/proc/self/fd")) == fds

    @pytest.mark.parametrize(
        ("error", "text", "logs"),
        [
            (UserError("refused."), r"^refused \(printed\)\.$", False),
            (ValueError("odd"), r"^internal error: ValueError: odd \(printed\)\.$", True),
            (KeyboardInterrupt(), f"^{INTERRUPTED}$", False),
        ],
        ids=["user", "internal", "interrupted"],
    )
    def test_errors(
        self, monkeypatch: pytest.MonkeyPatch, stderr: Callable[[], str], caplog: pytest.LogCaptureFixture,
        error: BaseException, text: str, logs: bool,
    ) -> None:  # fmt: skip
        caplog.set_level(logging.DEBUG, process.log.name)

        def serve(_: object) -> NoReturn:
            raise error

        with pytest.raises(UserError, match=text):
            self.run(monkeypatch, serve)
        os.write(2, b"real")
        assert stderr() == "real"
        assert self.told == []
        assert ("the daemon failed" in caplog.messages) is logs

    @pytest.mark.parametrize("seconds", [None, 30.0])
    def test_where_a_process_hangs(self, monkeypatch: pytest.MonkeyPatch, seconds: float | None) -> None:
        """The watchdog's signal prints that, if there is one."""
        enabled: list[bool] = []
        monkeypatch.setattr(faulthandler, "enable", lambda: enabled.append(True))
        self.watchdog = seconds
        self.run(monkeypatch, lambda _: True)
        assert bool(enabled) is (seconds is not None)
        monkeypatch.undo()


class TestForked:
    """`_start_daemon`, with a child that does what a test says."""

    @pytest.fixture(autouse=True)
    def _nothing_mounted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cleared: list[object] = []
        monkeypatch.setattr(process, "_clear_dead_mount", self.cleared.append)
        monkeypatch.setattr(process.logs, "log_place", lambda directory: f"the log in {directory}")
        monkeypatch.setattr(process, "_STOP_SECONDS", 0.3)
        self.others = set(children_of(os.getpid()))

    def _children(self) -> set[int]:
        """Those of the test; the process may have others."""
        return set(children_of(os.getpid())) - self.others

    def start(self, monkeypatch: pytest.MonkeyPatch, child: Callable[[int], object]) -> None:
        def be_daemon(settings: object, directory: str, writer: int) -> NoReturn:
            assert (settings, directory) == (SETTINGS, "/run/x")
            try:
                child(writer)
            finally:
                os._exit(3)

        monkeypatch.setattr(process, "_be_daemon", be_daemon)
        process._start_daemon(SETTINGS, "/run/x")

    def _blocked(self) -> bool:
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def test_it_is_usable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No signal changes the exit code any more."""
        fds = set(os.listdir("/proc/self/fd"))
        self.start(monkeypatch, lambda writer: os.write(writer, b"ready\n"))
        assert self._blocked()
        assert self.cleared == []
        (pid,) = self._children()
        os.waitpid(pid, 0)
        assert set(os.listdir("/proc/self/fd")) == fds

    @pytest.mark.parametrize(
        ("child", "text"),
        [
            (lambda writer: os.write(writer, b'"it \\u00e9 is."\n'), "^it é is\\.$"),
            (
                lambda writer: None,
                "^the daemon for /m ended by code 3 before the mount was usable; see the log in /run/x",
            ),
            (lambda writer: os.kill(os.getpid(), signal.SIGKILL), "^the daemon for /m ended by signal 9 b"),
            (lambda writer: os.write(writer, b'"half'), "ended by code 3"),
        ],
        ids=["sentence", "code", "signal", "half"],
    )
    def test_it_fails(
        self, monkeypatch: pytest.MonkeyPatch, child: Callable[[int], object], text: str
    ) -> None:
        with pytest.raises(UserError, match=text):
            self.start(monkeypatch, child)
        assert not self._blocked()
        assert self.cleared == [SETTINGS]
        assert self._children() == set()

    @pytest.mark.parametrize("ignores", [False, True])
    @pytest.mark.parametrize("ready", [False, True])
    def test_a_signal(self, monkeypatch: pytest.MonkeyPatch, ignores: bool, ready: bool) -> None:
        """The daemon ends, whatever it has reported at the same time, and the signal is used up."""

        def child(writer: int) -> None:
            if ignores:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            else:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            # to its main thread: others, of pytest and trio, do not block it
            ctypes.CDLL(None).tgkill(os.getppid(), os.getppid(), signal.SIGINT)
            if ready:
                os.write(writer, b"ready\n")
            signal.pause()

        with pytest.raises(UserError, match=INTERRUPTED):
            self.start(monkeypatch, child)
        assert not self._blocked()
        assert signal.SIGINT not in signal.sigpending()
        assert self.cleared == [SETTINGS]
        assert self._children() == set()


def test_the_dead_mount_of_a_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one there is left alone."""
    made: list[object] = []

    def unmount(mount: object, *, lazy: bool) -> None:
        made.append((mount, lazy))
        raise OSError(errno.EINVAL, "not mounted")

    monkeypatch.setattr(process, "unmount", unmount)
    for is_fuse, is_dead in ((True, True), (False, True), (True, False)):
        mount = SimpleNamespace(is_fuse=is_fuse)
        monkeypatch.setattr(process, "mounted_at", lambda path, mount=mount: mount)
        monkeypatch.setattr(process, "is_dead", lambda path, is_dead=is_dead: is_dead)
        process._clear_dead_mount(SETTINGS)
        assert made == ([(mount, True)] if is_fuse and is_dead else [])
        made.clear()
    monkeypatch.setattr(process, "mounted_at", lambda path: None)
    process._clear_dead_mount(SETTINGS)


class TestDaemon:
    """What the daemon itself does around its session."""

    @pytest.fixture(autouse=True)
    def _here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.code: int | None = None
        self.captured = SimpleNamespace(
            text=lambda: "printed", release=lambda: self.made.append("release"),
            discard=lambda: self.made.append("discard"),
        )  # fmt: skip
        self.made: list[str] = []

        def leave(code: int) -> NoReturn:
            self.code = code
            raise _Left

        monkeypatch.setattr(process, "_leave", leave)
        monkeypatch.setattr(process, "_detach", lambda kept: self.captured)
        monkeypatch.setattr(process, "RuntimeDirectory", lambda path: path)
        monkeypatch.setattr(process.logs, "to_host", lambda *values: self.made.append(f"log {values[1]}"))
        monkeypatch.setattr(process.logs, "log_place", lambda directory: f"the log in {directory}")
        monkeypatch.setattr(process.CALLER, "goes", lambda: self.made.append("goes"))

    def _waiting(self) -> int:
        return sum(isinstance(one, process._Waits) for one in logging.getLogger(process._LEASES).handlers)

    def serve(
        self, monkeypatch: pytest.MonkeyPatch, serve: Callable[[Callable[[], None]], bool],
        report: Callable[[], None] = lambda: None,
    ) -> int:  # fmt: skip
        def run(settings: object, directory: str, on_usable: Callable[[], None], *, foreground: bool) -> bool:
            assert (settings, directory, foreground) == (SETTINGS, "/run/x", False)
            assert self._waiting() == 1
            return serve(on_usable)

        monkeypatch.setattr(process, "_serve", run)
        return process._serve_detached(SETTINGS, "/run/x", set(), report)

    def test_it_serves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The caller goes on when the mount is usable; then nothing is shown any more."""
        for on_disk, code in ((True, 0), (False, 1)):
            self.made.clear()

            def serve(on_usable: Callable[[], None], on_disk: bool = on_disk) -> bool:
                on_usable()
                assert self._waiting() == 0
                return on_disk

            assert self.serve(monkeypatch, serve, lambda: self.made.append("report")) == code
            assert self.made == ["log /run/x", "discard", "goes", "report"]

    def test_a_caller_that_was_killed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sent: list[tuple[int, int]] = []
        monkeypatch.setattr(os, "kill", lambda *values: sent.append(values))

        def report() -> None:
            raise BrokenPipeError

        def serve(on_usable: Callable[[], None]) -> bool:
            on_usable()
            return True

        assert self.serve(monkeypatch, serve, report) == 0
        assert sent == [(os.getpid(), signal.SIGTERM)]

    def test_it_ends_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UserError, match=INTERRUPTED):
            self.serve(monkeypatch, lambda _: True)
        assert self.made[1:] == ["release"]

    @pytest.mark.parametrize(
        ("error", "text", "logs"),
        [
            (UserError("refused."), r"^refused \(printed\)\.$", False),
            (ValueError("odd"), r"^internal error: ValueError: odd \(printed\)\.$", True),
        ],
        ids=["user", "internal"],
    )
    @pytest.mark.parametrize("usable", [False, True])
    def test_errors(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, text: str,
        logs: bool, usable: bool,
    ) -> None:  # fmt: skip
        """Of a usable mount nobody waits for them: they are in the log."""

        def serve(on_usable: Callable[[], None]) -> NoReturn:
            if usable:
                on_usable()
            raise error

        if usable:
            assert self.serve(monkeypatch, serve) == 1
        else:
            with pytest.raises(UserError, match=text):
                self.serve(monkeypatch, serve)
            assert self.made[-1] == "release"
        assert self._waiting() == 0
        assert ("the daemon failed" in caplog.messages) is (logs or usable)

    def _reported(self, monkeypatch: pytest.MonkeyPatch, result: int | Exception) -> bytes:
        """What a forked daemon reports to the process that waits for it."""

        def serve(settings: object, path: str, kept: set[int], report: Callable[[], None]) -> int:
            assert (settings, path, kept) == (SETTINGS, "/run/x", {writer})
            if isinstance(result, Exception):
                raise result
            report()
            return result

        monkeypatch.setattr(process, "_serve_detached", serve)
        reader, writer = os.pipe()
        with open(reader, "rb") as answer:
            with pytest.raises(_Left):
                process._be_daemon(SETTINGS, "/run/x", writer)
            if isinstance(result, Exception):
                os.close(writer)
            return answer.read()

    def test_what_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for code in (0, 1):
            assert self._reported(monkeypatch, code) == b"ready\n"
            assert self.code == code
        found = self._reported(monkeypatch, UserError("é."))
        assert (found, self.code) == (b'"\\u00e9."\n', 1)
        found = self._reported(monkeypatch, OSError(errno.EMFILE, "Too many open files"))
        sentence = "the daemon for /m cannot start: too many open files; see the log in /run/x."
        assert (found[-1:], json.loads(found), self.code) == (b"\n", sentence, 1)

    @pytest.mark.parametrize("pages", [None, SimpleNamespace(fd=99)])
    def test_what_a_launcher_gets(self, monkeypatch: pytest.MonkeyPatch, pages: Any) -> None:
        ours, theirs = socket.socketpair()

        def serve(settings: object, path: str, kept: set[int], report: Callable[[], None]) -> int:
            assert (settings, path) == (SETTINGS, "/run/x")
            assert kept == ({number} if pages is None else {number, 99})
            report()
            return 7

        monkeypatch.setattr(process, "_serve_detached", serve)
        monkeypatch.setattr(process.CALLER, "_pages", pages)
        flushed: list[str] = []
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(
                sys, name, SimpleNamespace(flush=lambda name=name: flushed.append(name), write=len)
            )
        number = ours.fileno()
        with theirs:
            with pytest.raises(_Left):
                process._be_daemon_of_launcher(SETTINGS, "/run/x", ours)
            assert theirs.recv(10) == b"R\0"
            assert theirs.recv(10) == b""
        assert (self.code, flushed) == (7, ["stdout", "stderr"])


DETACH = """
import json, os, signal, sys
from unionfs.daemon import process
kept, other, shown = (os.open("/dev/zero", os.O_RDONLY) for _ in range(3))
process.CALLER._stderr = shown
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, process._SIGNALS)
if os.fork() == 0:
    captured = process._detach({kept})
    open_ = [fd for fd in (kept, other, shown, *captured.fds()) if os.path.exists(f"/proc/self/fd/{fd}")]
    found = {
        "session": os.getsid(0) == os.getpid(), "directory": os.getcwd(),
        "open": [fd in open_ for fd in (kept, other, shown, *captured.fds())],
        "null": [os.fstat(fd).st_rdev == os.stat("/dev/null").st_rdev for fd in (0, 1, 2)],
        "handlers": [signal.getsignal(number) == signal.SIG_DFL for number in process._SIGNALS],
        "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    }
    os.write(captured.fds()[0], json.dumps(found).encode())
    process._leave(5)
else:
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_what_a_daemon_leaves() -> None:
    """The session, the directory and the files of its caller."""
    done = subprocess.run(
        [sys.executable, "-c", DETACH], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    assert json.loads(done.stderr) == {
        "session": True, "directory": "/", "open": [True, False, True, True, True],
        "null": [True, True, False], "handlers": [True, True, True], "blocked": 0,
    }  # fmt: skip
