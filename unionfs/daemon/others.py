"""What root knows of other users' mounts: from the kernel, and from their daemons.

Nothing of another user's is opened by path, believed, written or removed. A user's daemon listens in the
abstract namespace of unix(7), where there is no file to be swapped, under a name with its pid and start time;
the kernel says who listens (SO_PEERCRED). What the daemon says is only shown: where the mount is, and whose,
comes from the mount table.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Final

from unionfs.daemon.control import ask_all
from unionfs.daemon.live import LiveMount, abstract_name, entry_name
from unionfs.settings.mount import MountSettings
from unionfs.sys.capabilities import is_host_root
from unionfs.sys.mountinfo import MountEntry, read_mountinfo
from unionfs.sys.process import is_alive

_SUBTYPE: Final = "fuse.unionfs"
_SECONDS: Final = 2.0
_LATEST: Final = 1 << 33
"""Seconds since the epoch; what a calendar can show."""
_MOST_DAEMONS: Final = 64
"""Of one user: more are not asked."""


@dataclass(frozen=True, slots=True)
class Others:
    """The mounts of other users."""

    answered: Sequence[LiveMount]
    silent: Sequence[MountEntry]
    """Those whose daemon does not answer root: it is dead, stopped, or in another network namespace."""


def owner_of(mount: MountEntry) -> int | None:
    """The other user that a FUSE mount belongs to, as the kernel says; None for root's, and other kinds.

    A request to such a mount may wait for ever for its daemon.
    """
    if not mount.is_fuse or not is_host_root():
        return None
    user = mount.super_option("user_id") or "0"
    return int(user) or None


def mounts_of_others() -> Others:
    """The mounts of all other users; none for an ordinary user. Takes at most some seconds."""
    if not is_host_root():
        return Others((), ())
    table = read_mountinfo()
    daemons = _daemons()
    answers = ask_all({address: daemon.pid for address, daemon in daemons.items()}, _SECONDS)
    answered = []
    for address, answer in answers.items():
        found = _confirmed(daemons[address], answer, table)
        if found is not None:
            answered.append(found)
    known = {mount.device for mount in answered}
    silent = [m for m in table if m.fstype == _SUBTYPE and owner_of(m) is not None and m.device not in known]
    return Others(sorted(answered, key=lambda mount: mount.since), silent)


@dataclass(frozen=True, slots=True)
class _Daemon:
    pid: int
    started: int
    uid: int


def _daemons() -> dict[str, _Daemon]:
    """The processes of other users whose sockets have a daemon's name, by their addresses (proc_net(5))."""
    prefix = "@" + abstract_name("")
    found: dict[str, _Daemon] = {}
    counts: dict[int, int] = {}
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as sockets:
        for line in sockets:
            name = line.rstrip("\n").rpartition(" ")[2]
            if not name.startswith(prefix):
                continue
            pid, _, started = name.removeprefix(prefix).partition("-")
            if not (pid.isdecimal() and started.isdecimal() and len(name) < 64):
                continue
            daemon = _process(int(pid), int(started))
            if daemon is not None and counts.get(daemon.uid, 0) < _MOST_DAEMONS:
                counts[daemon.uid] = counts.get(daemon.uid, 0) + 1
                found["\0" + abstract_name(entry_name(daemon.pid, daemon.started))] = daemon
    return found


def _process(pid: int, started: int) -> _Daemon | None:
    try:
        uid = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None
    return _Daemon(pid, started, uid) if uid and is_alive(pid, started) else None


def _confirmed(daemon: _Daemon, answer: Mapping[str, Any], table: Sequence[MountEntry]) -> LiveMount | None:
    """The mount that a daemon speaks of, if the kernel has such a mount of that user; None else."""
    device, since = answer.get("device"), answer.get("since")
    if not isinstance(device, str) or not isinstance(since, int | float) or not 0 <= since < _LATEST:
        return None
    here = [m for m in reversed(table) if m.device == device]
    # A mount namespace that a user made began as a copy of ours: what is here has its owner here.
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
    """A FUSE mount in the mount namespace of a process, if that is another one than ours."""
    try:
        if os.stat(f"/proc/{pid}/ns/mnt").st_ino == os.stat("/proc/self/ns/mnt").st_ino:
            return None
        table = read_mountinfo(pid)
    except OSError:
        return None
    return next((m for m in reversed(table) if m.device == device and m.is_fuse), None)


def runtime_parent(pid: int) -> dict[str, str]:
    """XDG_RUNTIME_DIR of a user's daemon, as an environment for a process of that user; empty when unset."""
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
"""What is shown of another user's settings, and of which type that must be."""


def _settings(values: Any, mountpoint: str) -> MountSettings | None:
    """The settings that another user's daemon tells, to be shown; None for values of the wrong types."""
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
