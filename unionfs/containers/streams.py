"""Pipes between the caller's standard files and the container's.

A container with one of the caller's files as stdin or stdout could misuse it: open /proc/self/fd/0 for
writing, change owner and mode, send descriptors through a socket. So the container gets pipes, as in Docker,
and their data is copied. Terminals are replaced by a pty instead.

stdout and stderr that are one file (`2>&1`) share a pipe, which keeps their order.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import termios
import threading
from collections.abc import Callable, Collection
from contextlib import suppress

from unionfs.errors import UserError, on_failure, reason
from unionfs.sys.fds import close_quietly

_CHUNK = 1 << 18
_POLL_SECONDS = 0.05
_INPUT_SECONDS = 1.0
_GONE = select.POLLERR | select.POLLHUP | select.POLLNVAL


class Streams:
    """Pipes in place of some standard files; `ends` maps the replaced fd numbers to the container's ends."""

    def __init__(self, fds: Collection[int], *, outlived: bool = False) -> None:
        """`fds`: which of 0 to 2 get a pipe. Raises UserError.

        With `outlived`, other processes may keep the pipes: `finish` copies what is in them.
        """
        self._outlived = outlived
        self.ends: dict[int, int] = {}
        #: Both ends of stdin's pipe: data left in it at the end has not been read.
        self._input: tuple[int, ...] | None = None
        self._outputs: list[tuple[int, int]] = []
        self._threads: list[threading.Thread] = []
        self._reader: threading.Thread | None = None
        self._pending = b""
        self._error: OSError | None = None
        with on_failure("the container cannot get pipes", "raise `ulimit -n`"):
            self._woken, self._wake = os.pipe()
            for fd in sorted(fds):
                if fd == 2 and 1 in self.ends and os.path.sameopenfile(1, 2):
                    self.ends[2] = self.ends[1]
                    continue
                reader, writer = os.pipe()
                if fd == 0:
                    self.ends[0], self._input = reader, (os.dup(reader), writer)
                    os.set_blocking(writer, False)
                else:
                    self.ends[fd] = writer
                    self._outputs.append((reader, fd))

    def close_ends(self) -> None:
        """Close this process's copies of the container's ends."""
        for fd in set(self.ends.values()):
            os.close(fd)

    def start(self) -> None:
        """Start to copy. Signals must be blocked: the threads leave them to the caller."""
        for reader, target in self._outputs:
            thread = threading.Thread(target=self._copy_output, args=(reader, target), daemon=True)
            self._threads.append(thread)
        if self._input is not None:
            self._reader = threading.Thread(target=self._copy_input, args=(self._input[1],), daemon=True)
            self._reader.start()
        for thread in self._threads:
            thread.start()

    def finish(self, give_up: Callable[[], bool]) -> None:
        """Put back unread input, and copy the remaining output until its end or `give_up()`.

        All processes of the container have ended, or the pipes are `outlived`. Raises UserError if the output
        cannot be written.
        """
        os.write(self._wake, b".")
        if self._reader is not None and self._input is not None:
            self._reader.join(_INPUT_SECONDS)
            if not self._reader.is_alive():
                self._give_back(self._input[0])
        for thread in self._threads:
            while thread.is_alive() and not give_up():
                thread.join(_POLL_SECONDS)
        if self._error is not None:
            raise UserError(
                f"the command's output cannot be written: {reason(self._error)}; part of it is lost."
            ) from self._error

    def close(self) -> None:
        """Close what `finish` has left open; a reader that still waits keeps its ends."""
        if self._reader is None or not self._reader.is_alive():
            for fd in (self._woken, self._wake, *(self._input or ())):
                close_quietly(fd)

    def _give_back(self, reader: int) -> None:
        """Leave the rest of a file for the next reader: `while read line; do unionfs run ...; done <FILE`."""
        unread = struct.unpack("i", fcntl.ioctl(reader, termios.FIONREAD, b"\0" * 4))[0] + len(self._pending)
        with suppress(OSError):
            os.lseek(0, -unread, os.SEEK_CUR)

    def _copy_input(self, writer: int) -> None:
        """Copy stdin until its end, or until the container has ended."""
        while True:
            poll = select.poll()
            poll.register(self._woken, select.POLLIN)
            if self._pending:
                poll.register(writer, select.POLLOUT)
            else:
                poll.register(0, select.POLLIN)
            if any(fd == self._woken for fd, _ in poll.poll()):
                return
            try:
                if self._pending:
                    self._pending = self._pending[os.write(writer, self._pending) :]
                else:
                    self._pending = os.read(0, _CHUNK)
                    if not self._pending:
                        break
            except BlockingIOError:
                continue
            except OSError:
                break
        os.close(writer)
        self._input = (self._input[0],) if self._input else None

    def _copy_output(self, reader: int, target: int) -> None:
        """Copy to the caller's file until all processes of the container have closed the pipe."""
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        poll.register(target, 0)
        if self._outlived:
            poll.register(self._woken, select.POLLIN)
        try:
            while True:
                ready = dict(poll.poll())
                if ready.get(target, 0) & _GONE or set(ready) == {self._woken}:
                    return
                if reader not in ready:
                    continue
                data = memoryview(os.read(reader, _CHUNK))
                if not data:
                    return
                while data:
                    try:
                        data = data[os.write(target, data) :]
                    except BlockingIOError:
                        select.select([], [target], [])
        except OSError as error:
            # EPIPE: the caller's reader has ended; the command gets SIGPIPE.
            if error.errno != errno.EPIPE:
                self._error = error
        finally:
            os.close(reader)
