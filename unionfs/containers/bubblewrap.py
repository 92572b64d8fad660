"""The command line of bubblewrap, which runs a command in new namespaces; bwrap(1)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Final

from unionfs.containers.call import Call
from unionfs.containers.description import Description, Kind, Mount
from unionfs.errors import UserError
from unionfs.sys.fds import Owned

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Bubblewrap:
    """The runtime bwrap(1)."""

    title: Final = "bubblewrap"

    def __init__(self) -> None:
        """Raises UserError."""
        self.program = find()

    def call(self, container: Description, held: ExitStack, info: int, block: int | None) -> Call:
        variables = environment_arguments(container.environment)
        data = [variables, container.confinement.filter, container.resolver]
        environment, program, resolver = (
            None if part is None else held.enter_context(Owned(in_memory(part))) for part in data
        )
        assert environment is not None
        words = arguments(container, environment_fd=environment, filter_fd=program, resolver_fd=resolver)
        wait = [] if block is None else ["--block-fd", str(block)]
        fds = (info, block, environment, program, resolver)
        return Call(
            self.title,
            self.program,
            [self.program, "--info-fd", str(info), *wait, *words],
            [fd for fd in fds if fd is not None],
        )


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
    container: Description, *, environment_fd: int, filter_fd: int | None, resolver_fd: int | None = None
) -> list[str]:
    """Return its arguments: the merged tree as root, with its mounts, and the command.

    bubblewrap reads `environment_arguments` from `environment_fd`, and the resolver from `resolver_fd`. An
    ordinary user's command only sees itself as the account.
    """
    privileged = container.confinement.privileged
    words = ["--dev-bind" if privileged else "--bind", container.merged, "/"]
    words += mount_words(container.mounts(), resolver_fd)
    if container.read_only:
        # The mounts on it keep theirs.
        words += ["--remount-ro", "/"]
    words += ["--unshare-pid", "--unshare-uts", "--unshare-ipc", "--unshare-cgroup-try"]
    if container.own_network:
        words.append("--unshare-net")
    account = container.account
    if account is not None and os.geteuid() != 0:
        words += ["--unshare-user", "--uid", str(account.uid), "--gid", str(account.gid)]
    if container.by_root:
        words += ["--cap-drop", "ALL"]
        for name in container.confinement.capabilities:
            words += ["--cap-add", name]
    if filter_fd is not None:
        words += ["--seccomp", str(filter_fd)]
    words += ["--args", str(environment_fd), "--hostname", container.hostname]
    return [*words, "--chdir", container.workdir, "--", *container.command]


def mount_words(mounts: Iterable[Mount], resolver_fd: int | None = None) -> list[str]:
    """Return the arguments for mounts."""
    words: list[str] = []
    for mount in mounts:
        match mount.kind:
            case Kind.BIND:
                how = "--ro-bind" if mount.read_only else "--dev-bind" if mount.devices else "--bind"
                words += [how + ("-try" if mount.optional else ""), mount.source, mount.target]
            case Kind.TEXT:
                words += ["--ro-bind-data", str(resolver_fd), mount.target]
            case Kind.EMPTY:
                words += ["--tmpfs", mount.target, "--remount-ro", mount.target]
            case Kind.NULL:
                words += ["--dev-bind", os.devnull, mount.target]
            case Kind.PROC | Kind.DEV:
                words += [f"--{mount.kind.value}", mount.target]
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
