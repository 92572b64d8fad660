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
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Final, NoReturn

import unionfs
from unionfs.daemon.handover import OUTDATED, Run, serve
from unionfs.sys import filelocks
from unionfs.sys.capabilities import in_initial_user_namespace
from unionfs.sys.inheritance import is_alone_in_mount_namespace
from unionfs.sys.peers import peer_of

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
    gc.collect()
    # Collections do not write to what is there by now, so its pages stay shared with the children.
    gc.freeze()
    signal.signal(signal.SIGTERM, _leave)
    resident = _Resident(name, identity, run)
    try:
        resident.listen()
        resident.take(socket.socket(fileno=_CONNECTION))
        resident.serve()
    finally:
        resident.end()


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
        # An ordinary user may not see it, nor make a mount namespace without a user namespace.
        return not in_initial_user_namespace()


class _Resident:
    def __init__(self, name: str, identity: str, run: Run) -> None:
        self._socket_name = f"{name}.sock"
        self._lock_name = f"{name}.lock"
        self._identity = identity
        self._run = run
        self._files = _files()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._poll = select.poll()
        self._children: dict[int, int] = {}
        """Pids by pidfd."""
        self._outdated = False
        self._linked = False

    def listen(self) -> None:
        """Raises OSError."""
        os.umask(0o077)
        with suppress(FileNotFoundError):
            os.unlink(self._socket_name, dir_fd=_DIRECTORY)
        self._listener.bind(f"/proc/self/fd/{_DIRECTORY}/{self._socket_name}")
        self._linked = True
        self._listener.listen(_QUEUE)
        self._listener.setblocking(False)
        self._poll.register(self._listener, select.POLLIN)
        # Now other launchers, which wait for it, can connect.
        os.close(_LOCK)

    def serve(self) -> None:
        idle, looks = _idle_seconds(), _has_own_mount_namespace()
        last = time.monotonic()
        while not self._outdated:
            left = last + idle - time.monotonic()
            wait = min(left, _LOOK_SECONDS) if looks else left
            events = self._poll.poll(max(0, wait) * 1000)
            for fd, _ in events:
                if fd == self._listener.fileno():
                    self._accept()
                    last = time.monotonic()
                else:
                    self._reap(fd)
            if not events and (time.monotonic() >= last + idle or (looks and is_alone_in_mount_namespace())):
                return

    def _accept(self) -> bool:
        """Take one call. Returns False if none waits."""
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return False
        self.take(connection)
        return True

    def take(self, connection: socket.socket) -> None:
        """Fork a process for a call."""
        with connection, suppress(OSError):
            if peer_of(connection).uid != os.geteuid():
                return
            if self._outdated or _files() != self._files:
                self._outdated = True
                connection.send(b"S")
                return
            pid = os.fork()
            if pid == 0:
                self._be_child(connection)
            pidfd = os.pidfd_open(pid)
            self._children[pidfd] = pid
            self._poll.register(pidfd, select.POLLIN)

    def _be_child(self, connection: socket.socket) -> NoReturn:
        code = 1
        try:
            self._listener.close()
            for pidfd in self._children:
                os.close(pidfd)
            code = serve(connection, self._identity, self._run)
        finally:
            # Neither the resident's cleanup nor its buffers.
            os._exit(code)

    def _reap(self, pidfd: int) -> None:
        self._poll.unregister(pidfd)
        _, status = os.waitpid(self._children.pop(pidfd), 0)
        os.close(pidfd)
        if os.waitstatus_to_exitcode(status) == OUTDATED:
            self._outdated = True

    def end(self) -> None:
        """Remove its files. Calls that have arrived by now are still taken."""
        if not self._linked:
            return
        with suppress(OSError):
            os.unlink(self._socket_name, dir_fd=_DIRECTORY)
        while self._accept():
            pass

        def open_lock() -> int:
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(self._lock_name, flags, dir_fd=_DIRECTORY)

        # Another one, which is being started, holds it.
        with suppress(OSError):
            if filelocks.take(open_lock, self._lock_name, _DIRECTORY) is not None:
                os.unlink(self._lock_name, dir_fd=_DIRECTORY)
