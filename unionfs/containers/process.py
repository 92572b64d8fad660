"""A command in its container: starting it, forwarding signals, and its exit code.

A runtime is two processes: an outer one that waits, and pid 1 of the new pid namespace, whose child is the
command. With bubblewrap, all of them receive terminal signals (Ctrl-C). In a small root, the outer process is
also pid 1 of a pid namespace, so that these do not end it. Elsewhere they do: this process then becomes the
reaper, waits for the inner pid 1, and takes the command's exit code from it. Signals to this process are
forwarded to the command.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from io import FileIO

from unionfs.containers.account import Account
from unionfs.containers.call import Call
from unionfs.containers.launch import Launch
from unionfs.containers.streams import Streams
from unionfs.containers.terminal import Terminal, standard_terminals
from unionfs.errors import UserError
from unionfs.sys.calls import prctl
from unionfs.sys.fds import Owned
from unionfs.sys.process import children_of, is_alive, start_time, wait_gone

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_FORWARDED = frozenset({
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2,
    signal.SIGWINCH, signal.SIGCONT,
})  # fmt: skip
ENDING = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})
_START_SECONDS = 2.0
_POLL_SECONDS = 0.02


class CommandError(UserError):
    """The command cannot be started; `code` is the exit code as in shells and docker."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


