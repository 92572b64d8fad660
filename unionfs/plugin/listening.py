"""The socket of the plugin: its own, or the one that systemd passes; and what systemd wants to know."""

from __future__ import annotations

import os
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from unionfs.errors import UserError, on_failure, quoted, reason
from unionfs.sys import fds

_FIRST_PASSED: Final = 3
"""SD_LISTEN_FDS_START, sd_listen_fds(3)."""
_LONGEST: Final = 107
"""sun_path without its NUL, unix(7)."""
_BACKLOG: Final = 512


def passed_socket() -> socket.socket | None:
    """The listening socket that systemd passes to this process, or None; sd_listen_fds(3).

    Raises UserError for anything but one unix stream socket.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return None
    try:
        if count != "1":
            raise ValueError(f"{count} sockets")
        os.set_inheritable(_FIRST_PASSED, False)
        listener = socket.socket(fileno=_FIRST_PASSED)
        if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_STREAM:
            raise ValueError("not a unix stream socket")
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ValueError("a socket that does not listen (Accept=yes)")
    except (OSError, ValueError) as error:
        cause = reason(error) if isinstance(error, OSError) else str(error)
        raise UserError(
            f"the plugin cannot use what systemd passes ({cause}); give its .socket unit one "
            "ListenStream=/PATH and Accept=no."
        ) from error
    return listener


@contextmanager
def own_socket(path: str) -> Iterator[socket.socket]:
    """A socket that listens at `path` with mode 0600, and is removed afterwards. Raises UserError.

    A socket without a listener is replaced; missing directories are created with mode 0700.
    """
    path = os.path.abspath(path)
    if len(os.fsencode(path)) > _LONGEST:
        raise UserError(f"the socket {quoted(path)} has more than {_LONGEST} bytes; choose a shorter path.")
    directory, name = os.path.split(path)
    with on_failure(f"the socket {quoted(path)} cannot be made", "choose another with --socket"):
        _make_directories(directory)
        with fds.directory(directory) as at:
            _check_directory(directory, os.fstat(at))
            _refuse_taken(path)
            listener, identity = _bound(at, name)
    try:
        yield listener
    finally:
        with suppress(OSError):
            if _identity(os.lstat(path)) == identity:
                os.unlink(path)
        listener.close()


def _make_directories(path: str) -> None:
    if not os.path.isdir(path):
        _make_directories(os.path.dirname(path))
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)


def _check_directory(path: str, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise UserError(
            f"{quoted(path)} belongs to uid {status.st_uid}, who could replace the socket there; choose "
            "another directory."
        )
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise UserError(
            f"{quoted(path)} is writable by its group or others, who could replace the socket there; run "
            f"`chmod go-w {quoted(path)}`, or choose another directory."
        )


def _refuse_taken(path: str) -> None:
    """Raise UserError if a process listens at the path, or if it is not a socket."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise UserError(f"{quoted(path)} exists and is not a socket; move it away, or choose another.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except BlockingIOError:
            pass  # its backlog is full
    raise UserError(f"a process listens at {quoted(path)} already; end it, or choose another socket.")


def _bound(at: int, name: str) -> tuple[socket.socket, tuple[int, int]]:
    """A listening socket that has appeared under its name with its final mode, and its identity."""
    temporary = f".{secrets.token_hex(8)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The file gets the mode of the socket less the umask (unix(7)); connect(2) needs write permission.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(f"/proc/self/fd/{at}/{temporary}")
        try:
            listener.listen(_BACKLOG)
            identity = _identity(os.stat(temporary, dir_fd=at, follow_symlinks=False))
            os.rename(temporary, name, src_dir_fd=at, dst_dir_fd=at)
        except BaseException:
            os.unlink(temporary, dir_fd=at)
            raise
    except BaseException:
        listener.close()
        raise
    return listener, identity


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
