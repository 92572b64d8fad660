"""What `unionfs exec` has to know of a container that runs: entrance.json in its directory, while it runs.

Only the storage root's owner can read it: it has the command's environment.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Final

from unionfs.containers.account import Account
from unionfs.containers.store import Container
from unionfs.errors import on_failure, quoted
from unionfs.storage import jsonfiles

_FILE: Final = "entrance.json"


@dataclass(frozen=True, slots=True)
class Entrance:
    """The process to join, and the rights that its container gives."""

    init: int
    started: int
    """Pid 1 of the container, as this pid namespace has it, and its start time."""
    root: tuple[int, int]
    """Device and inode number of the container's root directory."""
    environment: Mapping[str, str]
    workdir: str
    account: Account | None
    """Who the command is; None: root, or the ordinary user."""
    capabilities: tuple[str, ...]
    filter: bytes | None
    """The seccomp program; None: no filter."""


def write(container: Container, entrance: Entrance) -> None:
    """Raises UserError."""
    values = asdict(replace(entrance, filter=None))
    if entrance.filter is not None:
        values["filter"] = base64.b64encode(entrance.filter).decode()
    with on_failure(f"what runs in container {quoted(container.name)} cannot be recorded", "free space"):
        jsonfiles.write(f"{container.path}/{_FILE}", values, sync=False)


def read(container: Container) -> Entrance | None:
    """Return what was recorded; None if nothing was, as by an earlier version."""
    try:
        values = jsonfiles.read(f"{container.path}/{_FILE}")
        account = values["account"]
        if account is not None:
            account = Account(**{**account, "groups": tuple(account["groups"])})
        program = values["filter"]
        device, inode = values["root"]
        return Entrance(
            int(values["init"]), int(values["started"]), (int(device), int(inode)), values["environment"],
            values["workdir"], account, tuple(values["capabilities"]),
            None if program is None else base64.b64decode(program),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove(container: Container) -> None:
    with suppress(OSError):
        os.unlink(f"{container.path}/{_FILE}")
