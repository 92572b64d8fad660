"""The OCI runtime crun(1): config.json, and its command line.

Source: opencontainers/runtime-spec, config.md and config-linux.md.

The runtime is called in a small root (`small_root`), without control groups. Pid 1 of the container is
`unionfs-init` (launcher/unionfs-init.c), executed from memory. It applies the filter of system calls, waits,
and starts the command: signals, exit codes and left-over processes are as with bubblewrap, and the filter is
the very same program. There is no controller of devices: as with bubblewrap, device files are unusable by
mount attributes (nodev), and the devices in /dev are read-only bind mounts of the host's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final

from unionfs.containers.bubblewrap import PATH, in_memory
from unionfs.containers.call import Bundle, Call
from unionfs.containers.description import Description, Kind, Mount
from unionfs.containers.inherited import sealed_copy
from unionfs.containers.small_root import NO_DEVICES
from unionfs.errors import UserError, quoted
from unionfs.sys import detached
from unionfs.sys.fds import Owned
from unionfs.sys.namespaces import enter

INIT: Final = os.path.join(os.path.dirname(__file__), "unionfs-init")
"""The container's init."""
_BUNDLE: Final = "/run/unionfs"
_ROOT: Final = "/run/unionfs-root"
_RESOLVER: Final = "resolv.conf"
_FIRST: Final = 3
_SPECIFICATION: Final = "1.0.2"
_SETS: Final = ("bounding", "effective", "inheritable", "permitted", "ambient")
_PLAIN: Final = ("nosuid", "nodev")
_DEVICE: Final = ("bind", "ro", "nosuid", "noexec")
DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty")
"""The devices of bubblewrap's --dev."""


def finish(init: int) -> int:
    """Make device files in the container's root unusable, and return 0. For a child process.

    `init` waits. The configuration has no attributes for the root, and crun clears those that it has.
    """
    with Owned(os.open(f"/proc/{init}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)) as namespace:
        enter(namespace)
    with Owned(os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
        detached.change(root, add=NO_DEVICES)
    return 0


class Oci:
    """An OCI runtime."""

    def __init__(self, title: str, options: Sequence[str]) -> None:
        """`options` are before its command `run`. Raises UserError."""
        self.title = title
        self._options = options
        program = shutil.which(title) or shutil.which(title, path=PATH)
        if program is None:
            raise UserError(f"{title} is missing; install the package {title}, or omit --runtime.")
        if not os.access(INIT, os.X_OK):
            raise UserError(
                f"{title} needs {quoted(INIT)}, which this installation lacks; install a static C library "
                "(libc6-dev, glibc-static) and unionfs again, or the package bubblewrap."
            )
        self._program = program

    def call(self, container: Description, held: ExitStack, info: int, block: int | None) -> Call:
        init = held.enter_context(Owned(sealed_copy(INIT)))
        fds, numbers = [init, info], {"init": _FIRST, "info": _FIRST + 1}
        if block is not None:
            numbers["block"] = _FIRST + len(fds)
            fds.append(block)
        if (program := container.confinement.filter) is not None:
            numbers["filter"] = _FIRST + len(fds)
            fds.append(held.enter_context(Owned(in_memory(program))))
        words = [
            self.title, *self._options, "--root", f"{_BUNDLE}/state", "run", "--bundle", _BUNDLE,
            "--preserve-fds", str(len(fds)), "container",
        ]  # fmt: skip
        return Call(
            self.title,
            self._program,
            words,
            fds,
            Bundle(
                _BUNDLE,
                _ROOT,
                lambda terminal: _files(container, numbers, terminal),
                _owner(container),
                container.confinement.privileged,
            ),
        )


def _owner(container: Description) -> tuple[int, int]:
    """The uid and gid of the command, and of the runtime."""
    account = container.account
    return (os.geteuid(), os.getegid()) if account is None else (account.uid, account.gid)


def _files(container: Description, numbers: Mapping[str, int], terminal: str | None) -> dict[str, bytes]:
    config = configuration(container, numbers, terminal)
    files = {"config.json": os.fsencode(json.dumps(config, ensure_ascii=False))}
    if container.resolver is not None:
        files[_RESOLVER] = container.resolver
    return files


def configuration(
    container: Description, numbers: Mapping[str, int], terminal: str | None = None
) -> dict[str, Any]:
    """Return the content of config.json.

    `numbers` are fds in the container: `init`, `info`, and where they exist `block` and `filter`. `terminal`
    is the path of the container's.
    """
    uid, gid = _owner(container)
    fds = [str(numbers.get(name, -1)) for name in ("info", "block", "filter")]
    rights = list(container.confinement.capabilities) if container.by_root else []
    mounts, masked, read_only = _mounts(container, terminal)
    kinds = ["pid", "mount", "ipc", "uts", *(["network"] if container.own_network else [])]
    if os.path.exists("/proc/self/ns/cgroup"):
        kinds.append("cgroup")
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind} for kind in kinds],
        "maskedPaths": masked,
        "readonlyPaths": read_only,
        # Later mounts of the host appear below storage that receives them.
        "rootfsPropagation": "rslave",
    }
    if not container.by_root:
        linux["namespaces"].append({"type": "user"})
        for name, number in (("uidMappings", uid), ("gidMappings", gid)):
            linux[name] = [{"containerID": number, "hostID": number, "size": 1}]
    return {
        "ociVersion": _SPECIFICATION,
        "process": {
            "terminal": False,
            "user": {"uid": uid, "gid": gid, "umask": 0o022},
            "args": [f"/proc/self/fd/{numbers['init']}", *fds, *container.command],
            "env": [f"{name}={value}" for name, value in container.environment.items()],
            "cwd": container.workdir,
            "capabilities": dict.fromkeys(_SETS, rights),
            "noNewPrivileges": True,
        },
        "root": {"path": _ROOT, "readonly": container.read_only},
        "hostname": container.hostname,
        "mounts": mounts,
        "linux": linux,
    }


