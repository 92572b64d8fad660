"""Starts a daemon: checks, forks, and waits until the mount is usable.

The parent imports neither trio nor pyfuse3, and returns when the child reports over a pipe that the mount is
usable, or why it is not. A process that a resident has forked for a launcher's call does not fork again: it
becomes the daemon, and reports to the launcher. What libfuse and fusermount3 print to fd 2 until then goes
into a memfd and becomes part of the error message.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from unionfs.daemon import logs, preflight
from unionfs.daemon.caller import CALLER, result
from unionfs.daemon.outliving import holder_for
from unionfs.daemon.runtime import RuntimeDirectory, runtime_directory
from unionfs.errors import DeadMountError, MountRefusedError, UserError, quoted, reason
from unionfs.settings.mount import MountSettings
from unionfs.sys.fds import Owned
from unionfs.sys.liveness import is_dead
from unionfs.sys.manager import Manager
from unionfs.sys.mountinfo import mounted_at
from unionfs.sys.process import close_files_but, open_standard_files, start_time, to_null, wait_gone
from unionfs.sys.unmount import unmount

_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
_SIGNAL_POLL_SECONDS = 0.05
_STOP_SECONDS = 5.0
_LEASES = "unionfs.union.leases"

log = logging.getLogger(__name__)


def mount(settings: MountSettings, *, foreground: bool = False) -> int:
    """Mount; return the exit code when the mount is usable, or with `foreground` when it is gone.

    Raises UserError if mounting fails, leaving nothing mounted.
    """
    open_standard_files()
    if foreground:
        CALLER.needs_own_process()
    _make_way(settings)
    with runtime_directory() as directory:
        if foreground:
            return _serve_here(settings, directory)
        path = directory.path
    if CALLER.launcher is not None:
        _be_daemon_of_launcher(settings, path, CALLER.launcher)
    _start_daemon(settings, path)
    return 0


def _make_way(settings: MountSettings) -> None:
    """Check the settings, and unmount a dead mount at the mountpoint.

    Raises UserError if these settings cannot be mounted.
    """
    while True:
        try:
            preflight.check(settings)
            return
        except DeadMountError:
            # For start-up time: few mounts are over dead ones.
            from unionfs.daemon import dead

            found = dead.own_dead_mount_at(settings.mountpoint)
            if found is None:
                raise
            dead.clean(found)


class CapturedStderr:
    """Redirects fd 2 of this process and its helpers to memory until `release` or `discard`."""

    def __init__(self) -> None:
        self._saved = os.dup(2)
        self._memory = os.memfd_create("stderr", os.MFD_CLOEXEC)
        os.dup2(self._memory, 2)
        self._released = False

    def fds(self) -> tuple[int, int]:
        """Return the fds that it needs beside 2."""
        return self._saved, self._memory

    def saved(self) -> int:
        """Return a new fd of the real stderr."""
        return os.dup(self._saved)

    def text(self) -> str:
        """Return the output so far as one line; empty after `release`."""
        if self._released:
            return ""
        size = os.fstat(self._memory).st_size
        lines = os.fsdecode(os.pread(self._memory, min(size, 4096), 0)).split("\n")
        return "; ".join(line.strip() for line in lines if line.strip())

    def release(self) -> None:
        """Let fd 2 be the real stderr again."""
        if not self._released:
            os.dup2(self._saved, 2)
            for fd in self.fds():
                os.close(fd)
            self._released = True

    def discard(self) -> None:
        """Let go of the real stderr: fd 2 becomes /dev/null."""
        self.release()
        to_null([2])


class _Waits(logging.Handler):
    """Also shows the caller the warnings of a mount that waits for the lease of its upper."""

    def __init__(self, captured: CapturedStderr) -> None:
        super().__init__(logging.WARNING)
        self._captured = captured

    def emit(self, record: logging.LogRecord) -> None:
        """Print it, if the caller is still there."""
        with suppress(OSError), Owned(self._captured.saved()) as fd:
            os.write(fd, os.fsencode(f"unionfs: {record.getMessage()}\n"))


def explain(error: BaseException, printed: str) -> str:
    if isinstance(error, MountRefusedError):
        return " ".join(error.explained(printed).split())
    while isinstance(error, ExceptionGroup):  # of trio: what happened is the innermost one
        error = error.exceptions[0]
    text = str(error) if isinstance(error, UserError) else f"internal error: {type(error).__name__}: {error}."
    text = " ".join(text.split())
    if printed and printed not in text:
        text = f"{text.removesuffix('.')} ({printed})."
    return text


def _serve_here(settings: MountSettings, directory: RuntimeDirectory) -> int:
    captured, manager = CapturedStderr(), Manager()
    if manager.watchdog_seconds is not None:
        # Its SIGABRT ends a process that hangs: the journal gets to know where.
        faulthandler.enable()

    def on_usable() -> None:
        captured.release()
        CALLER.goes()
        manager.tell("READY=1", f"STATUS=Mounted at {quoted(settings.mountpoint)}")

    logs.to_stream(settings.log_level, os.fdopen(captured.saved(), "w", buffering=1))
    # The caller's directory may be inside the mountpoint and would keep it busy.
    os.chdir("/")
    try:
        return 0 if _serve(settings, directory, on_usable, manager, foreground=True) else 1
    except KeyboardInterrupt:
        raise _interrupted(settings) from None
    except Exception as error:
        if not isinstance(error, UserError):
            log.debug("the daemon failed", exc_info=True)
        raise UserError(explain(error, captured.text())) from error
    finally:
        captured.release()


def _serve(
    settings: MountSettings,
    directory: RuntimeDirectory,
    on_usable: Callable[[], None],
    manager: Manager | None = None,
    *,
    foreground: bool,
) -> bool:
    # Garbage collection during the import of 400 modules finds nothing and takes a tenth of the time until
    # the mount is usable; their objects are permanent, so later collections can skip them.
    gc.disable()
    # For start-up time: the parent needs neither trio nor the union.
    from unionfs.daemon.service import Service

    holder = holder_for(settings, foreground=foreground)
    if holder is not None:
        # For start-up time: few mounts have one, from which other daemons are forked.
        from unionfs.daemon.takeover import take_over

    gc.freeze()
    # Nodes and requests form no cycles. A full collection, which Python starts after enough allocations,
    # stops a mount with a million nodes for a second.
    gc.set_threshold(10_000, 20, 10_000)
    gc.enable()
    if holder is not None and not holder.fork(settings):
        logging.getLogger(_LEASES).handlers.clear()  # the caller's stderr is not open here
        _leave(take_over(holder.state))
    return Service(
        settings, directory, on_usable, CALLER.pages, foreground=foreground, holder=holder, manager=manager
    ).run()


def _start_daemon(settings: MountSettings, directory: str) -> None:
    # Signals are blocked and polled, so that none ends this process but not the daemon.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _be_daemon(settings, directory, writer)
    os.close(writer)
    answer = _wait_for_answer(reader)
    if answer == b"ready\n":
        # Signals stay blocked: this process ends now, and its exit code must report the mount.
        return
    if answer is None:
        _stop_child(pid, settings)
        while signal.sigpending() & _SIGNALS:
            signal.sigwait(_SIGNALS)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise _interrupted(settings)
    _, status = os.waitpid(pid, 0)
    _clear_dead_mount(settings)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if answer.endswith(b"\n"):
        raise UserError(json.loads(answer))
    code = os.waitstatus_to_exitcode(status)
    how = f"signal {-code}" if code < 0 else f"code {code}"
    raise UserError(
        f"the daemon for {quoted(settings.mountpoint)} ended by {how} before the mount was usable; "
        f"see {logs.log_place(directory)}."
    )


def _interrupted(settings: MountSettings) -> UserError:
    return UserError(f"mounting at {quoted(settings.mountpoint)} was interrupted; try again.")


def _wait_for_answer(reader: int) -> bytes | None:
    """Return the line that the daemon sends, empty if it ended without one; None after a signal."""
    with os.fdopen(reader, "rb") as pipe:
        while not select.select([pipe], [], [], _SIGNAL_POLL_SECONDS)[0]:
            if signal.sigpending() & _SIGNALS:
                return None
        answer = pipe.readline()
        return None if signal.sigpending() & _SIGNALS else answer


def _stop_child(pid: int, settings: MountSettings) -> None:
    """Terminate a daemon that is starting, by SIGKILL if it ignores SIGTERM."""
    started = start_time(pid)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        if started is None or wait_gone(pid, started, _STOP_SECONDS):
            break
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)
    _clear_dead_mount(settings)


def _clear_dead_mount(settings: MountSettings) -> None:
    """Unmount the dead mount of a daemon that died between mounting and being ready."""
    found = mounted_at(settings.mountpoint)
    if found is not None and found.is_fuse and is_dead(settings.mountpoint):
        with suppress(OSError):
            unmount(found, lazy=True)


def _be_daemon(settings: MountSettings, directory: str, writer: int) -> NoReturn:
    """Run the child process; never returns to the caller."""

    def report() -> None:
        os.write(writer, b"ready\n")
        os.close(writer)

    code = 1
    try:
        code = _serve_detached(settings, directory, {writer}, report)
    except (UserError, OSError) as error:
        # Above all one that comes before the log.
        sentence = str(error) if isinstance(error, UserError) else (
            f"the daemon for {quoted(settings.mountpoint)} cannot start: {reason(error)}; see "
            f"{logs.log_place(directory)}."
        )  # fmt: skip
        with suppress(OSError):
            os.write(writer, json.dumps(sentence).encode("ascii") + b"\n")
    finally:
        _leave(code)


def _be_daemon_of_launcher(settings: MountSettings, directory: str, launcher: socket.socket) -> NoReturn:
    """Become the daemon: this process is for this call alone. Raises UserError if mounting fails."""

    def report() -> None:
        launcher.sendall(result(0))
        launcher.close()

    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = {launcher.fileno()} if CALLER.pages is None else {launcher.fileno(), CALLER.pages.fd}
    _leave(_serve_detached(settings, directory, kept, report))


def _leave(code: int) -> NoReturn:
    logging.shutdown()
    # Do not run the parent's atexit handlers or flush its buffers again.
    os._exit(code)


def _serve_detached(settings: MountSettings, path: str, kept: set[int], report: Callable[[], None]) -> int:
    """Serve without a terminal and the caller's files, but for `kept`. Returns the exit code.

    `report` is called when the mount is usable; an OSError means that the caller has ended. Raises UserError
    if mounting fails; stderr is the caller's again.
    """
    captured = _detach(kept)
    directory = RuntimeDirectory(path)
    logs.to_host(settings.log_level, directory, settings.mountpoint)
    waits, leases = _Waits(captured), logging.getLogger(_LEASES)
    leases.addHandler(waits)
    usable = False

    def on_usable() -> None:
        nonlocal usable
        usable = True
        leases.removeHandler(waits)
        captured.discard()
        CALLER.goes()
        try:
            report()
        except OSError:
            # The caller was killed, so nobody learns of this mount: end it.
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        on_disk = _serve(settings, directory, on_usable, foreground=False)
    except BaseException as error:
        leases.removeHandler(waits)
        if usable or not isinstance(error, UserError):
            log.exception("the daemon failed")
        if usable:
            return 1
        text = explain(error, captured.text())
        captured.release()
        raise UserError(text) from error
    if not usable:
        captured.release()
        raise _interrupted(settings)
    return 0 if on_disk else 1


def _detach(kept: set[int]) -> CapturedStderr:
    """Leave the caller's session and directory. Keep open `kept` and, captured, stderr."""
    os.setsid()
    os.chdir("/")
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    captured = CapturedStderr()
    to_null(range(2))
    # Pipes, locks and directories of the caller.
    close_files_but({*kept, *captured.fds(), *CALLER.fds})
    return captured
