"""Starts a runtime in a new session that inherits nothing from the caller.

The session has a leader, a small process that lives as long as `unionfs run`: when a session leader exits,
the session loses its terminal, and the first Ctrl-C ends bubblewrap's outer process. The leader forks a
process that forks bubblewrap and exits, so that bubblewrap becomes a child of `unionfs run`, the subreaper.
What the container inherits (keyring, devices, standard files) is prepared before bubblewrap is executed.

In a small root, bubblewrap is pid 1 of a pid namespace around the container's own: the /proc that it has open
shows only itself and the container's processes.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import termios
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from unionfs.containers.account import Account
from unionfs.containers.call import Call
from unionfs.containers.inherited import default_signals, inherit_only, join_new_keyring, unreachable
from unionfs.containers.small_root import enter_small_root, new_namespaces
from unionfs.containers.terminal import Terminal
from unionfs.errors import UserError, quoted, reason
from unionfs.sys.calls import PR_SET_PDEATHSIG, prctl
from unionfs.sys.capabilities import NUMBERS, capability_sets, drop_from_bounding_set, set_capabilities

# linux/prctl.h
_PR_SET_NAME = 15
_PR_SET_NO_NEW_PRIVS = 38
_ABOVE = 64
_TERMINAL_SIGNALS = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Launch:
    """The start of a runtime."""

    call: Call
    terminal: Terminal | None
    streams: Mapping[int, int]
    """The fds that it inherits as 0 to 2 instead of non-terminals."""
    bounding: Collection[str]
    """The capability bounding set of the container (CAP_*), if uid 0 starts it."""
    small_root: str | None
    """The union, to start the runtime in a small tree around it; None: in the host's tree."""
    account: Account | None = None
    """Who executes the runtime in a small root, if uid 0 starts it; None: this user."""

    def start(self) -> tuple[int, int]:
        """Start the runtime; return the pids of the session's leader and of the runtime. Raises UserError.

        The caller is a subreaper with one thread. All signals get their defaults: the container does not
        ignore those that the caller ignores (nohup(1)).
        """
        reader, writer = os.pipe()
        parent = os.getpid()
        leader = os.fork()
        if leader == 0:
            self._lead(parent, writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as answer:
            report = answer.read()
        try:
            pid, cause = json.loads(report)
        except ValueError:
            pid, cause = None, "its session ended"
        if pid is None:
            os.kill(leader, signal.SIGKILL)
            os.waitpid(leader, 0)
            raise UserError(
                f"{self.call.title} ({quoted(self.call.program)}) cannot be started: {cause}; "
                "`unionfs doctor` says what this host lacks."
            )
        return leader, int(pid)

    def _lead(self, parent: int, writer: int) -> NoReturn:
        try:
            os.setsid()
            for number in _TERMINAL_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            last = os.open(os.devnull, os.O_RDWR) if self.terminal is None else self.terminal.slave
            if self.terminal is not None and self.call.bundle is None:
                fcntl.ioctl(last, termios.TIOCSCTTY, 0)
            if os.fork() == 0:
                self._spawn(writer)
            prctl(_PR_SET_NAME, b"unionfs-session")
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            # Keep the slave open, so that the master stays usable while no program in the container has one.
            for fd in range(3):
                os.dup2(last, fd)
            os.closerange(3, 2**31 - 1)
            while os.getppid() == parent:
                signal.pause()
        finally:
            os._exit(1)

    def _spawn(self, writer: int) -> NoReturn:
        answer: tuple[int | None, str] = None, "its session failed"
        try:
            if self.small_root is not None:
                new_namespaces()
            failed, failure = os.pipe()
            pid = os.fork()
            if pid == 0:
                self._execute(failure)
            os.close(failure)
            with os.fdopen(failed, "r", encoding="utf-8") as report:
                cause = report.read()
            answer = (None, cause) if cause else (pid, "")
        except OSError as error:
            answer = None, reason(error)
        finally:
            os.write(writer, json.dumps(answer).encode())
            os._exit(0)

    def _execute(self, failure: int) -> NoReturn:
        """Execute the runtime; write earlier errors to `failure`, which execve closes."""
        try:
            join_new_keyring()
            program = unreachable(self.call.program)
            if self.small_root is not None:
                as_root = os.geteuid() == 0 and self.account is None
                bundle = self.call.bundle
                enter_small_root(self.small_root, self._slave_path(), as_root=as_root, bundle=bundle)
            if self.terminal is not None:
                for fd in self.terminal.fds:
                    os.dup2(self.terminal.slave, fd)
            for fd, end in self.streams.items():
                os.dup2(end, fd)
            if self.call.bundle is None:
                inherit_only(self.call.fds)
            else:
                program, failure = None if program is None else _moved(program), _moved(failure)
                inherit_only(_numbered(self.call.fds))
            default_signals()
            if os.geteuid() == 0 and self.account is not None:
                # A process of the host with that uid can trace this one, and must not execute set-id files
                # of the union by it.
                prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
                os.setgroups(self.account.groups)
                os.setresgid(*[self.account.gid] * 3)
                os.setresuid(*[self.account.uid] * 3)
            elif os.geteuid() == 0:
                _bound_capabilities(self.bounding)
            path = self.call.program if program is None else f"/proc/self/fd/{program}"
            os.execve(path, list(self.call.words), {})
        except OSError as error:
            os.write(failure, reason(error).encode())
        finally:
            os._exit(1)

    def _slave_path(self) -> str | None:
        """The path of the container's terminal in /dev/pts."""
        with suppress(OSError):
            return None if self.terminal is None else os.ttyname(self.terminal.slave)
        return None


def _moved(fd: int) -> int:
    """Return a copy of an fd above those that an OCI runtime passes on; execve closes it."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE)


def _numbered(fds: Sequence[int]) -> Collection[int]:
    """Copy fds to 3, 4 and so on, and return these."""
    for number, fd in enumerate([_moved(fd) for fd in fds], 3):
        os.dup2(fd, number)
    return range(3, 3 + len(fds))


def _bound_capabilities(names: Collection[str]) -> None:
    """Reduce the bounding set. bubblewrap keeps its capabilities: execve by uid 0 adds the inheritable set.

    bubblewrap then reduces that set to --cap-add. Source: capabilities(7). Raises OSError.
    """
    data = capability_sets()
    for half in data:
        half.inheritable = half.permitted
    if not set_capabilities(data):
        return  # no_new_privs keeps the command from gaining more in any case
    kept = {NUMBERS[name.removeprefix("CAP_")] for name in names}
    drop_from_bounding_set(set(range(64)) - kept)
