"""Checks which features the host offers, by trying them where possible."""

from __future__ import annotations

import errno
import gzip
import os
import resource
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from unionfs.core.idling import DEVICE, MOST_CPUS, Idling
from unionfs.daemon.confine import described
from unionfs.daemon.dead import dead_mounts
from unionfs.daemon.fuse import fuse_device_problem, user_allow_other
from unionfs.errors import on_failure, reason
from unionfs.fuse.protocol import NegotiationRefused, Privileges, Settings, negotiate
from unionfs.fuse.protocol.flags import KERNEL_VERSION
from unionfs.fuse.protocol.requests import InitRequest
from unionfs.sys import calls, libfuse
from unionfs.sys.capabilities import (
    CAP_CHOWN,
    CAP_SYS_ADMIN,
    has_capability,
    in_initial_user_namespace,
    may_use_trusted_xattrs,
)
from unionfs.sys.fds import Owned
from unionfs.sys.fuseprobe import init_offer, offers_passthrough
from unionfs.sys.fusermount import find_fusermount
from unionfs.sys.kernel import kernel_version
from unionfs.sys.mountinfo import mount_id_of_path, mount_of_id

State = Literal["ok", "limited", "missing"]

_MOUNT_NEEDS = frozenset({"/dev/fuse", "fusermount3"})
_OLDEST_KERNEL = (5, 12)  # mount_setattr(2), for read-only private lowers


@dataclass(frozen=True, slots=True)
class Finding:
    """One result. `limited`: unions work, but slower or without some feature."""

    name: str
    state: State
    detail: str
    cure: str | None = None


def examine(directory: str | None = None) -> list[Finding]:
    """Run all checks; filesystem features are tried in `directory` (None: the temporary directory).

    Raises UserError if it is not writable.
    """
    findings = [_device(), _kernel(), _fusermount(), _allow_other(), _pyfuse3()]
    with on_failure(
        f"nothing can be tried out in {directory or tempfile.gettempdir()}",
        "name a directory that can be written by --dir",
    ), _scratch(directory) as place:
        findings += _filesystem(place)
    findings += [_owners(), _overlayfs(), _passthrough(), _idle_states(), _session()]
    findings += [Finding("rights of a daemon", "ok", described())]
    findings += [_user_namespaces(), _bubblewrap(), _open_files(), *_dead_mounts()]
    return findings


@contextmanager
def _scratch(directory: str | None) -> Iterator[str]:
    """Yield a scratch directory as a path through its fd: the owner of `directory` may rename it."""
    path = tempfile.mkdtemp(prefix="unionfs-doctor-", dir=directory)
    with Owned(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
        try:
            status = os.fstat(fd)
            if status.st_uid != os.geteuid() or status.st_mode & 0o077 or os.listdir(fd):
                raise OSError(errno.EPERM, "somebody has replaced the directory that was made there")
            yield f"/proc/self/fd/{fd}"
        finally:
            with suppress(OSError):
                for name in os.listdir(fd):
                    os.unlink(name, dir_fd=fd)
                os.rmdir(path)


def mounting_is_possible(findings: list[Finding]) -> bool:
    """Return whether everything that each mount needs is present."""
    return not any(finding.state == "missing" and finding.name in _MOUNT_NEEDS for finding in findings)


def _device() -> Finding:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        detail, _, cure = fuse_device_problem(error).removesuffix(".").partition("; ")
        return Finding("/dev/fuse", "missing", detail, cure)
    mode = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    if mode & 0o006 != 0o006:
        detail = f"opens, but mode {mode:04o} keeps other users out"
        return Finding("/dev/fuse", "limited", detail, "chmod 666 /dev/fuse")
    return Finding("/dev/fuse", "ok", "opens for reading and writing")


def _kernel() -> Finding:
    release = os.uname().release
    if kernel_version() < _OLDEST_KERNEL:
        detail = f"{release}, too old to protect lowers by read-only mounts"
        return Finding("kernel", "limited", detail, f"Linux {'.'.join(map(str, _OLDEST_KERNEL))}")
    return Finding("kernel", "ok", release)


def _fusermount() -> Finding:
    name, path = "fusermount3", find_fusermount()
    state: State = "limited" if os.geteuid() == 0 else "missing"  # root calls mount(2) directly
    if path is None:
        return Finding(name, state, "not installed: ordinary users cannot mount", "install the package fuse3")
    status = os.stat(path)
    if status.st_uid != 0 or not status.st_mode & stat.S_ISUID:
        detail = f"{path} is not setuid root: ordinary users cannot mount"
        return Finding(name, state, detail, f"chown root {path}; chmod 4755 {path}")
    if not os.path.exists("/etc/mtab"):
        detail = f"{path} wants /etc/mtab to unmount"
        return Finding(name, "limited", detail, "ln -s /proc/self/mounts /etc/mtab")
    return Finding(name, "ok", f"{path}, setuid root")


def _allow_other() -> Finding:
    name = "user_allow_other"
    if user_allow_other():
        return Finding(name, "ok", "ordinary users may let others into their mounts")
    cure = "add a line user_allow_other to /etc/fuse.conf"
    return Finding(name, "limited", "ordinary users cannot let others into their mounts", cure)


def _pyfuse3() -> Finding:
    try:
        version = metadata.version("pyfuse3")
        # For start-up time, and because it may be missing.
        import pyfuse3  # noqa: F401  (the import fails if libfuse is missing)
    except ImportError as error:
        return Finding("pyfuse3", "missing", str(error), "install libfuse3-dev, then pip install pyfuse3")
    library = libfuse.load()
    found = "unknown" if library is None else libfuse.version(library)
    return Finding("pyfuse3", "ok", f"pyfuse3 {version}, libfuse {found}")


def _filesystem(place: str) -> Iterator[Finding]:
    mount = mount_of_id(mount_id_of_path(place))
    kind = "this filesystem" if mount is None else mount.fstype
    yield _xattrs(place, "user", kind)
    yield _xattrs(place, "trusted", kind)
    yield _tried(
        "whiteouts",
        lambda: os.mknod(f"{place}/whiteout", stat.S_IFCHR, 0),
        f"char devices 0/0 can be made on {kind}",
        "removed names are stored as xattrs",
        "Linux 5.8, and a filesystem with device nodes",
    )
    yield from _renames(place, kind)
    yield _tried(
        "O_TMPFILE",
        lambda: os.close(os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)),
        f"works on {kind}",
        "temporary files have names",
        "ext4, xfs, btrfs or tmpfs",
    )
    yield _tried(
        "reflink",
        lambda: _reflink(place),
        f"copy-up on {kind} shares blocks",
        "copy-up copies all data",
        "xfs, btrfs or bcachefs, with lower and upper on the same filesystem",
    )


