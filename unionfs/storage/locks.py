"""Locks of one volume: flock(2) on files in ROOT/locks, released when their process ends.

A lock's file is removed with its volume.

There are three locks. The short one (`state`) guards changes of a volume; callers wait for it. The long one
(`work`) covers a backup, restore, clone, resize or removal; the error for a second operation names the first.
`filling` is held while an empty volume is populated; the next mount waits for it. No lock is on a directory
of a volume: flock(2) needs read permission only, so every user who may list the volume could hold it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from unionfs.errors import UserError, on_failure, quoted
from unionfs.storage.root import make_directory, open_root
from unionfs.sys import fds, filelocks

_WAIT_SECONDS = 60.0
_FILLING_SECONDS = 3600.0
_POLL_SECONDS = 0.02
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NAME_MAX = 255


def _path(root: str, name: str, kind: str) -> str:
    if len(name) + 1 + len(kind) > _NAME_MAX:
        # A volume's name may have the maximum length of a file name, which leaves no room for the kind.
        name = f"{name[:128]}.{hashlib.sha256(name.encode()).hexdigest()}"
    open_root(root)
    return f"{make_directory(f'{root}/locks')}/{name}.{kind}"


def _take(path: str) -> int | None:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return filelocks.take(lambda: os.open(path, flags, 0o600), path)


def _unusable(path: str) -> tuple[str, str]:
    return f"the lock {quoted(path)} cannot be opened", "free space, or move away what has its name"


def state(root: str, name: str) -> AbstractContextManager[None]:
    """Hold the short lock of a volume. Raises UserError after waiting one minute."""
    return _waited(root, name, "state", _WAIT_SECONDS, "being changed by another process for over a minute")


def filling(root: str, name: str) -> AbstractContextManager[None]:
    """Hold the lock of a volume while it is populated. Raises UserError after waiting one hour."""
    return _waited(root, name, "fill", _FILLING_SECONDS, "being filled by another process for over an hour")


@contextmanager
def _waited(root: str, name: str, kind: str, seconds: float, what: str) -> Iterator[None]:
    path = _path(root, name, kind)
    deadline, pause = time.monotonic() + seconds, 0.0005
    with on_failure(*_unusable(path)):
        while (fd := _take(path)) is None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"volume {quoted(name)} is {what} (its storage may be hanging); try again later."
                )
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS)
    with fds.Owned(fd):
        yield


@contextmanager
def work(root: str, name: str, what: str, *, spare: bool = False) -> Iterator[None]:
    """Hold the long lock of a volume for `what` ("a backup"). Raises UserError at once when it is taken.

    `spare`: continue if a full disk has no space for the lock's file; then no process can hold the lock.
    """
    path = _path(root, name, "work")
    with on_failure(*_unusable(path)):
        try:
            fd = _take(path)
        except OSError as error:
            if not (spare and error.errno in _FULL):
                raise
            fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    if fd is None:
        with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            holder = file.read(200).strip()
            raise UserError(
                f"volume {quoted(name)} is busy with {holder or 'another operation'}; try {what} again when "
                "that has ended."
            )
        raise UserError(f"volume {quoted(name)} is busy with another operation; try {what} again.")
    with fds.Owned(fd):
        with suppress(OSError):  # on a full disk volumes are removed all the same
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{what} (pid {os.getpid()})\n".encode(), 0)
        yield


def forget(root: str, name: str) -> None:
    """Remove the lock files of a removed volume. The caller holds the short lock."""
    for kind in ("fill", "work", "state"):
        with suppress(OSError):
            os.unlink(_path(root, name, kind))
