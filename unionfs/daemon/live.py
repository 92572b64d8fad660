"""The registry of this user's live mounts: one small JSON file a mount, in the directory for runtime files.

The file is written by the daemon when its mount is usable and removed at its end. A file whose daemon is gone
is stale; the next reader removes it, unless the dead mount is still there to be unmounted. What root knows of
other users' mounts comes from the kernel and their daemons: `unionfs.daemon.others`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from unionfs.daemon.control import ANSWER_SECONDS, ask
from unionfs.daemon.runtime import RuntimeDirectory, runtime_directories
from unionfs.errors import quoted
from unionfs.settings.mount import MountSettings
from unionfs.sys.mountinfo import MountEntry, mounts_of_device, read_mountinfo
from unionfs.sys.process import is_alive, start_time


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
    directory: str = ""
    """The runtime directory that this entry is in; empty for a mount of another user."""
    uid: int | None = None
    """The other user, as the kernel says; None: this one."""

    @property
    def name(self) -> str:
        """What the entry's files are called, without their endings."""
        return entry_name(self.pid, self.started)

    def is_alive(self) -> bool:
        """Whether the daemon still runs."""
        return is_alive(self.pid, self.started)

    def mounts(self) -> list[MountEntry]:
        """The mounts of it in the daemon's mount namespace, or in ours when that may not be read."""
        try:
            return mounts_of_device(self.device, read_mountinfo(self.pid))
        except OSError:
            return mounts_of_device(self.device)

    def ask(
        self, question: dict[str, Any] | None = None, *, timeout: float = ANSWER_SECONDS
    ) -> dict[str, Any] | None:
        """The daemon's answer, None when there is none within `timeout` seconds.

        What the question asks for and the daemon does not know is left out of the answer.
        """
        if self.uid is not None:
            return ask("\0" + abstract_name(self.name), timeout, question=question, pid=self.pid)
        try:
            with RuntimeDirectory(self.directory) as directory:
                return ask(directory.address(f"{self.name}.sock"), timeout, question=question)
        except OSError:
            return None

    def to_json(self) -> dict[str, Any]:
        """The entry as plain values; `from_json` reads them back."""
        return {
            "settings": self.settings.to_json(),
            "pid": self.pid,
            "started": self.started,
            "device": self.device,
            "since": self.since,
            "claims": self.claims,
            "ending": self.ending,
        }

    @classmethod
    def from_json(cls, values: Any, directory: str = "") -> LiveMount:
        """Raises KeyError, TypeError or ValueError when the values are not those of `to_json`."""
        return cls(
            settings=MountSettings.from_json(values["settings"]),
            pid=int(values["pid"]),
            started=int(values["started"]),
            device=str(values["device"]),
            since=float(values["since"]),
            claims=tuple((int(device), int(inode)) for device, inode in values["claims"]),
            ending=bool(values["ending"]),
            directory=directory,
        )

    def save(self) -> None:
        """Write the entry in one step. Raises OSError."""
        with RuntimeDirectory(self.directory) as directory:
            directory.write(f"{self.name}.json", json.dumps(self.to_json()).encode("ascii"))

    def remove(self) -> None:
        """Take the entry and the socket away."""
        with suppress(OSError), RuntimeDirectory(self.directory) as directory:
            directory.remove(f"{self.name}.json", f"{self.name}.sock")


def entry_name(pid: int, started: int | None) -> str:
    """What the files of a daemon are called, without their endings."""
    return f"{pid}-{started or 0}"


def own_name() -> str:
    """`entry_name` of this process."""
    return entry_name(os.getpid(), start_time(os.getpid()))


def abstract_name(name: str) -> str:
    """The name in the abstract namespace (unix(7)) where a user's daemon answers root."""
    return f"unionfs/{name}"


def _stored(directory: RuntimeDirectory) -> Iterator[tuple[str, LiveMount | None]]:
    """Every entry with its file's name without ending; None for what cannot be read as one."""
    for file in directory.names():
        if file.endswith(".json"):
            try:
                entry = LiveMount.from_json(json.loads(directory.read(file)), directory.path)
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                entry = None
            yield file.removesuffix(".json"), entry


def _is_abandoned(entry: LiveMount) -> bool:
    """Whether the daemon is gone, and the mount too."""
    if entry.is_alive():
        return False
    return entry.ending or all(m.mountpoint != entry.settings.mountpoint for m in entry.mounts())


def abandoned() -> list[LiveMount]:
    """This user's entries that have neither daemon nor mount; the next call of `entries` removes them."""
    found: list[LiveMount] = []
    for directory in runtime_directories():
        with directory:
            found += (entry for _, entry in _stored(directory) if entry is not None and _is_abandoned(entry))
    return found


def entries() -> list[LiveMount]:
    """Every entry of this user whose daemon lives or whose dead mount remains; the others get removed."""
    found: list[LiveMount] = []
    for directory in runtime_directories():
        with directory:
            for name, entry in _stored(directory):
                if entry is None:
                    _remove_unreadable(directory, name)
                elif _is_abandoned(entry):
                    directory.remove(f"{name}.json", f"{name}.sock")
                else:
                    found.append(entry)
    return found


def _remove_unreadable(directory: RuntimeDirectory, name: str) -> None:
    """Remove a file that is not an entry, unless its daemon, whose pid is in the name, lives."""
    pid, _, started = name.partition("-")
    if not (pid.isdigit() and started.isdigit() and is_alive(int(pid), int(started))):
        directory.remove(f"{name}.json", f"{name}.sock")


def live_mounts() -> list[LiveMount]:
    """This user's mounts that can be used now, oldest first."""
    alive = (entry for entry in entries() if not entry.ending and entry.is_alive() and entry.mounts())
    return sorted(alive, key=lambda entry: entry.since)


def find_by_device(device: str, known: Sequence[LiveMount] | None = None) -> LiveMount | None:
    """The entry of the mount with this `major:minor`, a dead one too: of this user, or among `known`."""
    among = [entry for entry in (entries() if known is None else known) if entry.device == device]
    # A number may have been given to a new mount while a dead one's entry is still there.
    return next((entry for entry in sorted(among, key=lambda entry: not entry.is_alive())), None)


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
        directory=directory,
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