def _mounts(
    container: Description, terminal: str | None
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Return the mounts, and of those below /proc what is masked or made read-only."""
    found: list[dict[str, Any]] = []
    masked: list[str] = []
    read_only: list[str] = []
    for mount in container.mounts():
        if mount.optional and not os.path.exists(mount.source):
            continue
        below_proc = mount.target.startswith("/proc/")
        if below_proc and mount.kind in (Kind.EMPTY, Kind.NULL):
            masked.append(mount.target)
        elif below_proc and mount.source == mount.target:
            read_only.append(mount.target)
        elif mount.kind is Kind.DEV:
            found += _devices(terminal)
        else:
            found.append(_mount(mount))
    # A mask stays one: what is made read-only is mounted again.
    return found, masked, [path for path in read_only if path not in masked]


def _mount(mount: Mount) -> dict[str, Any]:
    match mount.kind:
        case Kind.PROC:
            return _entry(mount.target, "proc", "proc", "nosuid", "nodev", "noexec")
        case Kind.EMPTY:
            return _entry(mount.target, "tmpfs", "tmpfs", "ro", "nosuid", "nodev", "noexec", "size=0k")
        case Kind.NULL:
            return _entry(mount.target, "bind", os.devnull, *_DEVICE)
        case Kind.TEXT:
            return _entry(mount.target, "bind", f"{_BUNDLE}/{_RESOLVER}", "bind", "ro", *_PLAIN)
    options = [*(["ro"] if mount.read_only else []), *([] if mount.devices else _PLAIN)]
    return _entry(mount.target, "bind", mount.source, "rbind", *options)


def _devices(terminal: str | None) -> list[dict[str, Any]]:
    mounts = [
        _entry("/dev", "tmpfs", "tmpfs", *_PLAIN, "mode=0755"),
        _entry(
            "/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"
        ),
        _entry("/dev/shm", "tmpfs", "shm", *_PLAIN, "mode=1777"),
    ]
    for name in DEVICES:
        if os.path.exists(f"/dev/{name}"):
            mounts.append(_entry(f"/dev/{name}", "bind", f"/dev/{name}", *_DEVICE))
    if terminal is not None:
        mounts.append(_entry("/dev/console", "bind", terminal, "bind", "nosuid", "noexec"))
    return mounts


def _entry(target: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}
