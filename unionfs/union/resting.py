"""An upper at rest: opened for the tools that examine or change it while nothing is mounted on it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from unionfs.core.places import Layer, Place
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability
from unionfs.sys.fds import Files, Owned, names_in
from unionfs.union import leases, opening
from unionfs.union.layers import leased, lock
from unionfs.union.leasekeeper import Keeper
from unionfs.union.markers import Markers
from unionfs.union.merge import Merge

TRUSTED: Final = b"trusted.overlay."
USER: Final = b"user.overlay."


class Resting:
    """The layers, locked against mounts; the upper's are at index 0 of the merge's layers."""

    def __init__(
        self, merge: Merge, upper: Layer, work: tuple[str, int] | None, lease: Keeper | None = None
    ) -> None:
        self.merge = merge
        self.markers = merge.markers
        self.gate = merge.gate
        self.upper = upper
        #: The path and an O_PATH fd of the work directory.
        self.work = work
        self._lease = lease

    def may_change(self) -> None:
        """Call this before each change. Raises LayerError if another host may have the upper by now."""
        if self._lease is not None:
            self._lease.wait()

    def path(self, below: bytes) -> bytes:
        """The path on the host of something in the upper, for messages."""
        return os.fsencode(self.upper.path) + below

    def entries(self, place: Place) -> list[tuple[bytes, os.stat_result]]:
        """The names in a real directory with their attributes, sorted. Raises OSError."""
        found = []
        with Owned(self.gate.open_for_listing(place)) as fd:
            for name in sorted(map(os.fsencode, os.listdir(fd))):
                found.append((name, os.stat(name, dir_fd=fd, follow_symlinks=False)))
        return found


@contextmanager
def resting(
    upper: str, lowers: Sequence[str] = (), work: str | None = None, *, userxattr: bool, writable: bool
) -> Iterator[Resting]:
    """Open the layers, topmost lower first. Raises LayerError if a mount uses the upper, or OSError.

    Paths are absolute, without symlinks. Unless ``writable``, root cannot change the upper by mistake.
    """
    privileged = has_capability(CAP_SYS_ADMIN)
    with Files() as resources:
        fd = opening.open_lower(upper, privileged and not writable)
        resources.own(fd)
        alone = lock(fd, upper, "upper", resources)
        lease = None
        if leases.filesystem(fd) is not None:
            lease = _lease(fd, upper, resources, alone=alone, writable=writable)
        layers = [Layer(0, upper, fd, is_upper=True)]
        opened = None
        if work is not None:
            opened = work, opening.open_lower(work, privileged and not writable)
            resources.own(opened[1])
            lock(opened[1], work, "work", resources)
        for path in lowers:
            fd = opening.open_lower(path, privileged)
            resources.own(fd)
            layers.append(Layer(len(layers), path, fd, is_upper=False))
        # As in an ordinary user's own mount.
        follows = True if os.geteuid() != 0 else None
        markers = Markers(USER if userxattr else TRUSTED, follows_redirects=follows)
        merge = Merge(layers, markers, directory_fds=256)
        resources.callback(merge.close)
        yield Resting(merge, layers[0], opened, lease)


def _lease(fd: int, upper: str, resources: Files, *, alone: bool, writable: bool) -> Keeper | None:
    """Hold the upper's lease. Who may not make one only looks whether another host has it. Raises LayerError,
    OSError."""
    above = os.path.dirname(upper)
    if not writable and not os.access(above, os.W_OK, effective_ids=True):
        leases.refuse_if_led(upper, alone=alone)
        return None
    parent = opening.open_lower(above, False)
    resources.own(parent)
    keeper = leased(fd, upper, parent, resources, alone=alone)
    keeper.begin()
    return keeper


def object_path(dir_fd: int, name: bytes) -> bytes:
    """A path for xattr calls on ``name`` in a directory, not to be followed; without a name the directory."""
    return b"/proc/self/fd/%d/%b" % (dir_fd, name) if name else b"/proc/self/fd/%d/." % dir_fd


def xattrs(path: bytes) -> dict[bytes, bytes]:
    """The xattrs of an object; none where they are not supported. Raises OSError."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EPERM):
            return {}
        raise
    return {
        name: os.getxattr(path, name, follow_symlinks=False)
        for name in map(os.fsencode, names)
        if name.startswith((b"trusted.", b"user."))
    }


def names_below(fd: int, name: bytes) -> list[bytes]:
    """The names in the directory ``name`` of a directory, sorted; none if it is missing. Raises OSError."""
    try:
        inner = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    except FileNotFoundError:
        return []
    with Owned(inner):
        return sorted(map(os.fsencode, names_in(inner)))


def is_device_whiteout(st: os.stat_result) -> bool:
    """Whether it is a character device 0/0."""
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == 0
