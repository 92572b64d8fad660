"""Locks of one volume: flock(2) on files in ROOT/locks, released when their process ends.

A lock's file is removed with its volume. A process that locked a file whose name is gone tries again, so two
processes never hold two locks of one name.

There are three locks. The short one (`state`) guards changes of a volume; callers wait for it. The long one
(`work`) covers a backup, restore, clone, resize or removal; the error for a second operation names the first.
`filling` is held while an empty volume is populated; the next mount waits for it. No lock is on a directory
of a volume: flock(2) needs read permission only, so every user who may list the volume could hold it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from unionfs.errors import UserError, quoted, reason
from unionfs.storage.root import make_directory, open_root
from unionfs.sys import fds

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
    """Returns a locked fd, or None while another process holds the lock. Raises OSError."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.stat(path, follow_symlinks=False)
            if os.path.samestat(os.fstat(fd), there):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            pass  # removed with its volume just now
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _unusable(path: str, error: OSError) -> UserError:
    return UserError(
        f"the lock {quoted(path)} cannot be opened: {reason(error)}; free space, or move away what has its "
        "name."
    )


@contextmanager
def state(root: str, name: str) -> Iterator[None]:
    """Hold the short lock of a volume. Raises UserError after waiting one minute."""
    with _waited(root, name, "state", _WAIT_SECONDS, "being changed by another process for over a minute"):
        yield


@contextmanager
def filling(root: str, name: str) -> Iterator[None]:
    """Hold the lock of a volume while it is populated. Raises UserError after waiting one hour."""
    with _waited(root, name, "fill", _FILLING_SECONDS, "being filled by another process for over an hour"):
        yield


@contextmanager
def _waited(root: str, name: str, kind: str, seconds: float, what: str) -> Iterator[None]:
    path = _path(root, name, kind)
    deadline, pause = time.monotonic() + seconds, 0.0005
    try:
        while (fd := _take(path)) is None:
            if time.monotonic() > deadline:
                raise UserError(f"volume {quoted(name)} is {what} (its storage may hang); try again later.")
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS)
    except OSError as error:
        raise _unusable(path, error) from error
    with fds.Owned(fd):
        yield


@contextmanager
def work(root: str, name: str, what: str, *, spare: bool = False) -> Iterator[None]:
    """Hold the long lock of a volume for `what` ("a backup"). Raises UserError at once when it is taken.

    `spare`: continue if a full disk has no space for the lock's file; then no process can hold the lock.
    """
    path = _path(root, name, "work")
    try:
        fd = _take(path)
    except OSError as error:
        if not (spare and error.errno in _FULL):
            raise _unusable(path, error) from error
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
