"""What a container consists of, whichever runtime makes it: its mounts, namespaces, rights and command."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from unionfs.containers.account import Account
from unionfs.settings.specs import Spec
from unionfs.sys.mountinfo import read_mountinfo

_OWN_MOUNTS = ("/dev/", "/proc/", "/sys/")

# moby, daemon/pkg/oci/defaults.go
_MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
    "/sys/devices/virtual/powercap", "/sys/firmware",
)  # fmt: skip
_MASKED_PER_CPU = "/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle"
_CGROUPS = "/sys/fs/cgroup"
_RESOLVER = "/etc/resolv.conf"
_HOSTS = "/etc/hosts"


@dataclass(frozen=True, slots=True)
class Confinement:
    """How a command is confined to its container."""

    capabilities: Sequence[str] = ()
    """Capabilities of uid 0; an ordinary user's command has none."""
    filter: bytes | None = None
    """The seccomp program; None: no filter."""
    privileged: bool = False
    """The host's /dev, and writable /proc/sys and /sys."""


class Kind(Enum):
    BIND = "bind"
    """A file or a directory with all that is mounted below it."""
    PROC = "proc"
    DEV = "dev"
    """The standard devices, a devpts of its own, and the container's terminal as console."""
    EMPTY = "empty"
    """An empty read-only directory, which hides what is there."""
    NULL = "null"
    """The host's /dev/null, which hides a file."""
    TEXT = "text"
    """A file with the description's `resolver`."""


@dataclass(frozen=True, slots=True)
class Mount:
    kind: Kind
    target: str
    source: str = ""
    read_only: bool = False
    devices: bool = False
    """Whether device files work there."""
    optional: bool = False
    """Whether it is left out without its source."""


@dataclass(frozen=True, slots=True)
class Description:
    """A container. It is made by this user, or by `account` if this is root."""

    merged: str
    """The union, its root."""
    command: Sequence[str]
    workdir: str
    hostname: str
    environment: Mapping[str, str]
    storage: Sequence[Spec]
    confinement: Confinement
    own_network: bool = False
    account: Account | None = None
    read_only: bool = False
    resolver: bytes | None = None
    """The resolv.conf of a network that is neither the host's nor none."""

    @property
    def by_root(self) -> bool:
        return os.geteuid() == 0 and self.account is None

    def mounts(self) -> Iterator[Mount]:
        """Yield the mounts besides the root; later ones are on top."""
        privileged = self.confinement.privileged
        yield Mount(Kind.PROC, "/proc")
        if privileged:
            yield Mount(Kind.BIND, "/dev", "/dev", devices=True)
            yield Mount(Kind.BIND, "/sys", "/sys", devices=True, optional=True)
        else:
            yield Mount(Kind.DEV, "/dev")
            yield Mount(Kind.BIND, "/sys", "/sys", read_only=True, optional=True)
            yield from protection(by_root=self.by_root)
        for target in _outermost(spec.target for spec in self.storage if spec.target.startswith(_OWN_MOUNTS)):
            # The kernel's filesystems cover the union's mounts there. Mounts below such a target are
            # included: no path is followed through a volume, which other containers can change.
            yield Mount(Kind.BIND, target, self.merged + target, devices=privileged)
        if not self.own_network or self.resolver is not None:
            yield from self._name_resolution()

    def _name_resolution(self) -> Iterator[Mount]:
        """resolv.conf, and the host's hosts."""
        targets = {spec.target for spec in self.storage}
        for path in (_RESOLVER, _HOSTS):
            if not os.path.exists(path) or path in targets or "/etc" in targets:
                continue
            try:
                kind = stat.S_IFMT(os.lstat(self.merged + path).st_mode)
            except FileNotFoundError:
                # The runtime creates the file, and fails if it cannot: without /etc, or in another user's.
                etc = self.merged + "/etc"
                can = self.account is None and os.path.isdir(etc) and os.access(etc, os.W_OK | os.X_OK)
                kind = stat.S_IFREG if can else 0
            if kind == stat.S_IFREG and not os.path.islink(self.merged + "/etc"):
                text = path == _RESOLVER and self.resolver is not None
                yield Mount(Kind.TEXT if text else Kind.BIND, path, "" if text else path, read_only=True)


def protection(*, by_root: bool) -> Iterator[Mount]:
    """Hide some of the kernel's files and make others read-only, as in Docker.

    Mounts below /sys (debugfs, tracefs, cgroups) are not visible in the container's /sys, as in Docker.
    """
    if by_root:
        for path in _kernel_files():
            yield Mount(Kind.BIND, path, path, read_only=True, optional=True)
    mounted = [entry.mountpoint for entry in read_mountinfo() if entry.mountpoint.startswith("/sys/")]
    hidden = [path for path in (*_MASKED, *glob.glob(_MASKED_PER_CPU)) if os.path.lexists(path)]
    for path in _outermost([*hidden, *mounted]):
        yield Mount(Kind.EMPTY if os.path.isdir(path) else Kind.NULL, path)
    if _CGROUPS in mounted and (own := _own_cgroup()):
        yield Mount(Kind.BIND, _CGROUPS, own, read_only=True)


def _kernel_files() -> list[str]:
    """Return all names in /proc except processes, to be made read-only: uid 0 needs no capability to write.

    Docker leaves most of it writable. But owner and mode of such a file are shared by every procfs
    (fs/proc/generic.c, proc_notify_change), so a container would change them for the host.
    """
    with os.scandir("/proc") as entries:
        return [entry.path for entry in entries if not entry.name.isdigit() and not entry.is_symlink()]


def _own_cgroup() -> str | None:
    """Return the directory of this process's cgroup, the container's root cgroup; None without cgroup2."""
    if any(entry.mountpoint == _CGROUPS and entry.fstype != "cgroup2" for entry in read_mountinfo()):
        return None
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as table:
            path = next(line[3:].rstrip("\n") for line in table if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    own = os.path.normpath(f"{_CGROUPS}/{path}")
    return own if os.path.isdir(own) and ".." not in path.split("/") else None


def _outermost(paths: Iterable[str]) -> list[str]:
    """Return the paths that are not below another one."""
    found: list[str] = []
    for path in sorted(set(paths)):
        if not any(path.startswith(f"{other}/") for other in found):
            found.append(path)
    return found
