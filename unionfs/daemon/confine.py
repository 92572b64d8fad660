"""What a daemon gives up: it serves other people's requests for as long as its mount lives.

Before it serves it gets limits of its own in place of the mounting shell's and a session keyring of its own,
and gives up all capabilities but those that serving takes, and new privileges (`no_new_privs`). There is no
filter of system calls: it costs 50 to 80 ns a call (6 % of a stat), and what CAP_SYS_ADMIN can do is worse.

An ordinary user's daemon has no capabilities to give up, and needs fusermount3, which is set-user-id, to
unmount: so it gets limits and a keyring alone.
"""

from __future__ import annotations

import logging
import resource
from typing import Final

from unionfs.settings.mount import MountSettings
from unionfs.sys.capabilities import (
    CAP_SYS_ADMIN,
    NAMES,
    NUMBERS,
    has_capability,
    keep_capabilities,
    no_new_privileges,
)
from unionfs.sys.keyring import new_session_keyring
from unionfs.sys.mountinfo import mounted_at

log = logging.getLogger(__name__)

# What every mount takes: O_NOATIME, reading what others own, trusted.* xattrs, backing files, and the space
# that is reserved for root.
_READING: Final = frozenset({"DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "SYS_ADMIN", "SYS_RESOURCE"})
# Creating files as the caller, with any owner, mode, type, flag and security.* xattr.
_WRITING: Final = frozenset({
    "CHOWN", "FSETID", "LINUX_IMMUTABLE", "MAC_ADMIN", "MAC_OVERRIDE", "MKNOD", "SETFCAP", "SETGID", "SETUID",
})  # fmt: skip
# umount.nfs tells an NFSv3 server from a port below 1024 that a volume is unmounted.
_VOLUMES: Final = frozenset({"NET_BIND_SERVICE"})

_LIMITS: Final = {
    "file size": resource.RLIMIT_FSIZE,
    "processor time": resource.RLIMIT_CPU,
    "address space": resource.RLIMIT_AS,
    "data": resource.RLIMIT_DATA,
    "processes": resource.RLIMIT_NPROC,
    "open files": resource.RLIMIT_NOFILE,
}


def needed_capabilities(settings: MountSettings) -> frozenset[str]:
    """The names of the capabilities that the daemon of such a mount keeps, as far as it has them."""
    kept = _READING
    # A union with an upper that is mounted read-only can be remounted; an empty volume is filled with files
    # of any owner.
    if settings.upper is not None or settings.upper_tmpfs is not None or settings.storage:
        kept |= _WRITING
    if settings.storage:
        kept |= _VOLUMES
    proc = mounted_at("/proc")
    if proc is not None and "hidepid=" in proc.super_options:
        kept |= {"SYS_PTRACE"}  # the groups of a caller are read in /proc
    return kept


def own_limits() -> list[str]:
    """Lift the limits of the mounting shell; returns those that this user may not lift, as words."""
    left = []
    for name, number in _LIMITS.items():
        soft, hard = resource.getrlimit(number)
        highest = hard if name == "open files" else resource.RLIM_INFINITY
        for wanted in ((highest, highest), (hard, hard)):
            try:
                resource.setrlimit(number, wanted)
                break
            except (ValueError, OSError):
                continue
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY and name not in ("open files", "processes"):
            left.append(f"{name} {soft}")
    # A dump would hold what the files hold.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return left


def described() -> str:
    """What the daemon of a writable mount by this user keeps, within a sentence."""
    if not has_capability(CAP_SYS_ADMIN):
        return "it keeps this user's rights, also to unmount by fusermount3; its own keyring and limits"
    kept = sorted(_READING | _WRITING)
    names = ", ".join(kept)
    return f"it keeps {len(kept)} of {len(NAMES)} capabilities ({names}); its own keyring and limits"


def confine(settings: MountSettings) -> None:
    """Give up all but what serving takes. To be called while there is one thread."""
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
