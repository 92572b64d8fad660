"""The actions of an attacker: `Worker` runs them with another uid, so each is a top-level function."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from typing import Any

from tests.support import syscalls

_stop = threading.Event()
_kept: list[Any] = []


def plant(path: str, what: str) -> None:
    """Create a FIFO, /dev/zero, a directory or another obstacle at `path`."""
    match what:
        case "fifo":
            os.mkfifo(path)
        case "zero":
            os.symlink("/dev/zero", path)
        case "huge":
            with open(path, "wb") as file:
                file.truncate(1 << 40)
        case "nested":
            with open(path, "w") as file:
                file.write("[" * 1_000_000)
        case "directory":
            os.mkdir(path)
        case "socket":
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen(1)
            _kept.append(listener)


def swap(one: str, other: str, pause: float = 0) -> None:
    """Exchange two names repeatedly until `stop`, with a pause of that many seconds."""
    _stop.clear()

    def run() -> None:
        while not _stop.is_set():
            with contextlib.suppress(OSError):
                syscalls.renameat2(one, other, syscalls.RENAME_EXCHANGE)
            if pause:
                time.sleep(pause)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    _kept.append(thread)


def stop() -> None:
    """End `swap` and `lie`."""
    _stop.set()
    for thread in _kept:
        if isinstance(thread, threading.Thread):
            thread.join(5)


def started() -> int:
    """The start time of this process, as in proc_pid_stat(5)."""
    with open("/proc/self/stat", "rb") as stat:
        return int(stat.read().rpartition(b")")[2].split()[19])


def lie(name: str, how: str, answer: dict[str, Any]) -> None:
    """Listen under an abstract name like a daemon, and answer each connection incorrectly."""
    _stop.clear()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("\0" + name)
    listener.listen(64)
    _kept.append(listener)

    def talk(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            if how == "endless":
                while not _stop.is_set():
                    connection.sendall(b" " * 65536)
            elif how == "drip":
                while not _stop.is_set():
                    connection.sendall(b" ")
                    time.sleep(0.1)
            elif how == "silent":
                _stop.wait(60)
            elif how == "nested":
                connection.sendall(b"[" * 500_000)
            else:
                connection.recv(4096)  # the question: a daemon that has closed before it comes is not heard
                connection.sendall(json.dumps(answer).encode())

    def run() -> None:
        while not _stop.is_set():
            connection, _ = listener.accept()
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()


def ask(name: str) -> bytes:
    """The answer of a daemon to this process, under its abstract name."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect("\0" + name)
        with contextlib.suppress(OSError):
            connection.sendall(b"{}\n")
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                found += piece
        return found


def call_resident(path: str, message: bytes) -> bytes:
    """The answer of a resident to this message."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(path)
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(message)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                found += piece
        return found


_accepted: list[bytes] = []


def listen(path: str) -> None:
    """Listen at a unix socket that all users may write, and store the received data."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o777)
    listener.listen(64)
    _kept.append(listener)

    def run() -> None:
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                _accepted.append(connection.recv(65536))

    threading.Thread(target=run, daemon=True).start()


def accepted() -> int:
    """The number of requests received by `listen`."""
    return sum(map(bool, _accepted))


def hold_lock(path: str) -> None:
    """Hold flock(2) on a directory until this process ends."""
    import fcntl

    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    _kept.append(fd)


def replace_new(directory: str, prefix: str, victim: str) -> None:
    """Replace each new directory with one that contains symlinks to `victim`, until `stop`."""
    _stop.clear()

    def run() -> None:
        count = 0
        while not _stop.is_set():
            for name in os.listdir(directory):
                path = f"{directory}/{name}"
                if not name.startswith(prefix) or os.stat(path).st_uid == os.geteuid():
                    continue
                with contextlib.suppress(OSError):
                    os.rename(path, f"{directory}/aside{count}")
                    os.mkdir(path)
                    for planted in ("source", "target", "RENAME_EXCHANGE.a", "RENAME_WHITEOUT.a", "whiteout"):
                        os.symlink(victim, f"{path}/{planted}")
                    count += 1

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    _kept.append(thread)
