"""The command line of bubblewrap, which runs a command in new namespaces; bwrap(1)."""

from __future__ import annotations

import glob
import os
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from unionfs.containers.account import Account
from unionfs.errors import UserError
from unionfs.settings.specs import Spec
from unionfs.sys.mountinfo import read_mountinfo

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_OWN_MOUNTS = ("/dev/", "/proc/", "/sys/")

# moby, daemon/pkg/oci/defaults.go
_MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
    "/sys/devices/virtual/powercap", "/sys/firmware",
)  # fmt: skip
_MASKED_PER_CPU = "/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle"
_CGROUPS = "/sys/fs/cgroup"


def find() -> str:
    """The path of bwrap. Raises UserError."""
    path = shutil.which("bwrap") or shutil.which("bwrap", path=PATH)
    if path is None:
        raise UserError(
            "bubblewrap is missing, and `unionfs run` starts commands with it; install the package "
            "bubblewrap."
        )
    return path


@dataclass(frozen=True, slots=True)
class Confinement:
    """How a command is confined to its container."""

    capabilities: Sequence[str] = ()
    """Capabilities of uid 0; an ordinary user's command has none."""
    filter: bytes | None = None
    """The seccomp program; None: no filter."""
    privileged: bool = False
    """The host's /dev, and writable /proc/sys and /sys."""


def arguments(
    merged: str,
    command: Sequence[str],
    *,
    workdir: str,
    hostname: str,
    own_network: bool,
    storage: Sequence[Spec],
    confinement: Confinement,
    environment_fd: int,
    filter_fd: int | None,
    account: Account | None = None,
    read_only: bool = False,
    resolver_fd: int | None = None,
) -> list[str]:
    """Return its arguments: the merged tree as root, with its mounts, /proc, /dev and /sys, and the command.

    bubblewrap reads `environment_arguments` from `environment_fd`, and from `resolver_fd` the resolv.conf of
    a network that is neither the host's nor none. It is called by this user, or as `account` if this is root;
    an ordinary user's command only sees itself as that.
    """
    by_root = os.geteuid() == 0 and account is None
    if confinement.privileged:
        words = ["--dev-bind", merged, "/", "--proc", "/proc"]
        words += ["--dev-bind", "/dev", "/dev", "--dev-bind-try", "/sys", "/sys"]
    else:
        words = ["--bind", merged, "/", "--proc", "/proc", "--dev", "/dev"]
        words += ["--ro-bind-try", "/sys", "/sys", *protected(by_root=by_root)]
    bind = "--dev-bind" if confinement.privileged else "--bind"
    for target in _outermost(spec.target for spec in storage if spec.target.startswith(_OWN_MOUNTS)):
        # bubblewrap's own mounts cover the union's mounts there. Mounts below such a target are included:
        # no path is followed through a volume, which other containers can change.
        words += [bind, merged + target, target]
    if not own_network or resolver_fd is not None:
        resolver = ["--ro-bind", "/etc/resolv.conf"]
        if resolver_fd is not None:
            resolver = ["--ro-bind-data", str(resolver_fd)]
        targets = {spec.target for spec in storage}
        words += _name_resolution(merged, targets, resolver, makes=account is None)
    if read_only:
        # The mounts on it keep theirs.
        words += ["--remount-ro", "/"]
    words += ["--unshare-pid", "--unshare-uts", "--unshare-ipc", "--unshare-cgroup-try"]
    if own_network:
        words.append("--unshare-net")
    if account is not None and os.geteuid() != 0:
        words += ["--unshare-user", "--uid", str(account.uid), "--gid", str(account.gid)]
    if by_root:
        words += ["--cap-drop", "ALL"]
        for name in confinement.capabilities:
            words += ["--cap-add", name]
    if filter_fd is not None:
        words += ["--seccomp", str(filter_fd)]
    words += ["--args", str(environment_fd), "--hostname", hostname]
    return [*words, "--chdir", workdir, "--", *command]


def protected(*, by_root: bool) -> list[str]:
    """Hide some of the kernel's files and make others read-only, as in Docker.

    Mounts below /sys (debugfs, tracefs, cgroups) are not visible in the container's /sys, as in Docker.
    """
    words = []
    if by_root:
        for path in _kernel_files():
            words += ["--ro-bind-try", path, path]
    mounted = [entry.mountpoint for entry in read_mountinfo() if entry.mountpoint.startswith("/sys/")]
    hidden = [path for path in (*_MASKED, *glob.glob(_MASKED_PER_CPU)) if os.path.lexists(path)]
    for path in _outermost([*hidden, *mounted]):
        if os.path.isdir(path):
            words += ["--tmpfs", path, "--remount-ro", path]
        else:
            words += ["--dev-bind", os.devnull, path]
    if _CGROUPS in mounted and (own := _own_cgroup()):
        words += ["--ro-bind", own, _CGROUPS]
    return words


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


def _name_resolution(
    merged: str, targets: set[str], resolver: Sequence[str], *, makes: bool
) -> list[str]:
    """Bind resolv.conf by the words of `resolver`, and the host's hosts.

    `makes`: whether bubblewrap makes files in /etc like this user.
    """
    words: list[str] = []
    for path, source in (("/etc/resolv.conf", resolver), ("/etc/hosts", ("--ro-bind", "/etc/hosts"))):
        if not os.path.exists(path) or path in targets or "/etc" in targets:
            continue
        try:
            kind = stat.S_IFMT(os.lstat(merged + path).st_mode)
        except FileNotFoundError:
            # bubblewrap creates the file, and fails if it cannot: without /etc, or in another user's.
            etc = merged + "/etc"
            can = makes and os.path.isdir(etc) and os.access(etc, os.W_OK | os.X_OK)
            kind = stat.S_IFREG if can else 0
        if kind == stat.S_IFREG and not os.path.islink(merged + "/etc"):
            words += [*source, path]
    return words


def in_memory(data: bytes) -> int:
    """An fd from which bubblewrap reads `data`."""
    fd = os.memfd_create("bwrap", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as out:
        out.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def environment_arguments(values: Mapping[str, str]) -> bytes:
    """Return the arguments that set the command's environment, for bubblewrap's --args.

    In bubblewrap's own environment, LD_PRELOAD and the like would load the container's libraries into it; on
    its command line, all users of the host could read the values.
    """
    words = ["--clearenv", *(word for item in values.items() for word in ("--setenv", *item))]
    return b"".join(os.fsencode(word) + b"\0" for word in words)


def environment(given: Mapping[str, str], hostname: str, home: str | None = None) -> dict[str, str]:
    """Return a command's environment: Docker's defaults and the `given` variables."""
    home = home or ("/root" if os.geteuid() == 0 else "/")
    values = {"PATH": PATH, "HOME": home, "HOSTNAME": hostname}
    if "TERM" in os.environ:
        values["TERM"] = os.environ["TERM"]
    return {**values, **given}
