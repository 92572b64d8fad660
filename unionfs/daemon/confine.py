"""What a daemon gives up: it serves other people's requests for as long as its mount lives.

Before it serves: limits of its own in place of the mounting shell's, a session keyring of its own, all
capabilities but those that serving takes, and `no_new_privs`. Once the mount can be used: system calls that
no union needs are refused (seccomp(2)), for which nobody then has to wait.

An ordinary user's daemon has no capabilities to give up, and needs fusermount3, which is set-user-id, to
unmount: so it gets limits and a keyring alone.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from unionfs.daemon.settings import MountSettings
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

REFUSED_CALLS: Final = (
    "acct", "add_key", "adjtimex", "bpf", "chroot", "clock_adjtime", "clock_settime", "delete_module",
    "fanotify_init", "finit_module", "init_module", "io_uring_enter", "io_uring_register", "io_uring_setup",
    "ioperm", "iopl", "kcmp", "kexec_file_load", "kexec_load", "keyctl", "lookup_dcookie", "nfsservctl",
    "open_by_handle_at", "perf_event_open", "personality", "pidfd_getfd", "pivot_root", "process_madvise",
    "process_vm_readv", "process_vm_writev", "ptrace", "reboot", "request_key", "setdomainname",
    "sethostname", "setns", "settimeofday", "stime", "swapoff", "swapon", "syslog", "unshare", "userfaultfd",
    "vhangup",
)  # fmt: skip
"""System calls that neither a daemon nor what it starts to unmount a volume makes."""


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


def refuse_calls(names: Iterable[str] = REFUSED_CALLS) -> bool:
    """Have the kernel refuse system calls of all threads by EPERM; whether it does.

    Only where new privileges are given up already, for a filter needs that. Slow: it looks for libseccomp.
    """
    if not has_capability(CAP_SYS_ADMIN):
        return False
    try:
        import pyseccomp  # takes 20 ms, and fails without libseccomp
    except (ImportError, OSError, RuntimeError) as error:
        log.info("no system call is refused: %s", error)
        return False
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    rules.set_attr(pyseccomp.Attr.CTL_TSYNC, 1)
    with suppress(OSError):  # or kernels before 5.16 slow the whole process down (kernel/seccomp.c)
        rules.set_attr(pyseccomp.Attr.CTL_SSB, 1)
    for name in names:
        try:
            rules.add_rule(pyseccomp.ERRNO(1), name)
        except (OSError, ValueError):
            continue  # this architecture, or this libseccomp, does not know it
    try:
        rules.load()
    except OSError as error:
        log.info("no system call is refused: %s", error)
        return False
    return True
