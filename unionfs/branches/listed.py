"""What `branch ls` shows of all branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from unionfs.branches.mounts import mount_of
from unionfs.branches.store import Store
from unionfs.errors import UserError


def listed(root: str | None, tell: Callable[[str], object]) -> list[dict[str, Any]]:
    """Return the facts of all branches as plain values, times in seconds since the epoch.

    `root`: as `--root`. `tell` gets the reason for a record that cannot be read. Raises UserError.
    """
    found: list[dict[str, Any]] = []
    for branch in Store(root).branches():
        try:
            record = branch.record()
        except UserError as error:
            tell(str(error))
            continue
        entry = mount_of(branch)
        found.append({
            "name": branch.name, "base": record.base, "parent": record.parent, "uid": record.uid,
            "created": record.created / 1e9, "upper": branch.upper,
            "mountpoint": None if entry is None else entry.settings.mountpoint,
            "command": list(record.command) or None, "exit_code": record.exit_code,
            "ended": None if record.ended is None else record.ended / 1e9,
        })  # fmt: skip
    parents = {values["parent"] for values in found}
    return [{**values, "frozen": values["name"] in parents} for values in found]
