"""Waits until the filesystems of layers answer, says if one does not, and can be interrupted meanwhile.

A program in a call of a filesystem whose server does not answer ends only by a signal that kills it, and not
at all once the server has the call. So a child of this process asks first. As the kernel does for any
program, this waits for as long as it takes; who needs an end sets one: systemd for mounts of /etc/fstab
(x-systemd.mount-timeout, 90 s by default), timeout(1) for others.
"""

from __future__ import annotations

import os
import re
import select
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from unionfs.core.places import SHARED_TYPES
from unionfs.daemon.caller import CALLER
from unionfs.errors import UserError, quoted
from unionfs.sys.calls import PR_SET_PDEATHSIG, prctl
from unionfs.sys.mountinfo import unescape
from unionfs.sys.walking import MOST_LINKS

Layers = Iterable[tuple[str, str]]
"""The role and the path of each, as in ("lower", "/srv/base")."""

_TELL_SECONDS: Final = 5.0
_REMOTE: Final = re.compile(
    rb"^\S+ \S+ \S+ \S+ (\S+) .* - (?:%b)[. ]" % "|".join(SHARED_TYPES).encode(), re.MULTILINE
)
"""A line of a mount table (proc_pid_mountinfo(5)) whose filesystem has a server, with the mount point. Few
have one, and to parse all lines takes longer."""


def layers_of(lowers: Iterable[str], upper: str | None, work: str | None) -> Layers:
    """The layers of a union."""
    return [*(("lower", path) for path in lowers), ("upper", upper or ""), ("work", work or "")]


def await_layers(layers: Layers) -> None:
    """Return when the filesystems of all layers have answered. Raises UserError if the caller ends
    meanwhile."""
    given = [(role, path) for role, path in layers if path]
    remote = _remote_mountpoints() if given else set()
    asked = [(role, path) for role, path in given if remote and _lies_below(path, remote)]
    if not asked:
        return
    with _asking([path for _, path in asked]) as answers:
        launcher = [] if CALLER.launcher is None else [CALLER.launcher.fileno()]
        answered, told = 0, -1
        while answered < len(asked):
            role, path = asked[answered]
            seconds = None if told == answered else _TELL_SECONDS
            ready = select.select([answers, *launcher], [], [], seconds)[0]
            if answers in ready:
                more = len(os.read(answers, len(asked)))
                if not more:
                    return  # the child failed: whatever is wrong, the caller finds out
                answered += more
            elif ready:  # the launcher has nothing to say: it has ended
                raise UserError(f"waiting for the {role} {quoted(path)} was interrupted; try again.")
            else:
                told = answered
                _tell(role, path)


def _tell(role: str, path: str) -> None:
    seconds = f"{_TELL_SECONDS:.0f} seconds"
    with suppress(OSError):
        text = f"the {role} {quoted(path)} has not answered for {seconds}; waiting for it"
        print(f"unionfs: {text}", file=sys.stderr, flush=True)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end the process at once within the context, also in a call that waits for a server."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


@contextmanager
def _asking(paths: Sequence[str]) -> Iterator[int]:
    """A child that asks for all paths, one after the other: yields an fd that gets a byte for each answer."""
    reader, writer = os.pipe()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        try:
            _ask(paths, writer, parent)
        finally:
            os._exit(0)
    os.close(writer)
    try:
        yield reader
    finally:
        os.close(reader)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        # One whose call the server has ends when that answers.
        os.waitpid(pid, os.WNOHANG)


def _ask(paths: Sequence[str], writer: int, parent: int) -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    for path in paths:
        with suppress(OSError):
            os.statvfs(path)  # which no cache answers
            os.stat(path)
        os.write(writer, b".")


def _remote_mountpoints() -> set[str]:
    with open("/proc/self/mountinfo", "rb") as file:
        return remote_in(file.read())


def remote_in(table: bytes) -> set[str]:
    """The mount points in a mount table whose filesystems have a server."""
    return {unescape(path) for path in _REMOTE.findall(table)}


def _lies_below(path: str, mountpoints: set[str]) -> bool:
    """Whether a path leads to one of these mount points, or below. None of their filesystems is asked."""
    try:
        rest = os.path.abspath(path).split("/")[:0:-1]
    except OSError:  # a relative path in a directory that was removed: the caller finds out
        return False
    place, links = "", 0
    while rest:
        step = rest.pop()
        if step in ("", "."):
            continue
        if step == "..":
            place = place.rpartition("/")[0]
            continue
        below = f"{place}/{step}"
        if below in mountpoints:
            return True
        try:
            target = os.readlink(below)
        except (OSError, ValueError):  # ValueError: a zero byte, which the caller refuses
            place = below
            continue
        links += 1
        if links > MOST_LINKS:
            return False
        if target.startswith("/"):
            place = ""
        rest += target.split("/")[::-1]
    return "/" in mountpoints
