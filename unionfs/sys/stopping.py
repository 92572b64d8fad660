"""Stops other processes for a moment, by ptrace(2): neither they nor their parents get a signal that they
see, and if this process ends, they go on.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

from unionfs.sys.mountusers import place_of

_SEIZE: Final = 0x4206
_INTERRUPT: Final = 0x4207
_DETACH: Final = 17
_WALL: Final = 0x40000000
_ROUNDS: Final = 10
_POLL_SECONDS: Final = 0.0005

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class Stopped:
    """The threads that are stopped, until the end of the context. Use it in one thread."""

    def __init__(self) -> None:
        self._stopped: set[int] = set()
        self._waiting: set[int] = set()
        #: The processes that are stopped, and those that cannot be.
        self.pids: set[int] = set()
        self.refused: set[int] = set()

    def __enter__(self) -> Stopped:
        return self

    def __exit__(self, *exc: object) -> None:
        self._wait(time.monotonic() + 1)
        for tid in self._stopped:
            _ptrace(_DETACH, tid)
        self._stopped.clear()

    def stop_all(self, find: Callable[[], Iterable[int]], seconds: float) -> bool:
        """Stop all processes that ``find`` returns, until it returns no others. Returns whether all are
        stopped within that time."""
        deadline = time.monotonic() + seconds
        for _ in range(_ROUNDS):
            new = set(find()) - self.pids - self.refused
            for pid in new:
                self._seize(pid)
            self._wait(deadline)
            if not new or time.monotonic() > deadline:
                break
        return not self.refused and not self._waiting

    def _seize(self, pid: int) -> None:
        """Stop a process; a thread that another one makes meanwhile is found in another round."""
        known = self._stopped | self._waiting
        for _ in range(_ROUNDS):
            try:
                found = {int(name) for name in os.listdir(f"/proc/{pid}/task")} - known
            except OSError:
                return  # it has ended
            if not found:
                break
            for tid in found:
                known.add(tid)
                if _ptrace(_SEIZE, tid):
                    _ptrace(_INTERRUPT, tid)
                    self._waiting.add(tid)
                elif os.path.exists(f"/proc/{pid}/task/{tid}"):
                    self.refused.add(pid)
                    return
        self.pids.add(pid)

    def _wait(self, deadline: float) -> None:
        while self._waiting:
            for tid in list(self._waiting):
                with suppress(ChildProcessError):
                    done, status = os.waitpid(tid, os.WNOHANG | _WALL)
                    if not done:
                        continue
                    if os.WIFSTOPPED(status):
                        self._stopped.add(tid)
                self._waiting.discard(tid)
            if time.monotonic() > deadline:
                return
            if self._waiting:
                time.sleep(_POLL_SECONDS)


def _ptrace(request: int, tid: int) -> bool:
    return int(_libc.ptrace(request, tid, None, None)) == 0


def writers(device: str) -> set[int]:
    """The visible processes, without this one, that have files of a filesystem (`major:minor`) open or mapped
    to write."""
    found = set()
    major, minor = map(int, device.split(":"))
    text = f" {major:02x}:{minor:02x} ".encode()
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            with suppress(OSError):
                if _writes(int(name), device) or _maps(int(name), text):
                    found.add(int(name))
    return found


def _writes(pid: int, device: str) -> bool:
    path = f"/proc/{pid}/fd"
    for name in os.listdir(path):
        with suppress(OSError):
            # The link's own mode has the fd's: readable, writable (proc_pid_fd(5)).
            if os.lstat(f"{path}/{name}").st_mode & 0o200 and place_of(f"{path}/{name}")[0] == device:
                return True
    return False


def _maps(pid: int, device: bytes) -> bool:
    with open(f"/proc/{pid}/maps", "rb") as maps:
        return any(b"rw-s" in line and device in line for line in maps)
