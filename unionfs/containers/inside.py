"""What a command finds in its container: the tree is prepared and checked before it is started."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from unionfs.containers import bubblewrap
from unionfs.containers.account import Account, find_account
from unionfs.containers.finding import find_command
from unionfs.errors import UserError, on_failure, quoted
from unionfs.storage.targets import MountedTree, find, prepare
from unionfs.sys.fds import Owned

_KERNEL_TREES = (b"proc", b"dev", b"sys")


@dataclass(frozen=True, slots=True)
class Inside:
    """What the command finds."""

    account: Account | None
    hostname: str
    environment: Mapping[str, str]
    workdir: str
    root: tuple[int, int]
    """Device and inode number of its root directory."""


def prepare_inside(
    merged: str,
    command: str,
    *,
    user: str | None,
    workdir: str,
    hostname: str,
    given: Mapping[str, str],
    privileged: bool,
) -> Inside:
    """Prepare the tree at `merged` for a command. Raises UserError, CommandError.

    `given` are variables; `user`, `workdir`, `privileged`: the options of `unionfs run`.
    """
    with Owned(os.open(merged, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
        _check_mountpoints(root)
        account = _account(root, user, privileged=privileged)
        home = None if account is None else account.home
        environment = bubblewrap.environment(given, hostname, home)
        place = _workdir(MountedTree(root), workdir)
        if account is not None and os.geteuid() == 0:
            # bubblewrap makes what is missing, but not as another user.
            for name in ("dev", "proc", "sys"):
                prepare(MountedTree(root), f"/{name}", "--user", directory=True)
        find_command(root, command, place, environment["PATH"])
        status = os.stat(root)
    return Inside(account, hostname, environment, place, (status.st_dev, status.st_ino))


def _account(root: int, user: str | None, *, privileged: bool) -> Account | None:
    """Return whom the command runs as, or None for this user. Raises UserError."""
    if user is None:
        return None
    account = find_account(root, user)
    if (account.uid, account.gid) == (os.geteuid(), os.getegid()) or (os.geteuid() == 0 == account.uid):
        return None
    if privileged:
        raise UserError(
            f"--privileged is for root, and the command would run as {quoted(user)}; add --user root, "
            "or leave --privileged out."
        )
    return account


def _check_mountpoints(root: int) -> None:
    """Refuse a union in which the kernel's filesystems would be mounted elsewhere. Raises UserError.

    bubblewrap follows symlinks there, including those to the host's tree while it still sees that.
    """
    for name in ("dev", "proc", "sys"):
        try:
            kind = stat.S_IFMT(os.stat(name, dir_fd=root, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            continue
        if kind != stat.S_IFDIR:
            raise UserError(
                f"/{name} in the union is not a directory, so nothing can be mounted there; remove it from "
                "the layers."
            )


def refuse_kernel_trees(given: str, first: bytes) -> None:
    if first in _KERNEL_TREES:
        raise UserError(
            f"--workdir {quoted(given)} leads into /proc, /dev, or /sys, from where it could leave the "
            "container; choose another directory."
        )


def _workdir(tree: MountedTree, given: str) -> str:
    """The command's working directory, normalized as in Docker; created if missing. Raises UserError."""
    clean = "/" + os.path.normpath(given).strip("/")
    with on_failure(f"--workdir {quoted(given)} cannot be used", "choose another directory"):
        names, missing = find(tree, clean)
        if not names and not missing:
            return "/"
        refuse_kernel_trees(given, (names + missing)[0])
        if not missing and tree.kind(names) != stat.S_IFDIR:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return prepare(tree, clean, "--workdir", directory=True).path