def _tried(name: str, trial: Callable[[], object], works: str, otherwise: str, cure: str) -> Finding:
    try:
        trial()
    except OSError as error:
        return Finding(name, "limited", f"{reason(error)}: {otherwise}", cure)
    return Finding(name, "ok", works)


def _xattrs(place: str, namespace: str, kind: str) -> Finding:
    name = f"{namespace} xattrs"
    if namespace == "trusted" and not may_use_trusted_xattrs():
        return Finding(name, "limited", "only for root: markers are kept in user.overlay.*", "run as root")
    try:
        os.setxattr(place, f"{namespace}.overlay.opaque", b"y")
        if os.getxattr(place, f"{namespace}.overlay.opaque") != b"y":
            raise OSError(errno.EIO, "the xattr is not what was written")
    except OSError as error:
        who = "without -o userxattr" if namespace == "trusted" else "as an ordinary user"
        detail = f"{reason(error)} on {kind}: no upper can be there {who}"
        return Finding(name, "limited", detail, "ext4, xfs, btrfs or tmpfs (user xattrs on tmpfs: Linux 6.6)")
    return Finding(name, "ok", f"can be written on {kind}")


def _renames(place: str, kind: str) -> Iterator[Finding]:
    for name, flag, otherwise in (
        ("RENAME_EXCHANGE", calls.RENAME_EXCHANGE, "exchanging two names is refused"),
        ("RENAME_WHITEOUT", calls.RENAME_WHITEOUT, "a whiteout is made in a second step"),
    ):
        for leaf in ("a", "b"):
            with open(f"{place}/{name}.{leaf}", "wb"):
                pass

        def trial(name: str = name, flag: int = flag) -> None:
            with Owned(os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
                calls.renameat2(fd, f"{name}.a".encode(), fd, f"{name}.b".encode(), flag)

        yield _tried(name, trial, f"works on {kind}", otherwise, "ext4, xfs, btrfs or tmpfs")


def _reflink(place: str) -> None:
    with open(f"{place}/source", "wb+") as source, open(f"{place}/target", "wb") as target:
        source.write(b"x" * 65536)
        source.flush()
        calls.clone_file(target.fileno(), source.fileno())


def _owners() -> Finding:
    name = "owners of lowers"
    if has_capability(CAP_CHOWN):
        return Finding(name, "ok", "what belongs to others can be copied up")
    detail = "what belongs to others cannot be copied up (EPERM), so a lower's /tmp takes no new files"
    options = f"squash_to_uid={os.geteuid()},squash_to_gid={os.getegid()}"
    return Finding(name, "limited", detail, f"mount as root, or with -o {options}: all belongs to you then")


def _overlayfs() -> Finding:
    name = "kernel overlayfs"
    with suppress(OSError), open("/proc/filesystems", encoding="ascii", errors="replace") as known:
        if any(line.split()[-1:] == ["overlay"] for line in known):
            return Finding(name, "ok", "present: the kernel can mount the uppers too")
    if os.path.isdir(f"/lib/modules/{os.uname().release}/kernel/fs/overlayfs"):
        return Finding(name, "ok", "present as a module that is not loaded")
    return Finding(name, "limited", "absent: the kernel cannot mount the uppers", "a kernel with overlayfs")


def _passthrough() -> Finding:
    name = "passthrough"
    if kernel_version() < (6, 9):
        detail = f"not in Linux {os.uname().release}: data goes through the daemon"
        return Finding(name, "limited", detail, "Linux 6.9")
    answer, how = offers_passthrough(), "as the kernel's FUSE_INIT says"
    if answer is None:
        answer, how = _configured("CONFIG_FUSE_PASSTHROUGH"), "as the kernel's configuration says"
    if answer is None:
        return Finding(name, "limited", "not known: no configuration to read", "run doctor as root")
    if not answer:
        detail = f"switched off, {how}: data goes through the daemon"
        return Finding(name, "limited", detail, "CONFIG_FUSE_PASSTHROUGH=y")
    if not may_use_trusted_xattrs():
        return Finding(name, "limited", f"offered, {how}, but only to root", "mount as root")
    return Finding(name, "ok", f"offered, {how}")


def _idle_states() -> Finding:
    """How long it takes to wake a CPU, on which every request waits twice."""
    name = "idle states"
    try:
        with open("/sys/devices/system/cpu/cpuidle/current_driver") as file:
            driver = file.read().strip()
    except OSError:
        driver = "none"
    if driver == "none":
        detail = "there is no cpuidle driver: waking a CPU takes as long as the host takes"
        return Finding(name, "limited", detail, "in a virtual machine: modprobe cpuidle-haltpoll")
    idling = Idling()
    try:
        if idling.possible:
            detail = f"driver {driver}; root's daemons keep CPUs awake during bursts of requests"
            return Finding(name, "ok", detail)
    finally:
        idling.close()
    if (os.cpu_count() or 1) > MOST_CPUS:
        return Finding(name, "ok", f"driver {driver}; more than {MOST_CPUS} CPUs are not kept awake")
    detail = f"driver {driver}, but {DEVICE} cannot be opened, so requests wait for CPUs to wake up"
    return Finding(name, "limited", detail, "mount as root")


def _session() -> Finding:
    """Report what --session auto and --io auto choose here, and why not the others."""
    name = "session and I/O"
    offer = init_offer()
    if offer is None:
        detail = "direct session; the kernel can't be asked what it offers"
        return Finding(name, "limited", detail, "run doctor as root")
    request = InitRequest.of(major=KERNEL_VERSION, minor=offer[0], max_readahead=1 << 17, flags=offer[1])
    rights = Privileges(
        initial_user_namespace=in_initial_user_namespace(), sys_admin=has_capability(CAP_SYS_ADMIN)
    )
    try:
        decision = negotiate(request, Settings(), rights)
    except NegotiationRefused as refusal:
        return Finding(name, "limited", f"pyfuse3's session. {refusal}", "a newer kernel")
    sentences = [f"direct session. {decision.why}", *decision.why_not.values(), *decision.missing.values()]
    return Finding(name, "ok", " ".join(sentences))


def _configured(option: str) -> bool | None:
    for path in (f"/boot/config-{os.uname().release}", f"/lib/modules/{os.uname().release}/config"):
        with suppress(OSError), open(path, encoding="utf-8", errors="replace") as lines:
            return f"{option}=y" in (line.strip() for line in lines)
    with suppress(OSError, EOFError), gzip.open("/proc/config.gz", "rt", errors="replace") as packed:
        return f"{option}=y" in (line.strip() for line in packed)
    return None


def _bubblewrap() -> Finding:
    path = shutil.which("bwrap")
    if path is None:
        detail = "not installed: `unionfs try` cannot start commands, and `unionfs run` needs crun instead"
        return Finding("bubblewrap", "limited", detail, "install the package bubblewrap")
    return Finding("bubblewrap", "ok", f"{path}, for `unionfs run`")


def _user_namespaces() -> Finding:
    # In a child process: a process cannot leave its user namespace.
    name, command = "user namespaces", ["unshare", "--user", "--map-root-user", "true"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError:
        return Finding(name, "limited", "not known: unshare(1) is missing", "install util-linux")
    if done.returncode == 0:
        return Finding(name, "ok", "can be made: rootless containers work")
    message = os.fsdecode(done.stderr).strip().rpartition(": ")[2]
    cure = "sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, or the security module"
    return Finding(name, "limited", f"{message[:1].lower()}{message[1:]}: no rootless containers", cure)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{hard} per daemon (soft limit {soft}, raised by the daemon)"
    if hard < 4096:
        return Finding("open files", "limited", detail, "raise `ulimit -Hn` to 65536 or more")
    return Finding("open files", "ok", detail)


def _dead_mounts() -> Iterator[Finding]:
    for found in dead_mounts():
        place = found.mount.mountpoint
        yield Finding("dead mount", "limited", f"{place}: its daemon has died", f"unionfs cleanup {place}")
