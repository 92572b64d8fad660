"""Walks a path by directory fds, so that every checked component is the one that is used."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from unionfs.sys.capabilities import is_host_root
from unionfs.sys.fds import Owned, close_quietly

MOST_LINKS: Final = 40
"""MAXSYMLINKS, include/linux/namei.h."""
_PATH: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Step:
    """A directory or symlink on the path, or its final object (``is_last``)."""

    path: str
    status: os.stat_result
    fd: int
    """An O_PATH fd, valid during the call."""
    is_last: bool


def walk(path: str, look: Callable[[Step], None]) -> int:
    """Resolve ``path`` as in path_resolution(7) and return an O_PATH fd; calls ``look`` for every step.

    Raises ``OSError``, and what ``look`` raises.
    """
    waiting = _parts(path if path.startswith("/") else f"{os.getcwd()}/{path}")
    links = 0
    place, here = os.open("/", _PATH), "/"
    try:
        while True:
            look(Step(here, os.fstat(place), place, not waiting))
            if not waiting:
                return place
            name = waiting.pop()
            found = os.open(name, _PATH, dir_fd=place)
            inside = os.path.normpath(os.path.join(here, name))
            if stat.S_ISLNK((status := os.fstat(found)).st_mode):
                with Owned(found):
                    look(Step(inside, status, found, is_last=False))
                    target = os.readlink("", dir_fd=found)
                links += 1
                if links > MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                waiting += _parts(target)
                if not target.startswith("/"):
                    continue
                found, inside = os.open("/", _PATH), "/"
            close_quietly(place)
            place, here = found, inside
    except BaseException:
        close_quietly(place)
        raise


def _parts(path: str) -> list[str]:
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def follow(path: str) -> int:
    """Resolve ``path`` and return an O_PATH fd. Raises ``OSError``.

    The host's root follows another user's symlink only to an object of that user, else EACCES is raised:
    the user must not choose what root works on.
    """
    owners: set[int] = set()

    def look(step: Step) -> None:
        if stat.S_ISLNK(step.status.st_mode) and step.status.st_uid != 0:
            owners.add(step.status.st_uid)

    fd = walk(path, look)
    if owners and is_host_root():
        owner = os.fstat(fd).st_uid
        if others := owners - {owner}:
            close_quietly(fd)
            user = min(others)
            raise PermissionError(
                errno.EACCES, f"a symlink of uid {user} on the way leads to what belongs to uid {owner}", path
            )
    return fd
