"""Other users' mounts as root sees them, from the kernel and from their daemons.

Root never opens by path, trusts, writes or removes anything of another user. A user's daemon listens in the
abstract namespace (unix(7)), where no file can be swapped, under a name with its pid and start time; the
kernel identifies the listener (SO_PEERCRED). Its answers are only displayed: mountpoint and owner come from
the mount table.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType
from typing import Any, Final

from unionfs.daemon.control import ask_all
from unionfs.daemon.live import LiveMount, abstract_name, entry_name
from unionfs.settings.mount import MountSettings
from unionfs.sys.capabilities import is_host_root
from unionfs.sys.mountinfo import MountEntry, read_mountinfo
from unionfs.sys.process import is_alive

FSTYPE: Final = "fuse.unionfs"
_SECONDS: Final = 2.0
_LATEST: Final = 1 << 33
"""The latest `since` that is accepted, in seconds since the epoch."""
_MOST_DAEMONS: Final = 64
"""Per user; further daemons are not asked."""


@dataclass(frozen=True, slots=True)
class Others:
    """The mounts of other users."""

    answered: Sequence[LiveMount]
    silent: Sequence[MountEntry]
    """Mounts whose daemon does not answer: it is dead, stopped, or in another network namespace."""


def owner_of(mount: MountEntry) -> int | None:
    """Return the uid of another user's FUSE mount, from the kernel; None for root's and non-FUSE mounts.

    A request to such a mount may block forever.
    """
    if not mount.is_fuse or not is_host_root():
        return None
    user = mount.super_option("user_id") or "0"
    return int(user) or None


def mounts_of_others() -> Others:
    """Return all other users' mounts; none if the caller is an ordinary user. Takes at most a few seconds."""
    if not is_host_root():
        return Others((), ())
    table = read_mountinfo()
    daemons = _daemons()
    answers = ask_all({address: daemon.pid for address, daemon in daemons.items()}, _SECONDS)
    answered = []
    for address, answer in answers.items():
        if (found := _confirmed(daemons[address], answer, table)) is not None:
            answered.append(found)
    known = {mount.device for mount in answered}
    silent = [m for m in table if m.fstype == FSTYPE and owner_of(m) is not None and m.device not in known]
    return Others(sorted(answered, key=lambda mount: mount.since), silent)


@dataclass(frozen=True, slots=True)
class _Daemon:
    pid: int
    started: int
    uid: int


def _daemons() -> dict[str, _Daemon]:
    """Return other users' processes that listen under a daemon's name, by address (proc_net(5))."""
    prefix = "@" + abstract_name("")
    found: dict[str, _Daemon] = {}
    counts: Counter[int] = Counter()
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as sockets:
        for line in sockets:
            name = line.rstrip("\n").rpartition(" ")[2]
            if not name.startswith(prefix):
                continue
            pid, _, started = name.removeprefix(prefix).partition("-")
            if not (pid.isdecimal() and started.isdecimal() and len(name) < 64):
                continue
            with suppress(OSError):
                daemon = _Daemon(int(pid), int(started), os.stat(f"/proc/{int(pid)}").st_uid)
                if not daemon.uid or not is_alive(daemon.pid, daemon.started):
                    continue
                counts[daemon.uid] += 1
                if counts[daemon.uid] <= _MOST_DAEMONS:
                    found["\0" + abstract_name(entry_name(daemon.pid, daemon.started))] = daemon
    return found


def _confirmed(daemon: _Daemon, answer: Mapping[str, Any], table: Sequence[MountEntry]) -> LiveMount | None:
    """Return the mount in a daemon's answer if the kernel lists it as that user's, else None."""
    device, since = answer.get("device"), answer.get("since")
    if not isinstance(device, str) or not isinstance(since, int | float) or not 0 <= since < _LATEST:
        return None
    here = [m for m in reversed(table) if m.device == device]
    # A user's mount namespace starts as a copy of ours: the owner of a device in our table is known here.
    mount = next((m for m in here if owner_of(m) == daemon.uid), None)
    if not here:
        mount = _elsewhere(daemon.pid, device)
    settings = _settings(answer.get("settings"), "" if mount is None else mount.mountpoint)
    if mount is None or settings is None:
        return None
    return LiveMount(
        settings, daemon.pid, daemon.started, device, float(since), claims=(), uid=daemon.uid
    )


def _elsewhere(pid: int, device: str) -> MountEntry | None:
    """Return a FUSE mount in the mount namespace of a process if that differs from ours."""
    try:
        if os.stat(f"/proc/{pid}/ns/mnt").st_ino == os.stat("/proc/self/ns/mnt").st_ino:
            return None
        table = read_mountinfo(pid)
    except OSError:
        return None
    return next((m for m in reversed(table) if m.device == device and m.is_fuse), None)


def runtime_parent(pid: int) -> dict[str, str]:
    """Return XDG_RUNTIME_DIR of a user's daemon as environment variables; empty if unset."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as environment:
            words = environment.read(1 << 16).split(b"\0")
    except OSError:
        return {}
    name = b"XDG_RUNTIME_DIR="
    found = next((word[len(name) :] for word in words if word.startswith(name)), None)
    return {} if found is None else {"XDG_RUNTIME_DIR": os.fsdecode(found)}


_SHOWN: Final[Mapping[str, tuple[type, ...]]] = {
    "lowers": (list,), "flags": (list,), "security": (list,), "upper": (str, NoneType),
    "work": (str, NoneType), "read_only": (bool,), "allow_other": (bool,), "allow_root": (bool,),
    "volatile": (bool,), "userxattr": (bool,), "session": (str,), "io": (str,), "fsname": (str,),
    "subtype": (str,), "log_level": (str,), "mounted_by": (int,),
}  # fmt: skip
"""The settings of other users that are displayed, with their required types."""


def _settings(values: Any, mountpoint: str) -> MountSettings | None:
    """Return another user's settings for display; None if a value has the wrong type."""
    if not isinstance(values, dict):
        return None
    words: dict[str, Any] = {name: values.get(name) for name in _SHOWN}
    for name, value in words.items():
        if not isinstance(value, _SHOWN[name]):
            return None
        if isinstance(value, list):
            if not all(isinstance(text, str) for text in value):
                return None
            words[name] = tuple(value)
    return MountSettings(mountpoint=mountpoint, **words)
