"""The registry of this user's live mounts: one JSON file per mount in the runtime directory.

The daemon writes the file when its mount is usable and removes it at the end. A file without a daemon is
stale; the next reader removes it unless the dead mount still exists, and what daemons left that were killed
while they mounted. For other users' mounts, root asks the kernel and their daemons: `unionfs.daemon.others`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from unionfs.daemon.claiming import clear_orphans
from unionfs.daemon.control import ANSWER_SECONDS, ask, listens
from unionfs.daemon.runtime import RuntimeDirectory, is_nothing, runtime_directories
from unionfs.errors import on_failure, quoted
from unionfs.settings.mount import MountSettings
from unionfs.sys.mountinfo import MountEntry, mounts_of_device, read_mountinfo
from unionfs.sys.process import is_alive, pid_namespace, start_time, wait_gone

_NOTICE_SECONDS = 2.0
"""How long a daemon may take to notice that its mount is gone."""

ENDING = "ending"
"""In a daemon's answer: whether it was told to end."""


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
    """The mount is gone, and the daemon is about to end."""
    holder: tuple[int, int] | None = None
    """The process (pid, start time) that starts another daemon when this one dies."""
    guardian: tuple[int, int] | None = None
    """The process (pid, start time) that is the user of its volumes; None: the daemon."""
    waiting: bool = False
    """Nothing is mounted: its daemon died, and its holder, the process of this entry, has others mount the
    union anew until one succeeds (`daemon.anew`)."""
    directory: str = ""
    """The runtime directory of this entry; empty for a mount of another user."""
    namespace: int = field(default_factory=pid_namespace)
    """The daemon's PID namespace, its inode number: in others the pid is another process's, or nobody's."""
    uid: int | None = None
    """The uid of another user, from the kernel; None: this user."""

    @property
    def name(self) -> str:
        """The name of the entry's files, without suffix."""
        return entry_name(self.pid, self.started)

    @property
    def volume_user(self) -> tuple[int, int]:
        """The process (pid, start time) that is the user of its volumes."""
        return self.guardian or (self.pid, self.started)

    def is_alive(self) -> bool:
        return is_alive(self.pid, self.started)

    def is_elsewhere(self) -> bool:
        """Return whether the daemon lives in another PID namespace, such as a container's.

        Only there can it be looked at and ended.
        """
        if self.namespace == pid_namespace():
            return False
        with suppress(OSError), RuntimeDirectory(self.directory) as directory:
            return listens(directory.address(f"{self.name}.sock"))
        return False

    def has_only_holder(self) -> bool:
        """Return whether the daemon has died and its holder has not: it starts another one; or, if the mount
        is dead, it answers all requests with EIO, since daemons died too often."""
        return not self.is_alive() and self.holder is not None and is_alive(*self.holder)

    def mounts(self) -> list[MountEntry]:
        """Return its mounts in the daemon's mount namespace, or in ours if that is not readable."""
        if self.is_alive():  # else another process may have the pid
            with suppress(OSError):
                return mounts_of_device(self.device, read_mountinfo(self.pid))
        return mounts_of_device(self.device)

    def ask(
        self, question: dict[str, Any] | None = None, *, timeout: float = ANSWER_SECONDS
    ) -> dict[str, Any] | None:
        """Return the daemon's answer, or None if none arrives within `timeout` seconds.

        The daemon ignores unknown parts of a question.
        """
        try:
            return self.asked(question, timeout=timeout)
        except OSError:
            return None

    def asked(self, question: dict[str, Any] | None, *, timeout: float) -> dict[str, Any] | None:
        """Like `ask`, but raises OSError if it is not known whether the daemon can be asked."""
        if self.uid is not None:
            return ask("\0" + abstract_name(self.name), timeout, question=question, pid=self.pid)
        try:
            with RuntimeDirectory(self.directory) as directory:
                return ask(directory.address(f"{self.name}.sock"), timeout, question=question)
        except OSError as error:
            if is_nothing(error):
                return None
            raise

    def to_json(self) -> dict[str, Any]:
        names = (
            "pid", "started", "device", "since", "claims", "ending", "holder", "guardian", "waiting",
            "namespace",
        )  # fmt: skip
        return {"settings": self.settings.to_json(), **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_json(cls, values: Any, directory: str = "") -> LiveMount:
        """Read the values of `to_json`. Raises KeyError, TypeError or ValueError for other values."""
        return cls(
            settings=MountSettings.from_json(values["settings"]),
            pid=int(values["pid"]),
            started=int(values["started"]),
            device=str(values["device"]),
            since=float(values["since"]),
            claims=tuple((int(device), int(inode)) for device, inode in values["claims"]),
            ending=bool(values["ending"]),
            holder=_process(values.get("holder")),
            guardian=_process(values.get("guardian")),
            waiting=bool(values.get("waiting")),
            directory=directory,
            namespace=int(values.get("namespace") or pid_namespace()),
        )

    def save(self) -> None:
        """Write the entry atomically. Raises OSError."""
        with RuntimeDirectory(self.directory) as directory:
            directory.write(f"{self.name}.json", json.dumps(self.to_json()).encode("ascii"))

    def remove(self) -> None:
        """Remove the entry and the socket."""
        with suppress(OSError), RuntimeDirectory(self.directory) as directory:
            directory.remove(f"{self.name}.json", f"{self.name}.sock")


def _process(value: Any) -> tuple[int, int] | None:
    return None if value is None else (int(value[0]), int(value[1]))


def entry_name(pid: int, started: int | None) -> str:
    """Return the name of a daemon's files, without suffix."""
    return f"{pid}-{started or 0}"


def own_name() -> str:
    return entry_name(os.getpid(), start_time(os.getpid()))


def abstract_name(name: str) -> str:
    """Return the abstract socket name (unix(7)) at which a user's daemon answers root."""
    return f"unionfs/{name}"


def _stored(directory: RuntimeDirectory) -> Iterator[tuple[str, LiveMount | None]]:
    """Yield the name (without suffix) and entry of each file; None for a damaged entry. Raises OSError."""
    for file in directory.names():
        if file.endswith(".json"):
            entry = None
            try:
                entry = LiveMount.from_json(json.loads(directory.read(file)), directory.path)
            except OSError as error:
                if not is_nothing(error):
                    raise
            except (ValueError, KeyError, TypeError, RecursionError):
                pass
            yield file.removesuffix(".json"), entry


@contextmanager
def _opened_directories() -> Iterator[list[RuntimeDirectory]]:
    """The runtime directories. Raises UserError, also for an OSError of the block, which reads them."""
    with ExitStack() as opened:
        found = [opened.enter_context(directory) for directory in runtime_directories()]
        with on_failure("the list of mounts cannot be read", "try again"):
            yield found


def _is_abandoned(entry: LiveMount) -> bool:
    """Return whether both daemon and mount are gone."""
    if entry.is_alive():
        return False
    return entry.ending or all(m.mountpoint != entry.settings.mountpoint for m in entry.mounts())


def abandoned() -> list[LiveMount]:
    """Return this user's entries with neither daemon nor mount; the next call of `entries` removes them."""
    return [entry for entry in _all() if _is_abandoned(entry)]


def remaining() -> list[LiveMount]:
    """Like `entries`, but remove nothing."""
    return [entry for entry in _all() if not _is_abandoned(entry)]


def _all() -> list[LiveMount]:
    found: list[LiveMount] = []
    with _opened_directories() as directories:
        for directory in directories:
            stored = (entry for _, entry in _stored(directory))
            found += (entry for entry in stored if entry is not None and not entry.is_elsewhere())
    return found


def entries() -> list[LiveMount]:
    """Return this user's entries with a live daemon or a dead mount; remove all others. Raises UserError.

    Those of live daemons in other PID namespaces stay, but are not returned.
    """
    found: list[LiveMount] = []
    others: set[str] = set()
    with _opened_directories() as directories:
        for directory in directories:
            for name, entry in _stored(directory):
                if entry is None:
                    _remove_damaged(directory, name)
                elif entry.is_elsewhere():
                    others.add(name)
                elif _is_abandoned(entry):
                    directory.remove(f"{name}.json", f"{name}.sock")
                else:
                    found.append(entry)
            _remove_orphans(directory, {entry.name for entry in found} | others)
            clear_orphans(directory)
    return found


def _remove_orphans(directory: RuntimeDirectory, known: Container[str]) -> None:
    """Remove the sockets and half-written entries of dead daemons without an entry."""
    for file in directory.names():
        name, _, suffix = file.partition(".")
        is_ours = suffix in ("sock", "json.new") and _is_entry_name(name)
        if is_ours and name not in known and _is_of_dead(directory, name):
            directory.remove(file)


def _is_entry_name(name: str) -> bool:
    pid, _, started = name.partition("-")
    return pid.isdecimal() and started.isdecimal()


def _is_of_dead(directory: RuntimeDirectory, name: str) -> bool:
    """Return whether `name` is the `entry_name` of a daemon that has ended.

    One in another PID namespace listens before it has an entry.
    """
    pid, _, started = name.partition("-")
    return not is_alive(int(pid), int(started)) and not listens(directory.address(f"{name}.sock"))


def _remove_damaged(directory: RuntimeDirectory, name: str) -> None:
    """Remove a damaged entry, unless the daemon whose pid is in the name is alive."""
    if not _is_entry_name(name) or _is_of_dead(directory, name):
        directory.remove(f"{name}.json", f"{name}.sock")


def live_mounts() -> list[LiveMount]:
    """Return this user's usable mounts, oldest first."""
    alive = (entry for entry in entries() if not entry.ending and entry.is_alive() and entry.mounts())
    return sorted(alive, key=lambda entry: entry.since)


def waiting_mounts() -> list[LiveMount]:
    """Return this user's mounts that are about to be mounted anew, oldest first."""
    return sorted((entry for entry in entries() if entry.waiting), key=lambda entry: entry.since)


def held_mounts() -> list[LiveMount]:
    """Return this user's mounts whose daemon has died and whose holder has not, oldest first: another daemon
    takes over soon, or they are dead."""
    alive = {entry.device for entry in live_mounts()}
    found = (entry for entry in entries() if entry.has_only_holder() and entry.device not in alive)
    return sorted(found, key=lambda entry: entry.since)


def waiting_at(mountpoint: str) -> list[LiveMount]:
    """Return those of `waiting_mounts` with that mountpoint."""
    return [entry for entry in waiting_mounts() if entry.settings.mountpoint == mountpoint]


def has_ended_soon(entry: LiveMount) -> bool:
    """Return whether the daemon of an entry ends soon, and wait for that if its mount is gone, or if it was
    told to end.

    umount(2) returns before the daemon has noticed and written the upper to disk, which may take long.
    """
    if entry.waiting:
        return not entry.is_alive()
    deadline = time.monotonic() + _NOTICE_SECONDS
    while not wait_gone(entry.pid, entry.started, 0):
        if entry.mounts() and not entry.ending:
            if _was_told_to_end(entry):
                deadline = time.monotonic() + _NOTICE_SECONDS
            elif entry.mounts():  # else it has ended its mount meanwhile
                return False
        if time.monotonic() > deadline:
            current = [one for one in entries() if one.name == entry.name]
            if current and not current[0].ending:
                return False
        wait_gone(entry.pid, entry.started, _NOTICE_SECONDS / 10)
    return True


def _was_told_to_end(entry: LiveMount) -> bool:
    answer = entry.ask()
    return answer is not None and answer.get(ENDING) is True


def find_by_device(device: str, known: Sequence[LiveMount] | None = None) -> LiveMount | None:
    """Return the entry with this `major:minor`, even of a dead mount, from `known` or this user's entries."""
    among = [entry for entry in (entries() if known is None else known) if entry.device == device]
    # A new mount may have reused the number of a dead mount whose entry still exists.
    return next((entry for entry in sorted(among, key=lambda entry: not entry.is_alive())), None)


def claims_of(settings: MountSettings) -> tuple[tuple[int, int], ...]:
    """Return (st_dev, st_ino) of upper and work. Call it before mounting, which may cover their paths."""
    found = [os.stat(path) for path in (settings.upper, settings.work) if path is not None]
    return tuple((status.st_dev, status.st_ino) for status in found)


def announce(
    settings: MountSettings,
    device: str,
    directory: str,
    claims: tuple[tuple[int, int], ...],
    since: float | None = None,
    guardian: tuple[int, int] | None = None,
) -> LiveMount:
    """Register this process as the daemon of a usable mount. Raises OSError."""
    pid = os.getpid()
    started = start_time(pid) or 0
    entry = LiveMount(
        settings, pid, started, device, since or time.time(), claims, guardian=guardian, directory=directory
    )
    entry.save()
    return entry


def mark_ending(entry: LiveMount) -> None:
    """Record that the mount is gone and the daemon only syncs and closes the layers."""
    with suppress(OSError):
        replace(entry, ending=True).save()


def describe_owner(entry: LiveMount) -> str:
    return f"the active mount {quoted(entry.settings.mountpoint)} (pid {entry.pid})"