def hold_signals() -> frozenset[signal.Signals]:
    """Block signals until there is a command to forward them to; return the blocked ones.

    A signal that the caller ignores (nohup(1), a shell's background jobs) stays ignored: blocked, it
    would become pending.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    held = frozenset(number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, held | {signal.SIGCHLD})
    return held


def wait_for_end(seconds: float) -> bool:
    """Wait while signals are held, but not after SIGTERM. Returns whether it came."""
    return signal.sigtimedwait({signal.SIGTERM}, seconds) is not None


class Command:
    """A runtime with a command in it. Signals are held while it runs."""

    def __init__(
        self,
        call: Callable[[int, int | None], Call],
        *,
        bounding: Collection[str],
        small_root: str | None,
        account: Account | None = None,
        connect: Callable[[int], object] | None = None,
    ) -> None:
        """Start it. Raises UserError.

        `call` returns the runtime's call; its arguments are the fd on which the runtime reports, and the one
        at whose end it starts the command, if it waits. `connect` is called with the container's pid 1 before
        the command starts, unless it could not be made. `bounding`, `small_root`, `account`: as for Launch.
        """
        self._held = hold_signals()
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        fds = standard_terminals()
        self.terminal = Terminal(fds) if fds else None
        self._streams = Streams({0, 1, 2}.difference(fds))
        reader, writer = os.pipe()
        held, release = os.pipe()
        try:
            leader, self._outer = Launch(
                call(writer, None if connect is None else held),
                terminal=self.terminal,
                streams=self._streams.ends,
                bounding=bounding,
                small_root=small_root,
                account=account,
            ).start()
            self._leader = os.pidfd_open(leader)
        except BaseException:
            os.close(reader)
            os.close(release)
            raise
        finally:
            os.close(writer)
            os.close(held)
            self._streams.close_ends()
            if self.terminal is not None:
                self.terminal.close_slave()
        self._nested = small_root is not None
        with os.fdopen(reader, "rb", buffering=0) as info:
            self._identify(_report(info))
        #: Whether this process was told to end (SIGTERM).
        self.told_to_end = False
        #: The command's pid and start time.
        self._command: tuple[int, int] | None = None
        with Owned(release):
            if connect is not None and self._init is not None:
                self._connect(connect, self._init)

    def _identify(self, info: bytes) -> None:
        """Find the container's processes by what the runtime has reported."""
        self._init = _child_pid(info)
        #: Whether the container has been created.
        self.made = self._init is not None
        # The number is that of the runtime's own pid namespace.
        if self._nested and self.made:
            self._init = next(filter(_is_init, children_of(self._outer)), None)
        # When this process ends, everything in the container ends.
        self._top = self._outer if self._nested else self._init
        self._started = None if self._top is None else start_time(self._top)

    @property
    def init(self) -> tuple[int, int] | None:
        """The container's pid 1, and its start time."""
        started = None if self._init is None else start_time(self._init)
        return None if self._init is None or started is None else (self._init, started)

    @property
    def top(self) -> tuple[int, int] | None:
        """The process whose end is that of everything in the container, and its start time."""
        return None if self._top is None or self._started is None else (self._top, self._started)

    def _connect(self, connect: Callable[[int], object], init: int) -> None:
        """Connect its network; if that fails, end it."""
        try:
            connect(init)
        except BaseException:
            self._end_the_rest()
            self._end_session()
            raise

    def kill(self) -> None:
        """End everything in the container at once."""
        if self._top is not None and self._started is not None and is_alive(self._top, self._started):
            with suppress(OSError):
                os.kill(self._top, signal.SIGKILL)

    def clear(self) -> None:
        """End everything in the container, and restore the terminal: for the guardian of a killed process."""
        self.kill()
        if self.terminal is not None:
            self.terminal.restore_from_outside()

    def wait(self) -> int:
        """Forward signals until the command has ended; return its exit code, or 128 plus the signal's number.

        Processes still running in the container are then killed, as always when pid 1 ends. Raises UserError
        if the command's output cannot be written.
        """
        if self.terminal is not None:
            self.terminal.start()
        self._streams.start()
        try:
            code = self._wait()
            self._streams.finish(lambda: signal.sigtimedwait(self._held & ENDING, 0) is not None)
            return code
        finally:
            self._end_session()
            self._streams.close()

    def _wait(self) -> int:
        signals = self._held | {signal.SIGCHLD}
        ended: dict[int, int] = {}
        self._find_command(ended)
        while True:
            _reap(ended)
            outer = ended.get(self._outer)
            # If a nested outer process is killed, the kernel has already killed everything in its namespace.
            if outer is not None and (outer >= 0 or self._init is None or self._nested):
                self._end_the_rest()
                return _code(outer)
            if outer is not None and self._init in ended:
                return _code(ended[self._init])
            if outer is None:
                info: signal.struct_siginfo | None = signal.sigwaitinfo(signals)
            else:
                # Pid 1 has the exit code, and ends when nothing else runs.
                for pid in children_of(self._init or 0) if not self._command_lives() else ():
                    with suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
                info = signal.sigtimedwait(signals, _POLL_SECONDS)
            if info is not None and info.si_signo != signal.SIGCHLD:
                self._forward(info.si_signo)

    def _find_command(self, ended: dict[int, int]) -> None:
        """Find the command's process while it lives: bubblewrap's first child in the container."""
        deadline = time.monotonic() + _START_SECONDS
        while self._init is not None and self._command is None and time.monotonic() < deadline:
            _reap(ended)
            if self._outer in ended:
                return
            found = children_of(self._init)
            started = start_time(found[0]) if found else None
            if started is not None:
                self._command = found[0], started
            else:
                time.sleep(0.001)

    def _command_lives(self) -> bool:
        return self._command is not None and is_alive(*self._command)

    def _end_the_rest(self) -> None:
        """Kill pid 1 and everything below it, and wait until the namespaces are gone."""
        self.kill()
        if self._top is not None and self._started is not None:
            wait_gone(self._top, self._started, _START_SECONDS)
        if self._init is not None:
            with suppress(ChildProcessError):
                os.waitpid(self._init, 0)

    def _end_session(self) -> None:
        """End the session's leader, which holds the last slave of the pty; restore the caller's terminal."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._leader, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._leader, os.WEXITED)
        os.close(self._leader)
        if self.terminal is not None:
            self.terminal.finish()

    def _forward(self, number: int) -> None:
        self.told_to_end = self.told_to_end or number == signal.SIGTERM
        if self.terminal is not None and number == signal.SIGWINCH:
            self.terminal.resize()
            return
        if self.terminal is not None and number == signal.SIGCONT:
            self.terminal.resume()
        if self._command is not None and self._command_lives():
            with suppress(OSError):
                os.kill(self._command[0], number)


def _reap(ended: dict[int, int]) -> None:
    """Record the exit codes (negative: signals) of all children that have ended."""
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])


def _report(info: FileIO) -> bytes:
    """Read one JSON object; less at the end of the runtime, which may keep the file open."""
    found = b""
    while b"}" not in found and (part := info.read(1 << 12)):
        found += part
    return found


def _is_init(pid: int) -> bool:
    """Return whether a process is pid 1 of its pid namespace; proc_pid_status(5)."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
            return any(line.startswith("NSpid:") and line.split()[-1] == "1" for line in lines)
    except OSError:
        return False


def _child_pid(info: bytes) -> int | None:
    try:
        return int(json.loads(info)["child-pid"])
    except (ValueError, KeyError, TypeError):
        return None


def _code(code: int) -> int:
    return code if code >= 0 else 128 - code
