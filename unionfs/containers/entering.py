"""The process that enters a running container and becomes a command there, for `unionfs exec`.

It is an interpreter of its own, with nothing of the host in it but its program: no environment, no fd but
the standard ones, pipes and the job, no thread. Its file is one that the container cannot write to
(CVE-2019-5736). It takes the container's ids, capabilities and bounding set before it forks: its child, which
is the first that the container sees, never has more rights than the command. No fd is a directory, by which a
working directory such as /proc/self/fd/3 could leave the container (CVE-2024-21626). After it has joined the
mount namespace it imports nothing (CVE-2019-14271).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import sys
import termios
from base64 import b64decode
from typing import Any, NoReturn

from unionfs.sys import namespaces
from unionfs.sys.callfilter import filter_calls
from unionfs.sys.calls import PR_SET_PDEATHSIG, prctl
from unionfs.sys.capabilities import drop_from_bounding_set, have_only, no_new_privileges
from unionfs.sys.inheritance import take_limits

# include/uapi/linux/prctl.h
_PR_SET_DUMPABLE = 4
_OWN_FAILURE = 125
_NULL = os.makedev(1, 3)  # Documentation/admin-guide/devices.txt


STEPS = {
    "enter": "the container cannot be entered",
    "root": "the container cannot be entered: its root directory is another one",
    "workdir": "the working directory cannot be used",
    "outside": "the working directory is outside of the container",
    "null": "the container's /dev/null is not that device",
    "execute": "the command cannot be executed",
}


class _Failed(Exception):
    """A step (a key of `STEPS`) failed with an errno."""

    def __init__(self, step: str, number: int) -> None:
        super().__init__(step, number)
        self.step, self.number = step, number


def main() -> NoReturn:
    """The arguments are fds: the job as JSON, and pipes on which this process reports and waits."""
    job_fd, report, go = map(int, sys.argv[1:4])
    code = _OWN_FAILURE
    try:
        for fd in (report, go):
            os.set_inheritable(fd, False)
        with open(job_fd, "rb") as file:
            job = json.load(file)
        _join(job)
        # No module is found in the container by mistake.
        sys.path.clear()
        sys.meta_path.clear()
        _take_rights(job)
        pid = os.fork()
        if pid == 0:
            _become(job, go)
        _say(report, {"pid": pid})
        code = 0
    except _Failed as failure:
        _say(report, {"step": failure.step, "errno": failure.number})
    except OSError as error:
        _say(report, {"step": "enter", "errno": error.errno})
    finally:
        os._exit(code)


def _say(report: int, answer: dict[str, Any]) -> None:
    os.write(report, json.dumps(answer).encode() + b"\n")


def _join(job: dict[str, Any]) -> None:
    """Join the namespaces, a user namespace as its owner. Raises OSError, _Failed."""
    if job["flags"] & namespaces.CLONE_NEWUSER:
        _become_user(job)
    _take_limits(job["init"])
    prctl(_PR_SET_DUMPABLE, 0)
    namespaces.join(job["pidfd"], job["flags"])
    os.close(job["pidfd"])
    status = os.stat("/")
    if [status.st_dev, status.st_ino] != job["root"]:
        raise _Failed("root", errno.ESTALE)
    os.chdir("/")


def _take_limits(pid: int) -> None:
    """Take the container's limits and priorities; if not root, as many as possible. Raises OSError."""
    try:
        take_limits(pid)
    except OSError:
        if os.geteuid() == 0:
            raise


def _become_user(job: dict[str, Any]) -> None:
    """Take the ids of the job; only uid 0 may have others than its own."""
    if os.geteuid() == 0:
        os.setgroups(job["groups"])
        os.setresgid(*[job["gid"]] * 3)
        os.setresuid(*[job["uid"]] * 3)


def _take_rights(job: dict[str, Any]) -> None:
    """Reduce this process to the rights of the command."""
    no_new_privileges()
    kept = set(job["capabilities"])
    drop_from_bounding_set(set(range(64)) - kept)
    if not job["flags"] & namespaces.CLONE_NEWUSER:
        _become_user(job)
        kept = kept if job["uid"] == 0 else set()
    have_only(kept)


def _become(job: dict[str, Any], go: int) -> NoReturn:
    """Become the command when the caller, then the parent, writes to `go`. Raises OSError, _Failed."""
    if not os.read(go, 1):
        os._exit(_OWN_FAILURE)  # the caller has ended
    if not job["detached"]:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    if job["terminal"] is not None:
        fcntl.ioctl(job["terminal"], termios.TIOCSCTTY, 0)
    if job["detached"]:
        _open_null()
    os.umask(0o022)
    try:
        os.chdir(job["workdir"])
    except OSError as error:
        raise _Failed("workdir", error.errno or 0) from error
    if not os.getcwd().startswith("/"):  # `(unreachable)`, getcwd(3)
        raise _Failed("outside", errno.EPERM)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)  # the interpreter ignores some
    program = None if job["filter"] is None else b64decode(job["filter"])
    if program is not None:
        filter_calls(program)
    _execute(job["command"], job["environment"])


def _open_null() -> None:
    """Let the standard files be the container's /dev/null: the owner of the host's would be in its reach."""
    fd = os.open(os.devnull, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(fd)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != _NULL:
        raise _Failed("null", errno.ENODEV)
    os.set_blocking(fd, True)
    for number in range(3):
        os.dup2(fd, number)


def _execute(command: list[str], environment: dict[str, str]) -> NoReturn:
    """execvp(3) with an environment. Raises _Failed."""
    name, cause = command[0], errno.ENOENT
    search = [""] if "/" in name else environment.get("PATH", "").split(":")
    for directory in search:
        try:
            os.execve(os.path.join(directory, name), command, environment)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                cause = error.errno or cause
    raise _Failed("execute", cause)
