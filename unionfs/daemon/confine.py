"""Drops the privileges that a daemon does not need to serve its mount.

Before serving, the daemon replaces the resource limits of the mounting shell, joins a new session keyring,
drops all unneeded capabilities and sets `no_new_privs`. It installs no seccomp filter: that costs 50 to 80 ns
per system call (6 % of a stat), and the remaining CAP_SYS_ADMIN is worse than what a filter would block.

An ordinary user's daemon has no capabilities to drop and needs set-user-id fusermount3 to unmount, so only
its limits and keyring change.
"""

from __future__ import annotations

import logging
import resource
from typing import Final

from unionfs.settings.mount import MountSettings
from unionfs.sys.calls import new_session_keyring
from unionfs.sys.capabilities import (
    CAP_SYS_ADMIN,
    NAMES,
    NUMBERS,
    has_capability,
    keep_capabilities,
    no_new_privileges,
)
from unionfs.sys.mountinfo import mounted_at

log = logging.getLogger(__name__)

# Needed by every mount: O_NOATIME, reading other users' files, trusted.* xattrs, backing files, and the
# space reserved for root.
_READING: Final = frozenset({"DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "SYS_ADMIN", "SYS_RESOURCE"})
# Needed to create files as the caller, with any owner, mode, type, flag and security.* xattr, and (LEASE) to
# find out whether anybody still has a file mapped to write.
_WRITING: Final = frozenset({
    "CHOWN", "FSETID", "LEASE", "LINUX_IMMUTABLE", "MAC_ADMIN", "MAC_OVERRIDE", "MKNOD", "SETFCAP", "SETGID",
    "SETUID",
})  # fmt: skip
# umount.nfs tells an NFSv3 server from a port below 1024 that a volume is unmounted.
_VOLUMES: Final = frozenset({"NET_BIND_SERVICE"})

_OPEN_FILES: Final = 1 << 20
"""The kernel's default for fs.nr_open, the highest limit of open files."""

_LIMITS: Final = {
    "file size": resource.RLIMIT_FSIZE,
    "processor time": resource.RLIMIT_CPU,
    "address space": resource.RLIMIT_AS,
    "data": resource.RLIMIT_DATA,
    "processes": resource.RLIMIT_NPROC,
    "open files": resource.RLIMIT_NOFILE,
}


def needed_capabilities(settings: MountSettings) -> frozenset[str]:
    """Return the names of the capabilities to keep for a mount with these settings."""
    kept = _READING
    # A read-only union with an upper can be remounted read-write; an empty volume is filled with files of
    # any owner.
    if settings.upper is not None or settings.upper_tmpfs is not None or settings.storage:
        kept |= _WRITING
    if settings.storage:
        kept |= _VOLUMES
    proc = mounted_at("/proc")
    if proc is not None and "hidepid=" in proc.super_options:
        kept |= {"SYS_PTRACE"}  # the caller's groups are read from /proc
    return kept


def own_limits() -> list[str]:
    """Raise the limits inherited from the mounting shell. Returns those that stay, as "NAME VALUE"."""
    left = []
    for name, number in _LIMITS.items():
        hard = resource.getrlimit(number)[1]
        highest = max(hard, _OPEN_FILES) if name == "open files" else resource.RLIM_INFINITY
        for wanted in ((highest, highest), (hard, hard)):
            try:
                resource.setrlimit(number, wanted)
                break
            except (ValueError, OSError):
                continue
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY and name not in ("open files", "processes"):
            left.append(f"{name} {soft}")
    # A core dump would contain file data.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return left


def described() -> str:
    """Describe, as part of a sentence, the privileges that the daemon of a writable mount keeps."""
    if not has_capability(CAP_SYS_ADMIN):
        return "it keeps this user's rights, also to unmount by fusermount3; its own keyring and limits"
    kept = sorted(_READING | _WRITING)
    names = ", ".join(kept)
    return f"it keeps {len(kept)} of {len(NAMES)} capabilities ({names}); its own keyring and limits"


def confine(settings: MountSettings) -> None:
    """Drop the privileges that serving does not need. Call it while the process has one thread."""
    if left := own_limits():
        log.warning("limits of the mounting process stay (%s), and may end the mount", ", ".join(left))
    try:
        new_session_keyring()
    except OSError as error:  # a kernel without keyrings
        log.info("no keyring of its own: %s", error)
    if not has_capability(CAP_SYS_ADMIN):
        return
    keep_capabilities(NUMBERS[name] for name in needed_capabilities(settings))
    no_new_privileges()
