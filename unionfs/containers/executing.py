"""`unionfs exec`: another command in a container that runs, with the container's rights and no more."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unionfs.containers import entrance as entrances
from unionfs.containers import state
from unionfs.containers.account import find_account
from unionfs.containers.entered import Entered
from unionfs.containers.entrance import Entrance
from unionfs.containers.finding import find_command
from unionfs.containers.store import Container
from unionfs.errors import UserError, on_failure, quoted
from unionfs.storage.root import storage_root
from unionfs.sys.capabilities import NUMBERS
from unionfs.sys.fds import Owned
from unionfs.sys.namespaces import CLONE_NEWUSER, other_namespaces
from unionfs.sys.process import is_alive

_START_SECONDS = 5.0
_POLL_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Wish:
    """The options of `unionfs exec`."""

    name: str
    command: Sequence[str]
    root: str | None = None
    user: str | None = None
    workdir: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    detached: bool = False


def execute(wish: Wish) -> int:
    """Run a command in a container and return its exit code; 0 at once if it is detached.

    Raises UserError, CommandError if it cannot be started.
    """
    container = Container(storage_root(wish.root), wish.name)
    container.check()
    if state.running(container).between:
        raise UserError(
            f"container {quoted(wish.name)} is restarting, and nothing runs in it; try again later."
        )
    entrance = entrances.read(container)
    if entrance is None:
        raise UserError(
            f"container {quoted(wish.name)} cannot be entered: how is not recorded; start it again by this "
            "version."
        )
    complaint = f"container {quoted(wish.name)} cannot be entered"
    with on_failure(complaint, "check by `unionfs ps` that it runs"):
        pidfd = Owned(os.pidfd_open(entrance.init))
    with pidfd as fd:
        with on_failure(complaint, "check by `unionfs ps` that it runs"):
            root = _opened_root(entrance)
            flags = other_namespaces(entrance.init)
        with root as root_fd:
            job = _job(wish, entrance, root_fd, flags)
        entered = Entered(entrance.init, job, pidfd=fd, detached=wish.detached)
    return 0 if wish.detached else entered.wait()


def _opened_root(entrance: Entrance) -> Owned:
    """Open the container's root directory; waits until the runtime has entered it. Raises OSError."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        opened = Owned(os.open(f"/proc/{entrance.init}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        # After the open and pidfd_open, so that the pid has not been reused.
        if not is_alive(entrance.init, entrance.started):
            opened.close()
            raise ProcessLookupError
        status = os.fstat(opened.fd)
        if (status.st_dev, status.st_ino) == entrance.root:
            return opened
        opened.close()
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(_POLL_SECONDS)


def _job(wish: Wish, entrance: Entrance, root: int, flags: int) -> dict[str, Any]:
    """Return what `containers.entering` does. Raises UserError, CommandError."""
    account = entrance.account
    uid, gid = (os.geteuid(), os.getegid()) if account is None else (account.uid, account.gid)
    groups = os.getgroups() if account is None else list(account.groups)
    environment = dict(entrance.environment)
    if "TERM" in os.environ:
        environment["TERM"] = os.environ["TERM"]
    if wish.user is not None:
        chosen = find_account(root, wish.user)
        if flags & CLONE_NEWUSER and (chosen.uid, chosen.gid) != (uid, gid):
            raise UserError(
                f"--user {quoted(wish.user)} is not possible: the container has no other ids than {uid}:"
                f"{gid}; omit it, or let root run the container without --user."
            )
        if not flags & CLONE_NEWUSER:
            uid, gid, groups = chosen.uid, chosen.gid, list(chosen.groups)
        environment["HOME"] = chosen.home
    environment.update(wish.environment)
    workdir = wish.workdir or entrance.workdir
    if not workdir.startswith("/"):
        raise UserError(f"--workdir {quoted(workdir)} is a relative path; give an absolute one.")
    find_command(root, wish.command[0], workdir, environment.get("PATH", ""))
    program = entrance.filter
    return {
        "root": entrance.root,
        "flags": flags,
        "uid": uid,
        "gid": gid,
        "groups": groups,
        "capabilities": [NUMBERS[name.removeprefix("CAP_")] for name in entrance.capabilities],
        "filter": None if program is None else base64.b64encode(program).decode(),
        "environment": environment,
        "workdir": workdir,
        "command": list(wish.command),
    }
