"""What is mounted inside a union: on it, and on what is mounted there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

from unionfs.daemon import others
from unionfs.settings.specs import Spec
from unionfs.sys import detached
from unionfs.sys.fds import Owned
from unionfs.sys.mountinfo import MountEntry, mount_of_id, read_mountinfo
from unionfs.sys.openat2 import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2
from unionfs.sys.unmount import open_mount, unmount

_PRIVATE = detached.PROPAGATION["private"]


def mounted_inside(mount: MountEntry, table: Sequence[MountEntry] | None = None) -> list[MountEntry]:
    """What is mounted on a mount and on what is mounted there, parents before children."""
    left = list(read_mountinfo() if table is None else table)
    known, found = {mount.mount_id}, []
    while newer := [entry for entry in left if entry.parent_id in known and entry.mount_id not in known]:
        found += newer
        known |= {entry.mount_id for entry in newer}
    return found


def reachable(mount: MountEntry) -> list[MountEntry]:
    """What is mounted inside a mount, without another user's FUSE mounts, whose daemons may never answer, and
    what lies beyond these.
    """
    beyond: set[int] = set()
    found = []
    for inner in mounted_inside(mount):
        if inner.parent_id in beyond or others.owner_of(inner) is not None:
            beyond.add(inner.mount_id)
        else:
            found.append(inner)
    return found


def storage_mounts(mount: MountEntry, storage: Sequence[Spec]) -> list[MountEntry]:
    """The mounts of the union's storage, in the order in which they were mounted.

    A source brings along what is mounted below it; such a mount has a twin elsewhere: of the same directory
    of the same filesystem, on the same directory. What another mount covers is left out, with all below it:
    no path leads there.
    """
    table = read_mountinfo()
    inside = mounted_inside(mount, table)
    by_id = {entry.mount_id: entry for entry in table}
    ours = {entry.mount_id for entry in (mount, *inside)}
    elsewhere = {
        (entry.device, entry.root, _mounted_on(entry, by_id)) for entry in table if entry.mount_id not in ours
    }
    covered = {entry.parent_id for entry in inside if entry.mountpoint == by_id[entry.parent_id].mountpoint}
    top = mount.mountpoint.rstrip("/")
    targets = {top + spec.target for spec in storage}
    found: dict[int, MountEntry] = {}
    for entry in inside:
        if entry.mount_id in covered or entry.parent_id not in {mount.mount_id, *found}:
            continue
        came_along = (entry.device, entry.root, _mounted_on(entry, by_id)) in elsewhere
        if entry.mountpoint in targets or (came_along and entry.parent_id in found):
            found[entry.mount_id] = entry
    return list(found.values())


def _mounted_on(entry: MountEntry, by_id: Mapping[int, MountEntry]) -> tuple[str, str] | None:
    """The directory that a mount covers: device and path within it, the same for every bind mount."""
    above = by_id.get(entry.parent_id)
    if above is None:
        return None  # outside of this process's root
    below = entry.mountpoint[len(above.mountpoint.rstrip("/")) :].lstrip("/")
    return above.device, f"{above.root.rstrip('/')}/{below}".rstrip("/")


def leave_peers(mount: MountEntry) -> None:
    """Make what is mounted in a union private, so that unmounting it does not unmount its peers on the host.

    A bind mount with shared propagation has such peers, below its source (mount_namespaces(7)).
    """
    for inner in reachable(mount):
        if inner.parent_id == mount.mount_id:
            with suppress(OSError), Owned(open_mount(inner)) as root:
                detached.change(root, propagation=_PRIVATE, recursive=True)


def unmount_inside(mount: MountEntry) -> None:
    """Unmount what is mounted in a union, as far as possible; the rest goes with the union."""
    leave_peers(mount)
    for inner in reversed(reachable(mount)):
        with suppress(OSError):  # it is in use, or the way to it leads through a dead union
            unmount(inner)


class TakenOff:
    """A union's storage, taken off before the union, and put back if the union cannot be unmounted."""

    def __init__(self, union: MountEntry, mounts: Sequence[MountEntry]) -> None:
        self._union = union
        self._mounts = mounts
        #: A clone of each keeps the content of a tmpfs, the attributes and the peers of the mount.
        self._clones: list[int] = []
        self._taken: set[int] = set()

    def take_off(self) -> None:
        """Unmount all, last first. Raises OSError for one that is in use, with all as it was before."""
        at = ""
        try:
            for mount in self._mounts:
                at = mount.mountpoint
                with Owned(open_mount(mount)) as root:
                    self._clones.append(detached.clone(root))
                    detached.change(root, propagation=_PRIVATE)
            for mount in reversed(self._mounts):
                at = mount.mountpoint
                unmount(mount)
                self._taken.add(mount.mount_id)
        except OSError as error:
            self.put_back()
            raise OSError(error.errno, error.strerror, at) from error

    def put_back(self) -> None:
        """Mount again what was taken off, parents first; then join the peers again."""
        mounted: list[tuple[int, int]] = []
        for mount, clone in zip(self._mounts, self._clones, strict=False):
            with suppress(OSError):
                mounted.append((self._mounted_again(mount, clone), clone))
        for root, clone in mounted:
            with suppress(OSError):
                detached.join_group(root, clone)
            os.close(root)
        self.let_go()

    def _mounted_again(self, mount: MountEntry, clone: int) -> int:
        """The root of the mount, or of a new one in its place."""
        if mount.mount_id not in self._taken:
            return open_mount(mount)
        again = detached.clone(clone)
        try:
            # With its peers it would carry what is mounted on it next to them.
            detached.change(again, propagation=_PRIVATE)
            with Owned(self._open_target(mount)) as target:
                detached.attach(again, target)
        except BaseException:
            os.close(again)
            raise
        return again

    def _open_target(self, mount: MountEntry) -> int:
        """Its mountpoint in the union, wherever the union is by now. Raises OSError."""
        place = mount.mountpoint[len(self._union.mountpoint) :].lstrip("/")
        with Owned(open_mount(mount_of_id(self._union.mount_id) or self._union)) as root:
            return openat2(root, os.fsencode(place), os.O_PATH, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)

    def let_go(self) -> None:
        """Close the clones."""
        while self._clones:
            os.close(self._clones.pop())
