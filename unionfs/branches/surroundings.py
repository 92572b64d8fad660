"""The tree that a command on a branch sees: the branch in the host's tree, or instead of it.

A base other than `/` is covered by the branch at its path; all around it is the host's, read-only. If the
base is `/`, the branch is the root, and the filesystems that are mounted on it are read-only. In both cases
/proc, /sys, /dev, /tmp, /var/tmp and /run are the command's own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from unionfs.branches.covered import mounted_below, store_in
from unionfs.branches.record import WHOLE
from unionfs.containers import bubblewrap
from unionfs.containers.description import protection
from unionfs.errors import UserError, quoted
from unionfs.sys.openat2 import RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2

_PRIVATE = ("/tmp", "/var/tmp")
_RUN = "/run"
_KERNEL_TREES = ("/proc", "/sys", "/dev")
_OWN = (*_KERNEL_TREES, *_PRIVATE, _RUN)
_WAY = RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS


class Surroundings:
    """The surroundings of a branch over `base`, of a store at `root`."""

    def __init__(self, base: str, root: str, hide: Sequence[str], writable: Sequence[str]) -> None:
        """`hide`, `writable`: paths that are empty, or can be changed for good. Raises UserError."""
        for path in (*hide, *writable):
            if not os.path.lexists(path):
                raise UserError(f"{quoted(path)} does not exist, so it cannot be hidden or writable.")
        self.base = base
        self.is_whole = base == WHOLE
        self._hide = [os.path.abspath(path) for path in hide]
        self._writable = [os.path.abspath(path) for path in writable]
        own = [*_KERNEL_TREES, *([*_PRIVATE, _RUN] if self.is_whole else [])]
        parts = store_in(base, root)
        if parts is not None:
            own.append(os.path.join(base, *parts))
        #: The outermost filesystems mounted below the base; they are not part of the branch.
        self.below = _outermost([path for path in mounted_below(base) if not is_in(path, own)])

    def inside(self, path: str) -> str | None:
        """A path relative to the base, empty for the base itself, if the branch has it; else None."""
        covered = is_in(path, [self.base]) and not is_in(path, self.below)
        if not covered or (self.is_whole and is_in(path, _OWN)):
            return None
        return path[len(self.base.rstrip("/")) :].strip("/")

    def hides(self, path: str) -> bool:
        """Whether the command sees something else at a path than what the host or the branch has there."""
        shown = [*self._writable, *([] if self.is_whole else [self.base])]
        return is_in(path, [*_PRIVATE, _RUN, *self._hide]) and not is_in(path, shown)

    def start(self, here: str) -> str:
        """The working directory of a command that is called in the directory `here`."""
        if not is_in(here, [self.base]) or (self.is_whole and is_in(here, _OWN)):
            return self.base
        return here

    def check(self, root: int) -> None:
        """Refuse a branch in which a former command has put something else where mounts belong.

        `root`: an fd of the branch's root. Raises UserError.
        """
        if not self.is_whole:
            return
        exceptions = [*self._hide, *self._writable]
        for path in [*(path for path in _OWN if _is_directory(path)), *self.below, *exceptions]:
            if self.inside(os.path.dirname(path)) is None:
                continue
            try:
                os.close(openat2(root, os.fsencode(path.lstrip("/")), os.O_PATH, _WAY))
            except OSError as error:
                raise UserError(
                    f"{quoted(path)} is a mountpoint for the command, but the branch has something else "
                    "there; put it back there by `unionfs branch mount`, or discard the branch."
                ) from error

    def arguments(self, merged: str) -> list[str]:
        """The arguments of bubblewrap that make the tree; `merged`: where the branch is mounted."""
        words = ["--bind", merged, "/"] if self.is_whole else ["--ro-bind", "/", "/"]
        words += ["--proc", "/proc", "--dev", "/dev", "--ro-bind-try", "/sys", "/sys"]
        words += bubblewrap.mount_words(protection(by_root=os.geteuid() == 0))
        for path in _PRIVATE:
            if _is_directory(path):
                words += ["--perms", "1777", "--tmpfs", path]
        words += _without_services()
        around = [path for path in self._writable if is_in(self.base, [path])]
        for path in around:
            words += ["--bind", path, path]
        if not self.is_whole:
            words += ["--bind", merged, self.base]
        for path in self.below:
            words += ["--ro-bind", path, path] if os.access(path, os.R_OK) else _empty(path)
        for path in self._writable:
            if path not in around:
                words += ["--bind", path, path]
        for path in self._hide:
            words += _empty(path) if os.path.isdir(path) else ["--dev-bind", os.devnull, path]
        return words


def is_in(path: str, places: Sequence[str]) -> bool:
    """Whether a path is one of the places, or below one."""
    return any(path == place or path.startswith(place.rstrip("/") + "/") for place in places)


def _outermost(paths: Sequence[str]) -> list[str]:
    found: list[str] = []
    for path in sorted(paths):
        if not is_in(path, found):
            found.append(path)
    return found


def _empty(path: str) -> list[str]:
    return ["--tmpfs", path, "--remount-ro", path]


def _is_directory(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _without_services() -> list[str]:
    """Hide /run: a service of the host that has its socket there would act outside for the command."""
    if not _is_directory(_RUN):
        return []
    words = ["--tmpfs", _RUN]
    names = os.path.realpath("/etc/resolv.conf")
    if names.startswith(f"{_RUN}/") and os.path.exists(names):
        words += ["--ro-bind", names, names]
    return words
