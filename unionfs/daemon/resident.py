"""The resident: a process with everything imported, which forks one process for each mount.

A launcher that finds none starts it, with three fds: the connection of its call, the runtime directory, and
a lock. The resident listens there on a socket that its user alone can reach; it answers no other user. It
ends when it has had no call for some minutes, when its files have changed, and in a mount namespace of its
own soon after the last other process there.

It touches nothing that its callers name: all that is done in the process forked for the call.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Final, NoReturn

import unionfs
from unionfs.core.forking import IDLE, REFUSED, Forking
from unionfs.core.samepages import SamePages
from unionfs.daemon.handover import OUTDATED, Run, serve
from unionfs.daemon.rehearsal import rehearse
from unionfs.sys import filelocks
from unionfs.sys.capabilities import in_initial_user_namespace
from unionfs.sys.inheritance import is_alone_in_mount_namespace

SETTING: Final = "UNIONFS_RESIDENT_SECONDS"
"""The variable with the seconds without a call after which it ends; 0: the launchers use none."""
_SECONDS: Final = 300.0
_LOOK_SECONDS: Final = 2.0
_QUEUE: Final = 128
# Its fds at the start: launcher/fuse-unionfs.c
_CONNECTION: Final = 3
_DIRECTORY: Final = 4
_LOCK: Final = 5


def reside(name: str, identity: str, run: Run) -> None:
    """Serve calls until nobody needs it any more.

    `name` is that of its files in the runtime directory, without suffix, and `identity` that of its launcher.
    Call it when everything is imported.
    """
    signal.signal(signal.SIGTERM, _leave)
    # Ignored by the caller of the first launcher, it would hide how processes ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    resident = _Resident(name)
    rehearse(f"/proc/self/fd/{_DIRECTORY}/{name}.rehearsal")
    pages = None
    with suppress(OSError):
        pages = SamePages()
    files = _files()
    gc.collect()
    # Collections do not write to what is there by now, so its pages stay shared with the children.
    gc.freeze()
    connection = resident.serve()
    if connection < 0:
        return
    code = 1
    try:
        code = serve(socket.socket(fileno=connection), identity, run, pages, lambda: _are_unchanged(files))
    finally:
        # Neither the resident's cleanup nor its buffers.
        os._exit(code)


def _leave(*_: object) -> NoReturn:
    raise SystemExit(0)


def _files() -> dict[str, tuple[int, int]]:
    """Return the imported files of this package, with inode and mtime."""
    root = os.path.dirname(unionfs.__file__)
    found = {}
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if path is not None and path.startswith(root):
            with suppress(OSError):
                status = os.stat(path)
                found[path] = (status.st_ino, status.st_mtime_ns)
    return found


def _are_unchanged(files: Mapping[str, tuple[int, int]]) -> bool:
    try:
        return all(
            ((status := os.stat(path)).st_ino, status.st_mtime_ns) == known for path, known in files.items()
        )
    except OSError:
        return False


def _idle_seconds() -> float:
    try:
        return float(os.environ[SETTING])
    except (KeyError, ValueError):
        return _SECONDS


def _has_own_mount_namespace() -> bool:
    """Return whether the mount namespace may be a short-lived one: not the one of pid 1."""
    try:
        return os.stat("/proc/1/ns/mnt").st_ino != os.stat("/proc/self/ns/mnt").st_ino
    except OSError:
        # Root may have fewer capabilities than pid 1. An ordinary user may not see it, nor make a mount
        # namespace without a user namespace.
        return os.geteuid() == 0 or not in_initial_user_namespace()


class _Resident:
    def __init__(self, name: str) -> None:
        self._socket_name = f"{name}.sock"
        self._lock_name = f"{name}.lock"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._forking = Forking(self._listener.fileno(), _CONNECTION, OUTDATED)
        self._linked = False

    def serve(self) -> int:
        """Serve until nobody needs it. Returns -1 then, and in each forked process its connection.

        Raises OSError.
        """
        connection = IDLE
        try:
            self._listen()
            connection = self._wait()
        except SystemExit:
            pass
        except BaseException:
            self._end()
            raise
        if connection < 0:
            connection = self._end()
        self._listener.close()
        return connection

    def _listen(self) -> None:
        os.umask(0o077)
        with suppress(FileNotFoundError):
            os.unlink(self._socket_name, dir_fd=_DIRECTORY)
        self._listener.bind(f"/proc/self/fd/{_DIRECTORY}/{self._socket_name}")
        self._linked = True
        self._listener.listen(_QUEUE)
        # Now other launchers, which wait for it, can connect.
        os.close(_LOCK)

    def _wait(self) -> int:
        idle, looks = _idle_seconds(), _has_own_mount_namespace()
        if not looks:
            return self._forking.next(int(idle * 1000))
        last, forked = time.monotonic(), self._forking.forked
        while (left := last + idle - time.monotonic()) > 0:
            found = self._forking.next(int(min(left, _LOOK_SECONDS) * 1000))
            if found != IDLE or is_alone_in_mount_namespace():
                return found
            if forked != self._forking.forked:
                last, forked = time.monotonic(), self._forking.forked
        return IDLE

    def _end(self) -> int:
        """Remove its files. Calls that have arrived by now are still taken: returns as `serve`."""
        if not self._linked:
            return IDLE
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with suppress(OSError):
            os.unlink(self._socket_name, dir_fd=_DIRECTORY)
        while (connection := self._forking.next(0)) == REFUSED:
            pass
        if connection == IDLE:
            self._remove_lock()
        return connection

    def _remove_lock(self) -> None:
        def open_lock() -> int:
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(self._lock_name, flags, dir_fd=_DIRECTORY)

        # Another one, which is being started, holds it.
        with suppress(OSError):
            if filelocks.take(open_lock, self._lock_name, _DIRECTORY) is not None:
                os.unlink(self._lock_name, dir_fd=_DIRECTORY)
