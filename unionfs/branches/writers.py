"""Files of a base that a commit replaces or removes while processes have them open for writing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from collections.abc import Iterator
from contextlib import suppress

from unionfs.branches.plan import Plan, Rename, all_below
from unionfs.branches.view import View
from unionfs.errors import quoted
from unionfs.sys.fds import Owned
from unionfs.union.diff import Object

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MOST_NAMED = 3


def is_written(fd: int) -> bool | None:
    """Whether a process has an open file, which is open here only for reading, open or mapped for writing;
    None if that is unknown.

    The kernel itself serves some open files of a union (FUSE passthrough): they outlive a daemon that was
    killed.
    """
    try:
        # Refused while there is a writer (fcntl(2)); one that comes now must not end this process.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    return False


def hazards(view: View, plan: Plan, base: str, above: bytes) -> list[str]:
    """A sentence about each file whose writer would go on with the former one; `above`: what belongs before
    paths for messages. Raises OSError.
    """
    written = [path for path, found in _replaced(view, plan) if _has_writer(view, path, found)]
    users = _users({os.path.join(base, os.fsdecode(path[1:])) for path in written}) if written else {}
    sentences = []
    for path in written:
        names = users.get(os.path.join(base, os.fsdecode(path[1:])), [])
        by = f" by {', '.join(names[:_MOST_NAMED])}" if names else ""
        sentences.append(
            f"{quoted((above + path)[1:])} is open for writing{by}; what is written to it after "
            "the commit goes to the former file and is lost, so stop its writers before."
        )
    return sentences


def _replaced(view: View, plan: Plan) -> Iterator[tuple[bytes, Object]]:
    """The non-directories of the base that are replaced or removed."""
    for step in plan.steps:
        if step.old is not None and not isinstance(step, Rename):
            yield from (item for item in all_below(view, step.path, step.old) if not item[1].is_directory)


def _has_writer(view: View, path: bytes, found: Object) -> bool:
    if found.st is None or not stat.S_ISREG(found.st.st_mode):
        return False
    try:
        fd = os.open(path.rpartition(b"/")[2], _READ, dir_fd=view.merge.gate.fd(found.parts[0]))
    except OSError:
        return False  # it is not this user's
    with Owned(fd):
        return is_written(fd) is True


def _users(paths: set[str]) -> dict[str, list[str]]:
    """The processes that have these files open, as far as this user may see them."""
    found: dict[str, list[str]] = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it has ended, or is another user's
            for path in paths & _opened(pid):
                with open(f"/proc/{pid}/comm", errors="surrogateescape") as file:
                    found.setdefault(path, []).append(f"{quoted(file.read().strip())} (process {pid})")
    return found


def _opened(pid: str) -> set[str]:
    """The paths of a process's open files. Raises OSError."""
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found
