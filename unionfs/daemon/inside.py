"""Mounts inside a union."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

from unionfs.daemon import others
from unionfs.settings.specs import Spec
from unionfs.sys import detached
from unionfs.sys.fds import Owned, Returned
from unionfs.sys.mountinfo import MountEntry, mount_of_id, read_mountinfo
from unionfs.sys.openat2 import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2
from unionfs.sys.unmount import open_mount, unmount

_PRIVATE = detached.PROPAGATION["private"]


def mounted_inside(mount: MountEntry, table: Sequence[MountEntry] | None = None) -> list[MountEntry]:
    """Return all mounts below a mount, at any depth, parents before children."""
    left = list(read_mountinfo() if table is None else table)
    known, found = {mount.mount_id}, []
    while newer := [entry for entry in left if entry.parent_id in known and entry.mount_id not in known]:
        found += newer
        known |= {entry.mount_id for entry in newer}
    return found


def reachable(mount: MountEntry) -> list[MountEntry]:
    """Like `mounted_inside`, without other users' FUSE mounts, whose daemons may never answer, and all
    mounts below those.
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
    """Return the mounts of the union's storage in mount order.

    A recursive bind mount also clones the mounts below its source; such a clone has a twin elsewhere: the
    same root of the same filesystem, mounted on the same directory. Covered mounts and those below them are
    left out: no path leads there.
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
    """Return device and path of the directory that a mount covers, the same for every bind mount."""
    above = by_id.get(entry.parent_id)
    if above is None:
        return None  # outside this process's root
    below = entry.mountpoint[len(above.mountpoint.rstrip("/")) :].lstrip("/")
    return above.device, f"{above.root.rstrip('/')}/{below}".rstrip("/")


def leave_peers(mount: MountEntry) -> None:
    """Make the mounts in a union private, so that unmounting them does not unmount their peers on the host.

    A bind mount with shared propagation has such peers below its source (mount_namespaces(7)).
    """
    for inner in reachable(mount):
        if inner.parent_id == mount.mount_id:
            with suppress(OSError), Owned(open_mount(inner)) as root:
                detached.change(root, propagation=_PRIVATE, recursive=True)


def unmount_inside(mount: MountEntry) -> None:
    """Unmount the mounts in a union, as far as possible; the rest is detached with the union."""
    leave_peers(mount)
    for inner in reversed(reachable(mount)):
        with suppress(OSError):  # in use, or only reachable through a dead union
            unmount(inner)


class TakenOff:
    """A union's storage: unmounted before the union, and restored if the union cannot be unmounted."""

    def __init__(self, union: MountEntry, mounts: Sequence[MountEntry]) -> None:
        self._union = union
        self._mounts = mounts
        #: Each clone preserves the content of a tmpfs, and the mount's attributes and peers.
        self._clones: list[int] = []
        self._taken: set[int] = set()

    def take_off(self) -> None:
        """Unmount all, last first. Raises OSError if one is in use, after restoring the others."""
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
        """Remount what was unmounted, parents first, then rejoin the peer groups."""
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
        """Return the root of the mount, or of its replacement."""
        if mount.mount_id not in self._taken:
            return open_mount(mount)
        with Returned(detached.clone(clone)) as again:
            # With peers, mounts made on it would propagate to them.
            detached.change(again, propagation=_PRIVATE)
            with Owned(self._open_target(mount)) as target:
                detached.attach(again, target)
        return again

    def _open_target(self, mount: MountEntry) -> int:
        """Open its mountpoint in the union, even if the union has moved. Raises OSError."""
        place = mount.mountpoint[len(self._union.mountpoint) :].lstrip("/")
        with Owned(open_mount(mount_of_id(self._union.mount_id) or self._union)) as root:
            return openat2(root, os.fsencode(place), os.O_PATH, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)

    def let_go(self) -> None:
        while self._clones:
            os.close(self._clones.pop())
