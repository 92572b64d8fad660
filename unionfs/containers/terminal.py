"""The container's own terminal: a pty, and the relays between it and the caller's terminal.

A container with the caller's terminal could type into it (TIOCSTI, ioctl_tty(2)), and the caller's shell
would execute that. So every standard file that is a terminal is replaced by the slave of a new pty. While
`unionfs run` is in the foreground of the terminal at its stdin, that is raw: the pty turns Ctrl-C and Ctrl-Z
into signals in the container's session. In the background the terminal is neither read nor changed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import termios
import threading
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from unionfs.errors import on_failure
from unionfs.sys.fds import Owned

_POLL_SECONDS = 0.2
_DRAIN_SECONDS = 10.0
_CHUNK = 1 << 16
_SIZE = b"\0" * 8  # struct winsize, asm-generic/termios.h


def standard_terminals() -> list[int]:
    """Which of the standard files (0 to 2) are terminals."""
    return [fd for fd in range(3) if os.isatty(fd)]


class Terminal:
    """A pty for the container. `slave` is closed in this process by `close_slave`."""

    def __init__(self, fds: Collection[int], *, outlived: bool = False) -> None:
        """`fds`: the standard files that are terminals, at least one. Raises UserError.

        With `outlived`, other processes may keep a slave: `finish` relays what they have written.
        """
        self._outlived = outlived
        with on_failure(
            "the container cannot get a terminal",
            "check that /dev/pts is mounted, or redirect stdin, stdout, and stderr",
        ):
            self.master, self.slave = os.openpty()
        #: The standard files that the slave replaces.
        self.fds = frozenset(fds)
        self._input = 0 in self.fds
        self._main = 0 if self._input else min(self.fds)
        self._output = next(fd for fd in (1, 2, 0) if fd in self.fds)
        try:
            self._path: str | None = os.ttyname(self._main)
        except OSError:
            self._path = None  # a terminal of another mount namespace has no name here
        self._saved = termios.tcgetattr(self._main)
        # If stdout is not a terminal, the next program of a pipeline writes to this one, and needs its
        # newlines translated.
        keep_output = not self._input or 1 not in self.fds
        self._raw = _raw(self._saved, keep_output=keep_output)
        self._lock = threading.Lock()
        self._over = False
        self._woken, self._wake = os.pipe()
        self._threads: list[threading.Thread] = []
        inside = list(self._saved)
        if keep_output:
            inside[1] &= ~termios.OPOST  # translate them only once
        termios.tcsetattr(self.slave, termios.TCSANOW, inside)
        self.resize()

    def close_slave(self) -> None:
        """Close this process's slave: the master then ends with the container's last one."""
        os.close(self.slave)

    def resize(self) -> None:
        """Copy the terminal's size; the kernel sends SIGWINCH to the container's foreground."""
        with suppress(OSError):
            size = fcntl.ioctl(self._main, termios.TIOCGWINSZ, _SIZE)
            fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)

    def start(self) -> None:
        """Start to relay. Signals must be blocked: the threads leave them to the caller."""
        if self._input and _in_foreground():
            self._make_raw()  # before any output
        relays = [self._relay_output, *([self._relay_input] if self._input else [])]
        for relay in relays:
            self._threads.append(threading.Thread(target=relay, daemon=True))
            self._threads[-1].start()

    def resume(self) -> None:
        """Reset the terminal when this process continues after a stop: the shell has changed it."""
        if self._input and _in_foreground():
            self._make_raw()

    def finish(self) -> None:
        """Relay the container's remaining output, and restore the terminal. All slaves are closed, or it is
        `outlived`.
        """
        with self._lock:
            self._over = True
        os.write(self._wake, b".")
        for thread in self._threads:
            thread.join(_DRAIN_SECONDS)
        if self._input:
            self._restore(0)

    def restore_from_outside(self) -> None:
        """Restore the terminal from a process without an fd of it, after this one was killed."""
        if not self._input or self._path is None:
            return
        flags = os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
        with suppress(OSError), Owned(os.open(self._path, flags)) as fd:
            self._restore(fd)

    def _restore(self, fd: int) -> None:
        # Only if its settings are those of _make_raw: in the background the terminal is another program's.
        with suppress(termios.error):
            if termios.tcgetattr(fd)[:4] == self._raw[:4]:
                termios.tcsetattr(fd, termios.TCSANOW, self._saved)

    def _make_raw(self) -> None:
        with self._lock, suppress(termios.error):
            if not self._over:
                termios.tcsetattr(0, termios.TCSANOW, self._raw)

    def _relay_input(self) -> None:
        """Copy the terminal's input to the master, in the foreground. Ends with the terminal."""
        raw, pending = False, b""
        os.set_blocking(self.master, False)
        while not self._over:
            if not _in_foreground():
                raw = False
                select.select([self._woken], [], [], _POLL_SECONDS)
                continue
            if not raw:
                self._make_raw()
                raw = True
            sources = [self._woken, *([] if pending else [0])]
            ready, writable, _ = select.select(sources, [self.master] if pending else [], [], _POLL_SECONDS)
            try:
                if writable:
                    pending = pending[os.write(self.master, pending) :]
                elif 0 in ready and not self._over and _in_foreground():
                    pending = os.read(0, _CHUNK)
                    if not pending:
                        return
            except BlockingIOError:
                continue
            except OSError:
                return

    def _relay_output(self) -> None:
        """Copy the container's output to the terminal, until all slaves are closed (EIO; pty(7))."""
        broken = False
        sources = [self.master, *([self._woken] if self._outlived else [])]
        while True:
            try:
                # Asking takes what slaves have written into account (drivers/tty/n_tty.c, n_tty_poll).
                if self.master not in select.select(sources, [], [])[0]:
                    return
                data = os.read(self.master, _CHUNK)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not data:
                return
            while data and not broken:
                try:
                    data = data[os.write(self._output, data) :]
                except BlockingIOError:
                    select.select([], [self._output], [])
                except OSError as error:
                    # A lost terminal must not stop the command: its output is discarded.
                    broken = error.errno != errno.EINTR


def _in_foreground() -> bool:
    """Return whether this process may read stdin; always without job control (another session's terminal)."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return True


def _raw(saved: list[Any], *, keep_output: bool) -> list[Any]:
    """Return raw settings as cfmakeraw(3) (Python 3.12); `keep_output` keeps output processing."""
    iflag, oflag, cflag, lflag, ispeed, ospeed, cc = saved
    iflag &= ~(
        termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR | termios.IGNCR
        | termios.ICRNL | termios.IXON
    )  # fmt: skip
    if not keep_output:
        oflag &= ~termios.OPOST
    cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    cc = list(cc)
    cc[termios.VMIN], cc[termios.VTIME] = 1, 0
    return [iflag, oflag, cflag, lflag, ispeed, ospeed, cc]
