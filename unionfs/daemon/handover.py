"""One call that a launcher hands over: read, compared, accepted, and run in place of the launcher.

The launcher (launcher/fuse-unionfs.c) sends a header and text. The answers are one byte each, `R` with the
exit code after it:

    launcher                                       here
    header, identity, arguments, environment  →
                                              ←    A  accepted, with a pidfd of this process, for signals
                                              ←    N  run it yourself: its rights or limits cannot be had here
                                              ←    S  outdated: this is the resident of another version
    G  go on, with the current directory,
       stdin, stdout and stderr               →
                                              ←    R  done: the exit code; or N, after all

Until `G` nothing is changed, so the launcher may give up at any time and run the call itself.
"""

from __future__ import annotations

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

from unionfs.core.samepages import SamePages
from unionfs.daemon.caller import CALLER, MustRunThere, result
from unionfs.sys.inheritance import has_same_rights, take_over
from unionfs.sys.peers import peer_of
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
# What only the start of a process reads.
_AT_START: Final = (b"PYTHON", b"LD_", b"MALLOC_", b"GLIBC_")


@dataclass(frozen=True, slots=True)
class _Call:
    identity: str
    arguments: list[str]
    environment: dict[bytes, bytes]
    umask: int


def serve(
    connection: socket.socket,
    identity: str,
    run: Run,
    pages: SamePages | None,
    is_current: Callable[[], bool],
) -> int:
    """Serve a call in this process, which is for it alone. Returns the exit code of this process.

    `identity` is that of the launcher that started the resident, `pages` what a daemon may share of its
    memory. `is_current` returns whether the files of this version are still there.
    """
    try:
        connection.settimeout(_SECONDS)
        call = _receive(connection)
        answer = b"S" if call.identity != identity or not is_current() else b"N"
        if answer == b"N" and _become(call, peer_of(connection).pid) and _has_files(connection):
            CALLER.follow(connection, pages)
            answer = _run(connection, call.arguments, run)
        connection.sendall(answer)
    except (OSError, ValueError, struct.error):
        return 0  # the launcher has ended, or runs the call itself
    return OUTDATED if answer == b"S" else 0


def _receive(connection: socket.socket) -> _Call:
    """Raises OSError or ValueError."""
    magic, length, arguments, variables, umask = _HEADER.unpack(_read(connection, _HEADER.size))
    if magic != _MAGIC or length > _LARGEST:
        raise ValueError("no call of a launcher")
    words = _read(connection, length).split(b"\0")
    if len(words) != arguments + variables + 2 or arguments < 1:
        raise ValueError("no call of a launcher")
    pairs = (word.partition(b"=") for word in words[1 + arguments : -1])
    return _Call(
        identity=os.fsdecode(words[0]),
        arguments=[os.fsdecode(word) for word in words[1 : 1 + arguments]],
        environment={name: value for name, equals, value in pairs if equals},
        umask=umask,
    )


def _read(connection: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        more = connection.recv(size - len(found))
        if not more:
            raise ValueError("the launcher has given up")
        found += more
    return bytes(found)


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
    except OSError:
        return False
    os.umask(call.umask)
    _set_environment(call.environment)
    time.tzset()
    set_title(call.arguments, call.environment)
    return True


def _set_environment(environment: Mapping[bytes, bytes]) -> None:
    ours = dict(os.environb)
    for name in ours.keys() - environment.keys():
        del os.environb[name]
    for name, value in environment.items():
        if ours.get(name) != value:
            os.environb[name] = value


def _has_files(connection: socket.socket) -> bool:
    """Accept the call, and take over the launcher's directory and standard files.

    Returns False if that is not possible. Raises OSError if the launcher no longer waits.
    """
    pidfd = os.pidfd_open(os.getpid())
    socket.send_fds(connection, [b"A"], [pidfd])
    os.close(pidfd)
    answer, fds, _, _ = socket.recv_fds(connection, 1, _FILES, socket.MSG_CMSG_CLOEXEC)
    if answer != b"G":
        raise BrokenPipeError
    if len(fds) != _FILES:
        return False
    directory, *files = fds
    try:
        os.fchdir(directory)
    except OSError:
        return False
    for final, fd in enumerate(files):
        os.dup2(fd, final)
    for fd in fds:
        os.close(fd)
    # As the interpreter makes them: they know whether their files are pipes or terminals.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    return True


def _run(connection: socket.socket, arguments: Sequence[str], run: Run) -> bytes:
    """Return the answer to the launcher."""
    connection.settimeout(None)
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
    return result(code)
