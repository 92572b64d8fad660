"""What a process has from its parent, and the effect of that on a mount: comparing it, and taking it over."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from typing import Final

from unionfs.sys.mountinfo import mount_id_of_path, read_mountinfo
from unionfs.sys.process import start_time

_NAMESPACES: Final = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time")
# Fields of proc_pid_status(5). A process can neither get nor drop these for another one.
_RIGHTS: Final = frozenset({
    b"Uid", b"Gid", b"Groups", b"CapInh", b"CapPrm", b"CapEff", b"CapBnd", b"CapAmb", b"NoNewPrivs",
    b"Seccomp", b"Seccomp_filters",
})  # fmt: skip
_LIMITS: Final = tuple(
    number for name, number in vars(resource).items() if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"
)


def _content(path: str) -> bytes:
    """Return a file of /proc; empty if this kernel does not have it."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(1 << 16)
    except OSError:
        return b""


def _rights(pid: int | str) -> list[bytes]:
    lines = _content(f"/proc/{pid}/status").split(b"\n")
    # The security module's label, and who logged in (audit).
    more = (_content(f"/proc/{pid}/attr/current"), _content(f"/proc/{pid}/loginuid"))
    return [*(line for line in lines if line.partition(b":")[0] in _RIGHTS), *more]


def has_same_rights(pid: int) -> bool:
    """Return whether this process has the namespaces, root directory, credentials and filters of `pid`."""
    try:
        for kind in _NAMESPACES:
            if _namespace(pid, kind) != _namespace("self", kind):
                return False
        root = f"/proc/{pid}/root"
        if not os.path.samestat(os.stat(root), os.stat("/")):
            return False
        if mount_id_of_path(root) != mount_id_of_path("/"):
            return False
    except OSError:
        return False
    return _rights(pid) == _rights("self") and start_time(pid) is not None


def _namespace(pid: int | str, kind: str) -> int:
    """Return the inode number of a namespace; 0 if the kernel does not have this kind. Raises OSError."""
    try:
        return os.stat(f"/proc/{pid}/ns/{kind}").st_ino
    except FileNotFoundError:
        if not os.path.exists(f"/proc/{pid}"):
            raise
        return 0


def take_over(pid: int) -> None:
    """Move this process into the control groups of `pid`, and take its limits and priorities.

    Raises OSError if one of them cannot be had: the caller's start would have given it.
    """
    take_cgroups(pid)
    take_limits(pid)


def take_limits(pid: int) -> None:
    """Take the limits and priorities of `pid`. Raises OSError if one of them cannot be had."""
    for number in _LIMITS:
        theirs = resource.prlimit(pid, number)
        if theirs != resource.getrlimit(number):
            try:
                resource.setrlimit(number, theirs)
            except ValueError as error:  # beyond a hard limit
                raise PermissionError(1, str(error)) from error
    niceness = os.getpriority(os.PRIO_PROCESS, pid)
    if niceness != os.getpriority(os.PRIO_PROCESS, 0):
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
    scheduling = os.sched_getscheduler(pid), os.sched_getparam(pid)
    if scheduling != (os.sched_getscheduler(0), os.sched_getparam(0)):
        os.sched_setscheduler(0, *scheduling)
    if os.sched_getaffinity(pid) != os.sched_getaffinity(0):
        os.sched_setaffinity(0, os.sched_getaffinity(pid))
    score = _content(f"/proc/{pid}/oom_score_adj")
    if score != _content("/proc/self/oom_score_adj"):
        _write("/proc/self/oom_score_adj", score)


def _write(path: str, content: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(content)


def take_cgroups(pid: int) -> None:
    """Move this process into the control groups of `pid`. Raises OSError.

    Source: cgroups(7), /proc/PID/cgroup.
    """
    theirs = _content(f"/proc/{pid}/cgroup")
    ours = _content("/proc/self/cgroup")
    if theirs == ours:
        return
    mounts = [entry for entry in read_mountinfo() if entry.fstype in ("cgroup", "cgroup2")]
    for line in set(theirs.split(b"\n")) - set(ours.split(b"\n")):
        _, controllers, path = os.fsdecode(line).split(":", 2)
        for mount in mounts:
            is_it = (
                mount.fstype == "cgroup2"
                if not controllers
                else set(controllers.split(",")) <= set(mount.super_options.split(","))
            )
            if is_it and mount.root == "/":
                _write(f"{mount.mountpoint}{path}/cgroup.procs", b"0")
                break
    if _content("/proc/self/cgroup") != theirs:
        raise PermissionError(1, "the control groups of the caller are out of reach")


def is_alone_in_mount_namespace() -> bool:
    """Return whether no process of another program is in this mount namespace, as far as can be seen."""
    mine = os.stat("/proc/self/ns/mnt").st_ino
    program = os.readlink("/proc/self/exe")
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            if os.stat(f"/proc/{name}/ns/mnt").st_ino == mine and os.readlink(f"/proc/{name}/exe") != program:
                return False
    return True
