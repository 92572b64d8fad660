"""The processes that use a mount."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from unionfs.errors import quoted
from unionfs.sys import calls
from unionfs.sys.process import command_of

_AT_STATX_DONT_SYNC: Final = 0x4000
# stx_dev_major, stx_dev_minor, stx_mnt_id of struct statx, include/uapi/linux/stat.h
_PLACE: Final = struct.Struct("=136xIIQ")


@dataclass(frozen=True, slots=True)
class MountUser:
    """A process that uses a mount."""

    pid: int
    command: str
    how: str
    """One of `cwd`, `root`, `open file`, `mapped file`, `mount namespace`."""

    def __str__(self) -> str:
        return f"{quoted(self.command)} (pid {self.pid}, {self.how})"


def users_of_mount(mount_id: int, device: str | None, limit: int = 5) -> list[MountUser]:
    """Return at most `limit` processes that use this mount, as far as this user may see them.

    Sends no request to the mount, which may hang. `device` is its `major:minor`, by which mapped files are
    found; None: leave those out.
    """
    return _users(lambda found, number: number == mount_id, device, limit)


def users_of_device(device: str, limit: int = 5) -> list[MountUser]:
    """Like `users_of_mount`, for all mounts of a FUSE filesystem, detached ones too."""
    return _users(lambda found, number: found == device, device, limit)


def _users(is_there: Callable[[str, int], bool], device: str | None, limit: int) -> list[MountUser]:
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        pid = int(entry)
        how = next((how for how, link in _links(pid) if is_there(*place_of(link))), None)
        if how is None and device is not None and _maps_device(pid, device):
            how = "mapped file"
        if how is not None:
            found.append(MountUser(pid, command_of(pid), how))
            if len(found) == limit:
                break
    return found


def _links(pid: int) -> Iterator[tuple[str, str]]:
    for name, how in (("cwd", "cwd"), ("root", "root"), ("exe", "mapped file")):
        yield how, f"/proc/{pid}/{name}"
    with suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            yield "open file", f"/proc/{pid}/fd/{fd}"


def place_of(link: str) -> tuple[str, int]:
    """Return the device and the mount id of an open file; of a process that is gone, ("", 0)."""
    try:
        # With a mask a FUSE mount that this user may not access would fail with EACCES (fs/fuse/dir.c).
        raw = calls.statx(calls.AT_FDCWD, link.encode("ascii"), _AT_STATX_DONT_SYNC, 0)
    except OSError:
        return "", 0
    major, minor, mount_id = _PLACE.unpack_from(raw)
    return f"{major}:{minor}", mount_id


def _maps_device(pid: int, device: str) -> bool:
    major, minor = device.split(":")
    wanted = f" {int(major):02x}:{int(minor):02x} ".encode()
    try:
        with open(f"/proc/{pid}/maps", "rb") as maps:
            return any(wanted in line[:100] for line in maps)
    except OSError:
        return False
