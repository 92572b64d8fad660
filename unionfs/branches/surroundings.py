"""The tree that a command on a branch sees: the branch in the host's tree, or instead of it.

A base other than `/` is covered by the branch at its path; all around it is the host's, read-only. If the
base is `/`, the branch is the root. In both cases filesystems that are mounted below the base are covered by
parts of the branch, or read-only, and /proc, /sys, /dev, /tmp, /var/tmp and /run are the command's own (below
another base than `/` only the first three).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from unionfs.branches.covered import Below, filesystems_below, is_in, store_in
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

    def __init__(
        self, base: str, root: str, hide: Sequence[str], writable: Sequence[str], *, is_nested: bool = False
    ) -> None:
        """`hide`, `writable`: paths that are empty, or can be changed for good. `is_nested`: whether it lies
        over another branch. Raises UserError.
        """
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
        #: The filesystems mounted below the base, but those that are hidden or writable as a whole.
        self.below = filesystems_below(base, [*own, *self._hide, *self._writable])
        if is_nested:
            reason = "a branch over another branch covers one filesystem only"
            self.below = [replace(one, obstacle=one.obstacle or reason) for one in self.below]
        #: Those of them that parts of the branch cover.
        self.covered = [one for one in self.below if one.obstacle is None]

    def inside(self, path: str) -> tuple[str, str] | None:
        """The base or the mountpoint of the part that has a path, and the path relative to that, empty for
        itself; None if it is not in the branch.
        """
        if not is_in(path, [self.base]):
            return None
        points = [one.path for one in self.below] + [*self._hide, *self._writable]
        others = [*points, *(_OWN if self.is_whole else [])]
        place = max((one for one in [self.base, *others] if is_in(path, [one])), key=len)
        if place != self.base and place not in [one.path for one in self.covered]:
            return None
        return place, path[len(place.rstrip("/")) :].strip("/")

    def hides(self, path: str) -> bool:
        """Whether the command sees something else at a path than what the host or the branch has there."""
        shown = [*self._writable, *([] if self.is_whole else [self.base])]
        return is_in(path, [*_PRIVATE, _RUN, *self._hide]) and not is_in(path, shown)

    def start(self, here: str) -> str:
        """The working directory of a command that is called in the directory `here`."""
        if not is_in(here, [self.base]) or (self.is_whole and is_in(here, _OWN)):
            return self.base
        return here

    def check(self, roots: Mapping[str, int]) -> None:
        """Refuse a branch in which a former command has put something else where mounts belong.

        `roots`: fds of the root of the branch and its parts, by base and mountpoints. Raises UserError.
        """
        points = []
        if self.is_whole:
            points += [*(path for path in _OWN if _is_directory(path)), *self._hide, *self._writable]
        points += [one.path for one in self.below if self._is_bound(one)]
        for path in points:
            place = self.inside(os.path.dirname(path))
            if place is None:
                continue
            name = os.path.join(place[1], os.path.basename(path))
            try:
                os.close(openat2(roots[place[0]], os.fsencode(name), os.O_PATH, _WAY))
            except OSError as error:
                raise UserError(
                    f"{quoted(path)} is a mountpoint for the command, but the branch has something else "
                    "there; put it back there by `unionfs branch mount`, or discard the branch."
                ) from error

    def _is_bound(self, one: Below) -> bool:
        """Whether a filesystem gets a mount of its own: a read-only one brings those in it along."""
        around = [other for other in self.below if other is not one and is_in(one.path, [other.path])]
        return one.obstacle is None or not around or around[-1].obstacle is None

    def arguments(self, merged: Mapping[str, str]) -> list[str]:
        """The arguments of bubblewrap that make the tree.

        `merged`: where the branch and its parts are mounted, by base and mountpoints.
        """
        words = ["--bind", merged[self.base], "/"] if self.is_whole else ["--ro-bind", "/", "/"]
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
            words += ["--bind", merged[self.base], self.base]
        for one in filter(self._is_bound, self.below):
            if one.obstacle is None:
                words += ["--bind", merged[one.path], one.path]
            else:
                words += _read_only(one.path)
        for path in self._writable:
            if path not in around:
                words += ["--bind", path, path]
        for path in self._hide:
            words += _empty(path) if os.path.isdir(path) else ["--dev-bind", os.devnull, path]
        return words


def _read_only(path: str) -> list[str]:
    return ["--ro-bind", path, path] if os.access(path, os.R_OK) else _empty(path)


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
