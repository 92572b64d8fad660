"""Processes: identity, waiting for their end, standard files."""

from __future__ import annotations

import os
import resource
import select
import signal
from collections.abc import Iterable, Iterator

from unionfs.sys.fds import Owned


def start_time(pid: int) -> int | None:
    """Return when process `pid` started, in clock ticks since boot; None if it is gone or a zombie.

    Pid and start time together identify a process uniquely. Source: proc_pid_stat(5), fields 3 and 22.
    """
    fields = _stat(pid)
    return None if fields is None or fields[0] in (b"Z", b"X") else int(fields[19])


def _stat(pid: int) -> list[bytes] | None:
    """The fields of proc_pid_stat(5) from the third on, the state; None if the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            # The command in parentheses may contain spaces and parentheses: split after the last one.
            return stat.read().rpartition(b")")[2].split()
    except OSError:
        return None


def pid_and_start(pid: int) -> tuple[int, int]:
    """Return the pid and the start time of its process, 0 if it is gone: what `is_alive` takes."""
    return pid, start_time(pid) or 0


def pid_namespace() -> int:
    """Return the inode number of this process's PID namespace; 0 without /proc."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def is_alive(pid: int, started: int) -> bool:
    return start_time(pid) == started


def is_stopped(pid: int) -> bool:
    """Return whether a signal has stopped a process. Source: proc_pid_stat(5), field 3."""
    fields = _stat(pid)
    return fields is not None and fields[0] in (b"T", b"t")


def wait_gone(pid: int, started: int, timeout: float) -> bool:
    """Wait at most `timeout` seconds for a process. Returns False if it still runs.

    To wait for longer, call it again and again: a thread whose call has reached the server of a FUSE
    filesystem stays until that answers, also when all others have ended, which only the next call notices.
    """
    try:
        opened = Owned(os.pidfd_open(pid))
    except OSError:
        return not is_alive(pid, started)
    with opened as pidfd:
        # Checked after pidfd_open, so that the pid cannot be reused in between.
        if not is_alive(pid, started):
            return True
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))


def command_of(pid: int) -> str:
    """Return the name of a process, at most 15 characters (proc_pid_comm(5)); `?` if it is gone.

    One that was executed by an fd has that as its name; then the name of its file.
    """
    try:
        with open(f"/proc/{pid}/comm", "rb") as comm:
            name = os.fsdecode(comm.read().rstrip(b"\n"))
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")) if name.isdigit() else name
    except OSError:
        return "?"


def ancestors(pid: int) -> Iterator[int]:
    """Yield a process, its parent, and so on, as far as they are known."""
    while pid:
        yield pid
        try:
            pid = int(status_field("PPid", pid) or 0)
        except OSError:
            return


def children_of(pid: int) -> list[int]:
    """Return the children of a process, the oldest first. Source: proc_tid_children(5)."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as children:
            return [int(child) for child in children.read().split()]
    except OSError:
        return []


def status_field(name: str, process: int | str = "self") -> str:
    """Return a field of proc_pid_status(5); empty if the kernel does not have it. Raises OSError."""
    with open(f"/proc/{process}/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith(name + ":"):
                return line.split(":", 1)[1].strip()
    return ""


def supplementary_groups(task: int) -> list[int]:
    """Return the supplementary groups of a task; none if it is gone. Source: proc_pid_status(5)."""
    try:
        return [int(group) for group in status_field("Groups", task).split()]
    except (OSError, ValueError):
        return []


def is_being_killed(task: int, *, gone: bool = True) -> bool:
    """Return whether a task has a pending fatal signal; ``gone`` for one that does not exist.

    On a fatal signal, the kernel queues SIGKILL to every task of the process (kernel/signal.c,
    complete_signal).
    """
    try:
        return bool(int(status_field("SigPnd", task) or "0", 16) >> (signal.SIGKILL - 1) & 1)
    except (OSError, ValueError):
        return gone


def close_files_but(kept: Iterable[int]) -> None:
    """Close all open files except standard ones and these."""
    first = 3
    for fd in sorted(kept):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, 2**31 - 1)


def to_null(fds: Iterable[int]) -> None:
    """Let these fds refer to /dev/null."""
    with Owned(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) as null:
        for fd in fds:
            os.dup2(null, fd)


def open_standard_files() -> None:
    """Open fds 0 to 2 on /dev/null if closed, so that no later file gets the number of a standard stream."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def memory_figures() -> dict[str, int]:
    """Return this process's resident set in bytes, now and its maximum; proc_pid_statm(5), getrusage(2).

    The kernel counts some pages of each CPU a little later. smaps_rollup is exact, but walks the page tables
    while requests wait.
    """
    with open("/proc/self/statm", "rb") as statm:
        now = int(statm.read().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"resident_bytes": now, "peak_resident_bytes": max(now, peak)}
