"""The mount table of a process, and the location of a path within its filesystem.

Source of the format: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unionfs.sys.fds import Owned

_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of a mount table. Paths and options are decoded as `os.fsdecode` does."""

    mount_id: int
    parent_id: int
    device: str
    """`major:minor` of the superblock, which is not `st_dev` on btrfs."""
    root: str
    """The mounted path within the filesystem; `/` except for bind mounts and subvolumes."""
    mountpoint: str
    options: str
    fstype: str
    source: str
    super_options: str
    """As the kernel writes them, with octal escapes; `super_option` decodes one."""
    group: str = ""
    """The number of its peer group (mount_namespaces(7)); empty if it is not shared."""
    master: str = ""
    """The number of the peer group from which it receives mounts; empty if it is not a slave."""

    def super_option(self, name: str) -> str | None:
        """Return the value of a superblock option, or None if absent."""
        for option in self.super_options.split(","):
            key, equals, value = option.partition("=")
            if key == name and equals:
                return unescape(os.fsencode(value))
        return None

    @property
    def is_fuse(self) -> bool:
        """Whether it is a FUSE mount (not `fuseblk` or `fusectl`)."""
        return self.fstype == "fuse" or self.fstype.startswith("fuse.")

    @property
    def all_options(self) -> list[str]:
        """The options of the mount and of its filesystem, as the kernel writes them."""
        return [*self.options.split(","), *self.super_options.split(",")]


@dataclass(frozen=True, slots=True)
class Location:
    """A filesystem and a path within it, the same for all bind mounts."""

    device: str
    parts: tuple[str, ...]

    def contains(self, other: Location) -> bool:
        """Return whether `other` is this location or below it, in the same filesystem."""
        return self.device == other.device and other.parts[: len(self.parts)] == self.parts


def unescape(field: bytes) -> str:
    """Decode the octal escapes (`\\040` and so on) in a field of a mount table."""
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field))


def parse_mountinfo(table: bytes) -> list[MountEntry]:
    """Parse a whole mountinfo table; malformed lines are skipped."""
    entries = []
    for line in table.split(b"\n"):
        before, separator, after = line.partition(b" - ")
        left, right = before.split(b" "), after.split(b" ")
        if not separator or len(left) < 6 or len(right) < 3:
            continue
        entries.append(
            MountEntry(
                mount_id=int(left[0]),
                parent_id=int(left[1]),
                device=left[2].decode("ascii"),
                root=unescape(left[3]),
                mountpoint=unescape(left[4]),
                options=os.fsdecode(left[5]),
                fstype=unescape(right[0]),
                source=unescape(right[1]),
                super_options=os.fsdecode(right[2]),
                group=_tag(left[6:], b"shared:"),
                master=_tag(left[6:], b"master:"),
            )
        )
    return entries


def _tag(fields: Iterable[bytes], name: bytes) -> str:
    return next((field[len(name) :].decode("ascii") for field in fields if field.startswith(name)), "")


def read_mountinfo(pid: int | str = "self") -> list[MountEntry]:
    """Return the mount table of process `pid`. Raises OSError if it is not readable or `pid` is gone."""
    # Read in large blocks: a reader of small pieces may miss a mount when the table changes.
    with open(f"/proc/{pid}/mountinfo", "rb", buffering=0) as table:
        pieces = []
        while piece := table.read(1 << 20):
            pieces.append(piece)
    return parse_mountinfo(b"".join(pieces))


def mount_id_of_fd(fd: int) -> int:
    """Return the id of the mount through which a file (O_PATH too) was opened; proc_pid_fdinfo(5)."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
        for line in info:
            if line.startswith("mnt_id:"):
                return int(line.split()[1])
    raise OSError(0, "the kernel reports no mnt_id in fdinfo")


def mount_id_of_path(path: str) -> int:
    """Return the id of the mount of `path`. Sends no request to a FUSE daemon if `path` is its mountpoint."""
    with Owned(os.open(path, os.O_PATH | os.O_CLOEXEC)) as fd:
        return mount_id_of_fd(fd)


def mounted_at(path: str, table: Sequence[MountEntry] | None = None) -> MountEntry | None:
    """Return the visible mount at exactly `path` (absolute, no symlinks), or None."""
    entries = read_mountinfo() if table is None else table
    here = [entry for entry in entries if entry.mountpoint == path]
    if not here:
        return None
    try:
        mount_id = mount_id_of_path(path)
    except OSError:
        # A parent directory is not searchable. The topmost mount is the one with nothing mounted on it.
        covered = {entry.parent_id for entry in here}
        return next((entry for entry in reversed(here) if entry.mount_id not in covered), here[-1])
    return next((entry for entry in here if entry.mount_id == mount_id), None)


def mount_of_id(mount_id: int, table: Iterable[MountEntry] | None = None) -> MountEntry | None:
    """Return the mount with this id, even if its mountpoint has moved; None if it is gone."""
    entries = read_mountinfo() if table is None else table
    return next((entry for entry in entries if entry.mount_id == mount_id), None)


def mounts_of_device(device: str, table: Iterable[MountEntry] | None = None) -> list[MountEntry]:
    """Return all mounts of the superblock `device` (`major:minor`), in the table's order."""
    return [entry for entry in (read_mountinfo() if table is None else table) if entry.device == device]


def split_path(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part)


def location_of(path: str, table: Sequence[MountEntry] | None = None) -> Location | None:
    """Return the location of `path` (absolute, no symlinks), independent of bind mounts; None if unknown.

    Raises OSError if `path` cannot be opened.
    """
    mount_id = mount_id_of_path(path)
    for entry in read_mountinfo() if table is None else table:
        if entry.mount_id == mount_id:
            mountpoint, parts = split_path(entry.mountpoint), split_path(path)
            if parts[: len(mountpoint)] != mountpoint:
                return None
            return Location(entry.device, split_path(entry.root) + parts[len(mountpoint) :])
    return None
