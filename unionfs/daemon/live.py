"""The registry of live mounts: one small JSON file a mount, in the directory for files of the running system.

The file is written by the daemon when its mount is usable and removed at its end. A file whose daemon is gone
is stale; whoever reads it removes it, unless the dead mount is still there to be unmounted.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from unionfs.daemon.errors import UserError, quoted
from unionfs.daemon.settings import MountSettings
from unionfs.sys.capabilities import in_initial_user_namespace
from unionfs.sys.mountinfo import MountEntry, mounts_of_device, read_mountinfo
from unionfs.sys.process import is_alive, start_time

_ROOT_DIRECTORY = "/run/unionfs"


@dataclass(frozen=True, slots=True)
class LiveMount:
    """A mount and the daemon behind it."""

    settings: MountSettings
    pid: int
    started: int
    """The daemon's start time in clock ticks since boot."""
    device: str
    """`major:minor` of the mount."""
    since: float
    """Seconds since the epoch when the mount became usable."""
    claims: tuple[tuple[int, int], ...]
    """(st_dev, st_ino) of upper and work."""
    ending: bool = False
    """The mount is gone, the daemon is about to go."""
    file: str = ""
    """Where this entry is kept."""

    @property
    def socket_path(self) -> str:
        """Where the daemon answers questions."""
        return self.file.removesuffix(".json") + ".sock"

    def is_alive(self) -> bool:
        """Whether the daemon still runs."""
        return is_alive(self.pid, self.started)

    def mounts(self) -> list[MountEntry]:
        """The mounts of it in the daemon's mount namespace, or in ours when that may not be read."""
        try:
            return mounts_of_device(self.device, read_mountinfo(self.pid))
        except OSError:
            return mounts_of_device(self.device)

    def save(self) -> None:
        """Write the entry in one step."""
        values: dict[str, Any] = {
            "settings": self.settings.to_json(),
            "pid": self.pid,
            "started": self.started,
            "device": self.device,
            "since": self.since,
            "claims": self.claims,
            "ending": self.ending,
        }
        temporary = f"{self.file}.new"
        with open(temporary, "w", encoding="ascii", opener=_private) as out:
            json.dump(values, out)
        os.replace(temporary, self.file)

    def remove(self) -> None:
        """Take the entry and the socket away."""
        for path in (self.file, self.socket_path):
            with suppress(OSError):
                os.unlink(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _candidates() -> list[str]:
    """Directories that may hold this user's registry, the preferred one first."""
    uid = os.geteuid()
    shared = f"/tmp/unionfs-{uid}"
    if uid == 0 and in_initial_user_namespace():
        return [_ROOT_DIRECTORY, shared]
    private = os.environ.get("XDG_RUNTIME_DIR", "")
    return [f"{private}/unionfs", shared] if private.startswith("/") else [shared]


def _is_safe(directory: str, owner: int) -> bool:
    """Whether a directory is one that only `owner` could have filled; no symlink is followed."""
    try:
        status = os.lstat(directory)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == owner and not status.st_mode & 0o022


def runtime_directory() -> str:
    """The directory for registry, sockets and logs, made with mode 0700. Raises UserError."""
    for directory in _candidates():
        with suppress(OSError):
            os.mkdir(directory, 0o700)
        if _is_safe(directory, os.geteuid()) and os.access(directory, os.W_OK | os.X_OK):
            return directory
    raise UserError(
        f"none of {', '.join(_candidates())} can be used for runtime files (not a directory of this user "
        "that nobody else may write); remove what is there, or set XDG_RUNTIME_DIR."
    )


def _directories() -> Iterator[tuple[str, int]]:
    """Every registry this process may trust, and its owner; root sees those of the users as well."""
    uid = os.geteuid()
    directories = [(directory, uid) for directory in _candidates()]
    if uid == 0:
        with suppress(OSError):
            directories += [
                (f"/run/user/{name}/unionfs", int(name)) for name in os.listdir("/run/user") if name.isdigit()
            ]
        with suppress(OSError):
            for name in os.listdir("/tmp"):
                owner = name.removeprefix("unionfs-")
                if owner != name and owner.isdigit() and owner != "0":
                    directories.append((f"/tmp/{name}", int(owner)))
    return (item for item in directories if _is_safe(*item))


def _load(path: str) -> LiveMount | None:
    try:
        with open(path, encoding="ascii") as source:
            values = json.load(source)
        return LiveMount(
            settings=MountSettings.from_json(values["settings"]),
            pid=int(values["pid"]),
            started=int(values["started"]),
            device=str(values["device"]),
            since=float(values["since"]),
            claims=tuple((int(device), int(inode)) for device, inode in values["claims"]),
            ending=bool(values["ending"]),
            file=path,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _owned_by(pid: int, owner: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}").st_uid == owner
    except OSError:
        return False


def entries() -> list[LiveMount]:
    """Every entry whose daemon lives or whose dead mount remains; the others get removed."""
    found: list[LiveMount] = []
    me = os.geteuid()
    for directory, owner in _directories():
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            continue
        for name in names:
            if not name.endswith(".json"):
                continue
            entry = _load(f"{directory}/{name}")
            if entry is None:
                _remove_unreadable(directory, name)
            elif entry.is_alive():
                # A user may write what he likes into his own registry, but not stand in for another's daemon.
                if owner == me or _owned_by(entry.pid, owner):
                    found.append(entry)
            elif entry.ending or all(m.mountpoint != entry.settings.mountpoint for m in entry.mounts()):
                entry.remove()
            else:
                found.append(entry)
    return found


def _remove_unreadable(directory: str, name: str) -> None:
    """Remove a file that is no entry, unless its daemon, whose pid the name tells, lives."""
    pid, _, started = name.removesuffix(".json").partition("-")
    if not (pid.isdigit() and started.isdigit() and is_alive(int(pid), int(started))):
        for path in (f"{directory}/{name}", f"{directory}/{name.removesuffix('.json')}.sock"):
            with suppress(OSError):
                os.unlink(path)


def live_mounts() -> list[LiveMount]:
    """The mounts that can be used now, oldest first."""
    alive = (entry for entry in entries() if not entry.ending and entry.is_alive() and entry.mounts())
    return sorted(alive, key=lambda entry: entry.since)


def find_by_device(device: str, known: Sequence[LiveMount] | None = None) -> LiveMount | None:
    """The entry of the mount with this `major:minor`, a dead one too."""
    among = [entry for entry in (entries() if known is None else known) if entry.device == device]
    # A number may have been given to a new mount while a dead one's entry is still there.
    return next((entry for entry in sorted(among, key=lambda entry: not entry.is_alive())), None)


def entry_file(directory: str) -> str:
    """The name of this process's own entry in a runtime directory."""
    return f"{directory}/{os.getpid()}-{start_time(os.getpid())}.json"


def claims_of(settings: MountSettings) -> tuple[tuple[int, int], ...]:
    """What a mount keeps others from using. To be asked before mounting: the mount may cover these paths."""
    claims = []
    for path in (settings.upper, settings.work):
        if path is not None:
            status = os.stat(path)
            claims.append((status.st_dev, status.st_ino))
    return tuple(claims)


def announce(
    settings: MountSettings, device: str, directory: str, claims: tuple[tuple[int, int], ...]
) -> LiveMount:
    """Enter this process as the daemon of a mount that is usable now. Raises OSError."""
    entry = LiveMount(
        settings=settings,
        pid=os.getpid(),
        started=start_time(os.getpid()) or 0,
        device=device,
        since=time.time(),
        claims=claims,
        file=entry_file(directory),
    )
    entry.save()
    return entry


def mark_ending(entry: LiveMount) -> None:
    """Say that the mount is gone and that only the layers are still being written and closed."""
    with suppress(OSError):
        replace(entry, ending=True).save()


def describe_owner(entry: LiveMount) -> str:
    """The mount within a sentence."""
    return f"the live mount {quoted(entry.settings.mountpoint)} (pid {entry.pid})"
