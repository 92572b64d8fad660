"""The mounts of other mount namespaces: whether a directory is shown in a container."""

from __future__ import annotations

import os
from collections.abc import Iterator

from unionfs.sys.mountinfo import (
    Location,
    MountEntry,
    location_of,
    mounted_at,
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
        for entry in _mounts_of(place.device)
    )


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


def _mounts_of(device: str) -> Iterator[MountEntry]:
    """All mounts of a superblock, from one process of each mount namespace; the oldest sees the most."""
    wanted, seen = f" {device} ".encode(), set()
    for pid in ["self", *map(str, sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit()))]:
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in seen:
                continue
            with open(f"/proc/{pid}/mountinfo", "rb", buffering=0) as file:
                table = b"".join(iter(lambda file=file: file.read(1 << 20), b""))  # type: ignore[misc]
        except OSError:
            continue  # it has ended, or belongs to another user
        seen.add(namespace)
        yield from parse_mountinfo(b"\n".join(line for line in table.split(b"\n") if wanted in line))
