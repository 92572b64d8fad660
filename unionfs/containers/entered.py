"""A command in a container that runs already: starting it, forwarding signals, and its exit code."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, NoReturn

import unionfs
from unionfs.containers.bubblewrap import in_memory
from unionfs.containers.entering import STEPS
from unionfs.containers.finding import NOT_EXECUTABLE, NOT_FOUND
from unionfs.containers.inherited import default_signals, inherit_only, join_new_keyring, unreachable
from unionfs.containers.process import ENDING, PR_SET_CHILD_SUBREAPER, CommandError, hold_signals
from unionfs.containers.streams import Streams
from unionfs.containers.terminal import Terminal, standard_terminals
from unionfs.errors import reason
from unionfs.sys.calls import os_error, prctl
from unionfs.sys.fds import Owned
from unionfs.sys.inheritance import take_cgroups

_OWN_FAILURE: Final = 125
_LONGEST: Final = 4096
_CURE: Final = "check the options, and by `unionfs ps` that the container runs"
_PROGRAM: Final = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from unionfs.containers.entering import main; main()"
)


class Entered:
    """A command that `containers.entering` starts. Signals are held while it runs."""

    def __init__(self, init: int, job: Mapping[str, Any], *, pidfd: int, detached: bool) -> None:
        """Start it. `init` and `pidfd` are the process whose container it enters.

        Raises CommandError if it cannot be started.
        """
        self._held = hold_signals()
        self._init = init
        fds = [] if detached else standard_terminals()
        self._terminal = Terminal(fds, outlived=True) if fds else None
        self._streams = None if detached else Streams({0, 1, 2}.difference(fds), outlived=True)
        terminal = min(fds, default=None)
        self._job = {**job, "init": init, "pidfd": pidfd, "detached": detached, "terminal": terminal}
        prctl(PR_SET_CHILD_SUBREAPER, 0 if detached else 1)
        self._pid = self._start()

    def _start(self) -> int:
        reader, report = os.pipe()
        go, start = os.pipe()
        child = os.fork()
        if child == 0:
            self._execute(report, go)
        os.close(report)
        os.close(go)
        if self._streams is not None:
            self._streams.close_ends()
        if self._terminal is not None:
            self._terminal.close_slave()
        with Owned(start), os.fdopen(reader, "rb") as answers:
            first = answers.readline(_LONGEST)
            os.waitpid(child, 0)
            pid = self._read(first or b"{}")
            # The command is now a child of this process, and its parent's death no longer concerns it.
            with suppress(BrokenPipeError):  # the container has ended
                os.write(start, b".")
            if rest := answers.readline(_LONGEST):
                self._read(rest)
        return pid

    def _read(self, answer: bytes) -> int:
        """Return the pid. Raises CommandError. A container that may trace could have forged the answer."""
        try:
            found = json.loads(answer)
            if "pid" in found:
                return int(found["pid"])
            what, number = STEPS[found["step"]], int(found["errno"])
            cause = reason(os_error(number))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise CommandError(f"{STEPS['enter']}: its process has ended; {_CURE}.", _OWN_FAILURE) from None
        code = _OWN_FAILURE
        if found["step"] in ("workdir", "outside", "execute"):
            code = NOT_FOUND if (found["step"], number) == ("execute", errno.ENOENT) else NOT_EXECUTABLE
        raise CommandError(f"{what}: {cause}; {_CURE}.", code)

    def _execute(self, report: int, go: int) -> NoReturn:
        """Become the interpreter that enters the container."""
        try:
            join_new_keyring()
            self._take_cgroups()
            program = unreachable(sys.executable)
            job = in_memory(json.dumps(self._job).encode())
            if self._terminal is not None:
                for fd in self._terminal.fds:
                    os.dup2(self._terminal.slave, fd)
            for fd, end in ({} if self._streams is None else self._streams.ends).items():
                os.dup2(end, fd)
            inherit_only({report, go, job, self._job["pidfd"]})
            default_signals()
            os.chdir("/")
            package = os.path.dirname(os.path.dirname(os.path.abspath(unionfs.__file__)))
            words = ["-I", "-S", "-X", "utf8", "-c", _PROGRAM, package, *map(str, (job, report, go))]
            path = sys.executable if program is None else f"/proc/self/fd/{program}"
            os.execve(path, [sys.executable, *words], {})
        except OSError as error:
            os.write(report, json.dumps({"step": "enter", "errno": error.errno}).encode() + b"\n")
        finally:
            os._exit(_OWN_FAILURE)

    def _take_cgroups(self) -> None:
        """Move to the container's control groups. Raises OSError.

        An ordinary user often may not move processes: the command then has the caller's groups.
        """
        try:
            take_cgroups(self._init)
        except OSError:
            if os.geteuid() == 0:
                raise

    def wait(self) -> int:
        """Forward signals until it has ended; return its exit code, or 128 plus the signal's number.

        Raises UserError if its output cannot be written. Its own children may go on.
        """
        assert self._streams is not None
        if self._terminal is not None:
            self._terminal.start()
        self._streams.start()
        try:
            code = self._wait()
            self._streams.finish(lambda: signal.sigtimedwait(self._held & ENDING, 0) is not None)
        finally:
            if self._terminal is not None:
                self._terminal.finish()
        return code if code >= 0 else 128 - code

    def _wait(self) -> int:
        while True:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended == self._pid:
                return os.waitstatus_to_exitcode(status)
            if not ended:
                self._forward(signal.sigwaitinfo(self._held | {signal.SIGCHLD}).si_signo)

    def _forward(self, number: int) -> None:
        if number == signal.SIGCHLD:
            return
        if self._terminal is not None and number == signal.SIGWINCH:
            self._terminal.resize()
            return
        if self._terminal is not None and number == signal.SIGCONT:
            self._terminal.resume()
        with suppress(OSError):
            os.kill(self._pid, number)
