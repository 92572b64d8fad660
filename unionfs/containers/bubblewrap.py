"""The command line of bubblewrap, which puts a command into namespaces of its own; bwrap(1)."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping, Sequence

from unionfs.daemon.errors import UserError
from unionfs.storage.specs import Spec

# What Docker leaves to root in a container (moby, oci/caps/defaults.go).
_CAPABILITIES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL",
    "CAP_AUDIT_WRITE",
)  # fmt: skip
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_OWN_MOUNTS = ("/dev/", "/proc/", "/sys/")


def find() -> str:
    """The path of bwrap. Raises UserError."""
    path = shutil.which("bwrap") or shutil.which("bwrap", path=PATH)
    if path is None:
        raise UserError(
            "bubblewrap is missing, and `unionfs run` starts commands with it; install the package "
            "bubblewrap."
        )
    return path


def arguments(
    program: str,
    merged: str,
    command: Sequence[str],
    *,
    workdir: str,
    hostname: str,
    own_network: bool,
    storage: Sequence[Spec],
    info_fd: int,
) -> list[str]:
    """The whole command line: the merged tree as root, with what is mounted in it, /proc, /dev, /sys."""
    words = [program, "--bind", merged, "/", "--proc", "/proc", "--dev", "/dev"]
    if os.geteuid() == 0:
        # Kernel settings ask for uid 0 and no capability; bubblewrap covers other places in /proc, not these.
        words += ["--ro-bind", "/proc/sys", "/proc/sys"]
    words += ["--ro-bind-try", "/sys", "/sys"]
    for spec in storage:
        # bubblewrap's own mounts cover what is mounted there in the union.
        if spec.target.startswith(_OWN_MOUNTS):
            words += ["--bind", merged + spec.target, spec.target]
    words += ["--unshare-pid", "--unshare-uts", "--unshare-ipc", "--unshare-cgroup-try"]
    if own_network:
        words.append("--unshare-net")
    else:
        words += _name_resolution(merged, {spec.target for spec in storage})
    if os.geteuid() == 0:
        words += ["--cap-drop", "ALL"]
        for name in _CAPABILITIES:
            words += ["--cap-add", name]
    words += ["--hostname", hostname, "--chdir", workdir, "--info-fd", str(info_fd), "--"]
    return [*words, *command]


def _name_resolution(merged: str, targets: set[str]) -> list[str]:
    """The host's network is of use only with the host's way of finding names."""
    words: list[str] = []
    for path in ("/etc/resolv.conf", "/etc/hosts"):
        if not os.path.exists(path) or path in targets or "/etc" in targets:
            continue
        try:
            kind = stat.S_IFMT(os.lstat(merged + path).st_mode)
        except FileNotFoundError:
            # bubblewrap makes the file, and ends where it cannot: in no /etc, or in that of others.
            etc = merged + "/etc"
            kind = stat.S_IFREG if os.path.isdir(etc) and os.access(etc, os.W_OK | os.X_OK) else 0
        if kind == stat.S_IFREG and not os.path.islink(merged + "/etc"):
            words += ["--ro-bind", path, path]
    return words


def environment(given: Mapping[str, str], hostname: str) -> dict[str, str]:
    """What a command finds in its environment: Docker's few variables, and those that were given."""
    values = {"PATH": PATH, "HOME": "/root" if os.geteuid() == 0 else "/", "HOSTNAME": hostname}
    if "TERM" in os.environ:
        values["TERM"] = os.environ["TERM"]
    return {**values, **given}
