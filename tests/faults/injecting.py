"""Makes any system call of a running process fail, or ends the process there: ptrace(2), without its help.

`Injector` stops the process at each system call of each of its threads. Those that can fail because of a
filesystem, a limit or a lack of memory are *points*: they are counted, and one of them fails with an errno
instead of being made, or the process is killed before it. close(2) is made, and then reports the error, as on
Linux. What has nothing to do with files is no point: waiting, memory, the daemon's own wake-ups, the device.

Only for x86-64: elsewhere `reason` says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import queue
import signal
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support.patience import patient

_SEIZE, _INTERRUPT, _SYSCALL, _SYSCALL_INFO, _POKEUSER = 0x4206, 0x4207, 24, 0x420E, 6
_SYSGOOD, _FORK, _VFORK, _CLONE, _EXEC = 1, 2, 4, 8, 16
_ENTRY, _EXIT = 1, 2
_WALL, _WNOTHREAD = 0x40000000, 0x20000000
_TRACE_STOP: Final = 128  # PTRACE_EVENT_STOP
_RAX, _ORIG_RAX = 80, 120  # offsets in struct user, sys/user.h
_UNSIGNED: Final = (1 << 64) - 1

# arch/x86/entry/syscalls/syscall_64.tbl: what can be a point
_CALLS: Final = {
    0: "read", 1: "write", 3: "close", 4: "stat", 5: "fstat", 6: "lstat", 8: "lseek", 16: "ioctl", 17:
    "pread64", 18: "pwrite64", 19: "readv", 20: "writev", 21: "access", 32: "dup", 33: "dup2", 40:
    "sendfile", 72: "fcntl", 73: "flock", 74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate", 80:
    "chdir", 81: "fchdir", 82: "rename", 83: "mkdir", 84: "rmdir", 85: "creat", 86: "link", 87: "unlink",
    88: "symlink", 89: "readlink", 90: "chmod", 91: "fchmod", 92: "chown", 93: "fchown", 94: "lchown", 133:
    "mknod", 137: "statfs", 138: "fstatfs", 162: "sync", 165: "mount", 166: "umount2", 188: "setxattr", 189:
    "lsetxattr", 190: "fsetxattr", 191: "getxattr", 192: "lgetxattr", 193: "fgetxattr", 194: "listxattr",
    195: "llistxattr", 196: "flistxattr", 197: "removexattr", 198: "lremovexattr", 199: "fremovexattr", 217:
    "getdents64", 253: "inotify_init", 254: "inotify_add_watch", 257: "openat", 258: "mkdirat", 259:
    "mknodat", 260: "fchownat", 262: "newfstatat", 263: "unlinkat", 264: "renameat", 265: "linkat", 266:
    "symlinkat", 267: "readlinkat", 268: "fchmodat", 269: "faccessat", 275: "splice", 280: "utimensat", 285:
    "fallocate", 292: "dup3", 295: "preadv", 296: "pwritev", 303: "name_to_handle_at", 304:
    "open_by_handle_at", 306: "syncfs", 316: "renameat2", 326: "copy_file_range", 327: "preadv2", 328:
    "pwritev2", 332: "statx", 428: "open_tree", 429: "move_mount", 430: "fsopen", 431: "fsconfig", 432:
    "fsmount", 433: "fspick", 437: "openat2", 439: "faccessat2", 442: "mount_setattr", 452: "fchmodat2",
}  # fmt: skip
_BY_PATH: Final = {
    4, 6, 21, 76, 80, 82, 83, 84, 85, 86, 87, 88, 89, 90, 92, 94, 137, 188, 189, 191, 192, 194, 195, 197,
    198,
}  # fmt: skip
_BY_FD: Final = {
    0, 1, 3, 5, 8, 16, 17, 18, 19, 20, 32, 33, 40, 72, 73, 74, 75, 77, 81, 91, 93, 138, 190, 193, 196, 199,
    217, 275, 285, 292, 295, 296, 306, 326, 327, 328,
}  # fmt: skip
_AT: Final = {
    257, 258, 259, 260, 262, 263, 264, 265, 267, 268, 269, 280, 303, 316, 332, 428, 437, 439, 442, 452,
}  # fmt: skip
_CLOSE: Final = 3

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_ulong, ctypes.c_void_p)


def reason() -> str | None:
    """Why calls cannot be injected here; None if they can."""
    if platform.machine() != "x86_64":
        return f"system calls are injected on x86-64 only, this is {platform.machine()}"
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if scope.exists() and scope.read_text().strip() == "3":
        return "kernel.yama.ptrace_scope is 3: this host allows no ptrace"
    return None


KILL: Final = -1
"""In place of an errno: the process is killed before the call."""


@dataclass
class Fault:
    """The ``number``-th point fails with ``error``, or `KILL`; ``lasts``: all later ones of that call too.

    ``on``: only points that begin and end so are counted.
    """

    number: int
    error: int
    lasts: bool = False
    on: tuple[str, str] = ("", "")
    #: The call that failed, and what it was made on.
    hit: str = ""
    _call: int = field(default=-1, repr=False)
    _count: int = field(default=0, repr=False)

    def hits(self, call: int, what: str) -> bool:
        """Whether the next point, that call, fails."""
        is_counted = what.startswith(self.on[0]) and what.endswith(self.on[1])
        self._count += is_counted
        if is_counted and self._count == self.number:
            self._call = call
            return True
        return self.lasts and bool(self.hit) and call == self._call

    def __str__(self) -> str:
        what = "kill" if self.error == KILL else _name(self.error)
        return f"{what}{' from' if self.lasts else ''} at {self.number} ({self.hit or 'not reached'})"


def _name(error: int) -> str:
    import errno

    return errno.errorcode.get(error, str(error))


@dataclass
class _Thread:
    #: What happens to the call that it is in: the result it gets instead of its own.
    result: int | None = None


class Injector:
    """Traces a process until it ends or the context is left."""

    def __init__(
        self, pid: int, *, children: bool = False, answers: bool = False,
        skips: Callable[[str], bool] | None = None,
    ) -> None:  # fmt: skip
        """``children``: also trace forked processes. ``answers``: FUSE answers are points, too. ``skips``:
        paths whose calls are not counted."""
        self._pid, self._children, self._answers, self._skips = pid, children, answers, skips
        self._threads: dict[int, _Thread] = {}
        self._lock = threading.Lock()
        self._fault: Fault | None = None
        self._calls: list[str] | None = None
        self._started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._leaves = False
        self._thread = threading.Thread(target=self._run, name="injector", daemon=True)

    def __enter__(self) -> Injector:
        self._thread.start()
        if (error := self._started.get(timeout=patient(20))) is not None:
            raise error
        return self

    def __exit__(self, *exc: object) -> None:
        """Let go of the process: the kernel detaches it when the tracing thread ends.

        That waits for a stop, so the process gets a signal which it ignores, but which stops it while traced.
        """
        self._leaves = True
        for tid in list(self._threads):
            with contextlib.suppress(ProcessLookupError):
                os.kill(tid, signal.SIGURG)
        self._thread.join(patient(20))

    def arm(self, fault: Fault | None = None) -> None:
        """Count points from now on, and let that one fail."""
        with self._lock:
            self._fault, self._calls = fault, []

    def disarm(self) -> list[str]:
        """No longer. Returns the points since then."""
        with self._lock:
            calls, self._calls, self._fault = self._calls or [], None, None
        return calls

    # -- the tracing thread: ptrace(2) takes requests of this one alone ---------------------------------

    def _run(self) -> None:
        try:
            self._attach()
        except BaseException as error:
            self._started.put(error)
            return
        self._started.put(None)
        while not self._leaves and self._step():
            pass

    def _attach(self) -> None:
        options = _SYSGOOD | _CLONE
        if self._children:
            options |= _FORK | _VFORK | _EXEC
        for entry in os.listdir(f"/proc/{self._pid}/task"):
            tid = int(entry)
            _ptrace(_SEIZE, tid, 0, options)
            self._threads[tid] = _Thread()
            _ptrace(_INTERRUPT, tid, 0, 0)

    def _step(self) -> bool:
        """Wait for the next stop. Returns whether there may be more."""
        try:
            tid, status = os.waitpid(-1, _WALL | _WNOTHREAD)
        except ChildProcessError:
            return False
        if not os.WIFSTOPPED(status):
            self._threads.pop(tid, None)
            return bool(self._threads)
        thread = self._threads.setdefault(tid, _Thread())
        number, event = os.WSTOPSIG(status), status >> 16
        if number == signal.SIGTRAP | 0x80:
            with self._lock:
                killed = self._at_call(tid, thread)
            if killed:
                os.kill(_process_of(tid), signal.SIGKILL)
                return True
            number = 0
        elif event:
            number = 0
        _ptrace(_SYSCALL, tid, 0, number, quiet=True)
        return True

    def _at_call(self, tid: int, thread: _Thread) -> bool:
        """Returns whether the process is to be killed."""
        info = ctypes.create_string_buffer(88)
        if _ptrace(_SYSCALL_INFO, tid, 88, ctypes.addressof(info), quiet=True) <= 0:
            return False
        kind = info.raw[0]
        if kind == _EXIT:
            if thread.result is not None:
                _ptrace(_POKEUSER, tid, _RAX, thread.result & _UNSIGNED, quiet=True)
                thread.result = None
            return False
        if kind != _ENTRY or self._calls is None:
            return False
        call, *arguments = struct.unpack_from("<7Q", info.raw, 24)
        what = self._point(tid, call, arguments)
        if what is None:
            return False
        self._calls.append(what)
        fault = self._fault
        if fault is None or not fault.hits(call, what):
            return False
        fault.hit = fault.hit or what
        if fault.error == KILL:
            return True
        thread.result = -fault.error
        if call != _CLOSE:
            _ptrace(_POKEUSER, tid, _ORIG_RAX, _UNSIGNED, quiet=True)
        return False

    def _point(self, tid: int, call: int, arguments: list[int]) -> str | None:
        """What to call a call that is a point."""
        name = _CALLS.get(call)
        if name is None:
            return None
        if call in _BY_FD:
            at = _fd_path(tid, arguments[0])
            if self._answers and at == "/dev/fuse" and name in ("write", "writev"):
                return f"{name} an answer"
            if at.startswith(("anon_inode:", "pipe:", "socket:", "/dev/")):
                return None
        elif call in _BY_PATH:
            at = _text(tid, arguments[0])
        elif call in _AT:
            at = _text(tid, arguments[1])
            if not at.startswith("/"):
                where = _fd_path(tid, arguments[0] & 0xFFFFFFFF)
                if not at and where.startswith(("anon_inode:", "pipe:", "socket:", "/dev/")):
                    return None
                at = f"{where}/{at}" if where and at else where or at
        else:
            at = ""
        if at and self._skips is not None and self._skips(at):
            return None
        return f"{name} {at}" if at else name


def _ptrace(request: int, tid: int, address: int, data: int, *, quiet: bool = False) -> int:
    result: int = _libc.ptrace(request, tid, address, ctypes.c_void_p(data))
    if result < 0 and not quiet:
        code = ctypes.get_errno()
        raise OSError(code, f"ptrace of {tid}: {os.strerror(code)}")
    return result


def _process_of(tid: int) -> int:
    for line in Path(f"/proc/{tid}/status").read_text().splitlines():
        if line.startswith("Tgid:"):
            return int(line.split()[1])
    raise ProcessLookupError(tid)


def _fd_path(tid: int, fd: int) -> str:
    try:
        return os.readlink(f"/proc/{tid}/fd/{fd}")
    except OSError:
        return ""


def _text(tid: int, address: int) -> str:
    """The string at an address of the process."""
    if not address:
        return ""
    try:
        fd = os.open(f"/proc/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            page = address & ~4095
            data = os.pread(fd, page + 4096 - address, address)
            if b"\0" not in data:
                data += os.pread(fd, 4096, page + 4096)
        finally:
            os.close(fd)
    except OSError:
        return ""
    return os.fsdecode(data.partition(b"\0")[0])
