"""What a container inherits from the process that starts it: keyring, fds, signals, the program's file."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from collections.abc import Collection
from contextlib import suppress

from unionfs.errors import reason
from unionfs.sys import detached
from unionfs.sys.calls import new_session_keyring
from unionfs.sys.fds import Owned


def join_new_keyring() -> None:
    """Leave the caller's session keyring, whose keys the container could use. Raises OSError."""
    try:
        new_session_keyring()
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise OSError(error.errno, f"no new session keyring ({reason(error)})") from error


def inherit_only(keep: Collection[int]) -> None:
    """Let the next execve close all fds above 2 but these: one of a directory is a way out of a container."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with suppress(OSError):
                os.set_inheritable(int(name), int(name) in keep)


def default_signals() -> None:
    """Neither ignore nor block a signal because the caller does (nohup(1))."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def unreachable(program: str) -> int | None:
    """Return an fd of the program through which the container cannot write; None if the file is safe.

    In the container, /proc/PID/exe leads to its file on the host: uid 0 could write it, or change its mode
    (CVE-2019-5736). Through a read-only mount that fails with EROFS. Where no such mount
    is possible (an ordinary user who owns the file, an old kernel) the fd is a sealed copy in memory.
    """
    if os.geteuid() == 0:
        with suppress(OSError):
            return detached.clone(program, read_only=True)
    st = os.stat(program)
    if st.st_mode & stat.S_ISUID or not (st.st_uid == os.geteuid() or os.access(program, os.W_OK)):
        return None
    return sealed_copy(program)


def sealed_copy(program: str) -> int:
    """Return an fd, for reading, of a copy of a program in memory that nobody can write. Raises OSError."""
    memory = os.memfd_create(os.path.basename(program), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with Owned(memory) as fd:
        with open(program, "rb") as source:
            while os.sendfile(fd, source.fileno(), None, 1 << 20):
                pass
        fcntl.fcntl(
            fd, fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE,
        )  # fmt: skip
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
