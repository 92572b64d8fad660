"""Mounts of a volume by a container engine, which are counted and outlive the process that asked for them.

An engine mounts and unmounts a volume by IDs of its own (docs.docker.com/engine/extend/plugins_volume). It
may mount one ID several times: dockerd does for `docker cp` (moby, volume/mounts, MountPoint.Setup). podman
has one ID for all its containers, which it counts itself (libpod, Volume.mount). Its process ends while the
container runs; dockerd, when killed, forgets the IDs of its containers. So the end of the process alone says
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

from unionfs.sys.mountspaces import is_shown_elsewhere
from unionfs.sys.process import command_of, is_alive, start_time

_FORGETFUL = ("dockerd", "balenad")
"""Engines that run for as long as their containers need them, and forget their IDs when they are killed."""


@dataclass(frozen=True, slots=True)
class Engine:
    """The process of a container engine."""

    name: str
    pid: int
    """0 for a process outside this pid namespace: nothing is known of it."""
    started: int
    """Clock ticks since boot."""
    boot: str

    @classmethod
    def of_process(cls, pid: int) -> Engine:
        """Returns the engine that is process `pid` now."""
        return cls(command_of(pid) if pid else "?", pid, start_time(pid) or 0, boot_id())

    @property
    def has_ended(self) -> bool:
        return self.boot != boot_id() or (self.pid != 0 and not is_alive(self.pid, self.started))


@dataclass(frozen=True, slots=True)
class Hold:
    """How often an engine has mounted a volume by one ID."""

    engine: Engine
    """The last one that mounted it."""
    count: int = 1
    """0: the engine has unmounted it, but the storage was busy."""

    def again(self, engine: Engine) -> Hold:
        return Hold(engine, self.count + 1)

    def less(self) -> Hold:
        return replace(self, count=max(self.count - 1, 0))

    def is_void(self, path: str) -> bool:
        """Whether the engine has unmounted it or can no longer do so; `path` is that of the data."""
        if self.count == 0 or self.engine.boot != boot_id():
            return True
        # Between the end of a container and its restart podman relies on the mount, and shows it nowhere.
        return self.engine.name in _FORGETFUL and self.is_unused(path)

    def is_unused(self, path: str, engine: Engine | None = None) -> bool:
        """Whether the engine's process has ended or is `engine`, and no container has the data mounted."""
        return (self.engine.has_ended or self.engine == engine) and not is_shown_elsewhere(path)

    def to_text(self) -> str:
        """Returns words without colons."""
        engine = self.engine
        return f"{self.count} {engine.pid} {engine.started} {engine.boot} {quote(engine.name, safe='')}"

    @classmethod
    def from_text(cls, text: str) -> Hold:
        """Raises ValueError for words that `to_text` cannot return."""
        count, pid, started, boot, name = text.split(" ")
        return cls(Engine(unquote(name), int(pid), int(started), boot), int(count))


def boot_id() -> str:
    """An identifier of this boot of the kernel; proc_sys_kernel(5), random/boot_id."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
