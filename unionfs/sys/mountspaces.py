"""The mounts of other mount namespaces: whether a directory is shown in a container, who keeps a mount."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from unionfs.sys.mountinfo import (
    Location,
    MountEntry,
    location_of,
    mount_of_id,
    mounted_at,
    mounts_of_device,
    parse_mountinfo,
    read_mountinfo,
    split_path,
)


def is_shown_elsewhere(path: str) -> bool:
    """Return whether a mount of any namespace shows a directory or a part of it, besides the one at `path`.

    A bind mount in another namespace keeps a filesystem in use, but umount(2) of the original succeeds. False
    if `path` does not exist. Namespaces without a process, or whose processes this user may not examine, are
    not seen. Mounts that end with `path` are copies of the original: in a namespace made by unshare(2), or of
    the whole host below another directory.
    """
    real = _without_symlinks(path)
    table = read_mountinfo()
    try:
        mount = mounted_at(real, table)
        place = Location(mount.device, split_path(mount.root)) if mount else location_of(real, table)
    except OSError:
        return False
    if place is None:
        return False
    return any(
        place.contains(Location(entry.device, split_path(entry.root)))
        and not entry.mountpoint.endswith(real)
        for _, table in _namespaces(place.device)
        for entry in mounts_of_device(place.device, table)
    )


def copies(mount: MountEntry) -> list[tuple[int, MountEntry]]:
    """Return the mounts of this filesystem that stay when `mount` is unmounted, in all mount namespaces.

    With each comes a process of its namespace; 0 for the caller's. Namespaces without a process, or whose
    processes this user may not examine, are not seen. Unmounting propagates to the peers and slaves of the
    mount that holds the mountpoint (mount_namespaces(7)).
    """
    tables = list(_namespaces(mount.device))
    masters = {
        entry.group: entry.master for _, table in tables for entry in table if entry.group and entry.master
    }
    above = mount_of_id(mount.parent_id)
    source = "" if above is None else above.group
    found = []
    for pid, table in tables:
        for entry in mounts_of_device(mount.device, table):
            if pid == 0 and entry.mount_id == mount.mount_id:
                continue
            holder = mount_of_id(entry.parent_id, table)
            if not (source and holder is not None and source in _groups_above(holder, masters)):
                found.append((pid, entry))
    return found


def processes_with(device: str) -> list[int]:
    """Return a process of each other mount namespace that has a mount of a superblock."""
    return [pid for pid, _ in _namespaces(device) if pid]


def _groups_above(mount: MountEntry, masters: Mapping[str, str]) -> set[str]:
    """Return the peer groups from which a mount receives mounts, directly or through others."""
    known: set[str] = set()
    for start in (mount.group, mount.master):
        group = start
        while group and group not in known:
            known.add(group)
            group = masters.get(group, "")
    return known


def is_seen_by(path: str, pid: int) -> bool:
    """Return whether a process sees the mount at `path`, if there is one; True if that cannot be known.

    A mount appears in another mount namespace only by propagation (mount_namespaces(7)).
    """
    real = _without_symlinks(path)
    try:
        if os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt"):
            return True
        mount = mounted_at(real)
        return mount is None or any(
            entry.device == mount.device and entry.mountpoint.endswith(real) for entry in read_mountinfo(pid)
        )
    except OSError:
        return True


def _without_symlinks(path: str) -> str:
    """The path as mountinfo has it; nothing is asked of a filesystem that is mounted there."""
    return f"{os.path.realpath(os.path.dirname(path))}/{os.path.basename(path)}"


def _namespaces(device: str) -> Iterator[tuple[int, list[MountEntry]]]:
    """Yield a process and the mount table of each mount namespace that has a mount of a superblock.

    The oldest process sees the most; 0 stands for the caller.
    """
    wanted, seen = f" {device} ".encode(), set()
    for pid in [0, *sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit())]:
        try:
            namespace = os.readlink(f"/proc/{pid or 'self'}/ns/mnt")
            if namespace in seen:
                continue
            with open(f"/proc/{pid or 'self'}/mountinfo", "rb", buffering=0) as file:
                table = b"".join(iter(lambda file=file: file.read(1 << 20), b""))  # type: ignore[misc]
        except OSError:
            continue  # it has ended, or belongs to another user
        seen.add(namespace)
        if wanted in table:
            yield pid, parse_mountinfo(table)
