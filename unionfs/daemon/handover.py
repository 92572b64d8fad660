"""One call that a launcher hands over: read, compared, accepted, and run in place of the launcher.

The launcher (launcher/fuse-unionfs.c) sends a header, its directory and standard files by SCM_RIGHTS,
and text. The answers are one byte each, `R` with the exit code after it:

    launcher                                       here
    header, directory, stdin, stdout, stderr  →
    identity, arguments, environment          →
                                              ←    A  accepted, with a pidfd of this process, for signals
                                              ←    N  run it yourself: its rights or limits cannot be had here
                                              ←    S  outdated: this is the resident of another version
    G  go on                                  →
                                              ←    R  done: the exit code; or N, after all

Until `G` nothing is changed, so the launcher may give up at any time and run the call itself.
"""

from __future__ import annotations

import array
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from unionfs.daemon.caller import CALLER, MustRunThere
from unionfs.sys.inheritance import has_same_rights, take_over
from unionfs.sys.title import set_title

Run = Callable[[str, Sequence[str]], int]
"""Runs a command, by the name of its program and its arguments. Returns the exit code."""

OUTDATED: Final = 3
"""The exit code of a process that has met a launcher of another version."""

_HEADER: Final = struct.Struct("=5I")  # magic, length, number of arguments, of variables, umask
_MAGIC: Final = 0x31534655
_LARGEST: Final = 16 << 20
_FILES: Final = 4
_SECONDS: Final = 20.0
_CREDENTIALS: Final = struct.Struct("=3i")  # struct ucred: pid, uid, gid
# What only the start of a process reads.
_AT_START: Final = (b"PYTHON", b"LD_", b"MALLOC_", b"GLIBC_")


@dataclass(frozen=True, slots=True)
class _Call:
    identity: str
    arguments: list[str]
    environment: dict[bytes, bytes]
    umask: int
    directory: int
    """An O_PATH fd."""
    files: Sequence[int]
    """Fds of stdin, stdout and stderr."""


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return pid and uid of the process at the other end; unix(7), SO_PEERCRED. Raises OSError."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(found)
    return pid, uid


def serve(connection: socket.socket, identity: str, run: Run) -> int:
    """Serve a call in this process, which is for it alone. Returns the exit code of this process.

    `identity` is that of the launcher that started the resident.
    """
    try:
        connection.settimeout(_SECONDS)
        call = _receive(connection)
        answer = b"S" if call.identity != identity else b"N"
        if answer == b"N" and _become(call, peer_of(connection)[0]) and _is_accepted(connection):
            answer = _run(connection, call.arguments, run)
        connection.sendall(answer)
    except (OSError, ValueError, struct.error):
        return 0  # the launcher has ended, or runs the call itself
    return OUTDATED if answer == b"S" else 0


def _receive(connection: socket.socket) -> _Call:
    """Raises OSError or ValueError."""
    size = socket.CMSG_SPACE(4 * _FILES)
    head, ancillary, _, _ = connection.recvmsg(_HEADER.size, size, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    magic, length, arguments, variables, umask = _HEADER.unpack(head)
    if magic != _MAGIC or length > _LARGEST or len(fds) != _FILES:
        raise ValueError("no call of a launcher")
    text = bytearray()
    while len(text) < length:
        more = connection.recv(length - len(text))
        if not more:
            raise ValueError("the launcher has given up")
        text += more
    words = bytes(text).split(b"\0")
    if len(words) != arguments + variables + 2 or arguments < 1:
        raise ValueError("no call of a launcher")
    pairs = (word.partition(b"=") for word in words[1 + arguments : -1])
    return _Call(
        identity=os.fsdecode(words[0]),
        arguments=[os.fsdecode(word) for word in words[1 : 1 + arguments]],
        environment={name: value for name, equals, value in pairs if equals},
        umask=umask,
        directory=fds[0],
        files=fds[1:],
    )


def _starts_alike(environment: Mapping[bytes, bytes]) -> bool:
    """Return whether an interpreter that starts with these variables is like this one."""
    ours, theirs = (
        {name: value for name, value in some.items() if name.startswith(_AT_START)}
        for some in (os.environb, environment)
    )
    return ours == theirs and _is_utf8(os.environb) == _is_utf8(environment)


def _is_utf8(environment: Mapping[bytes, bytes]) -> bool:
    """Return whether names are UTF-8: PEP 538 and 540 coerce the locale C, too."""
    chosen = (environment.get(name) for name in (b"LC_ALL", b"LC_CTYPE", b"LANG"))
    locale = next((value for value in chosen if value), b"C")
    return locale in (b"C", b"POSIX") or locale.lower().replace(b"-", b"").endswith(b"utf8")


def _become(call: _Call, pid: int) -> bool:
    """Take over what the launcher has. Returns False if it cannot be had: the launcher then runs the call."""
    if not _starts_alike(call.environment) or not has_same_rights(pid):
        return False
    try:
        take_over(pid)
        os.fchdir(call.directory)
    except OSError:
        return False
    for final, fd in enumerate(call.files):
        os.dup2(fd, final)
    for fd in (call.directory, *call.files):
        os.close(fd)
    # As the interpreter makes them: they know whether their files are pipes or terminals.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.umask(call.umask)
    os.environb.clear()
    os.environb.update(call.environment)
    time.tzset()
    set_title(call.arguments, call.environment)
    return True


def _is_accepted(connection: socket.socket) -> bool:
    """Tell the launcher that this process runs the call. Raises OSError if it no longer waits."""
    pidfd = os.pidfd_open(os.getpid())
    socket.send_fds(connection, [b"A"], [pidfd])
    os.close(pidfd)
    if connection.recv(1) != b"G":
        raise BrokenPipeError
    return True


def _run(connection: socket.socket, arguments: Sequence[str], run: Run) -> bytes:
    """Return the answer to the launcher."""
    connection.settimeout(None)
    CALLER.follow(connection)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        code = run(os.path.basename(arguments[0]), arguments[1:])
    except MustRunThere:
        return b"N"
    except BaseException:
        # As the interpreter does.
        sys.excepthook(*sys.exc_info())
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    return b"R" + bytes([code & 0xFF])
