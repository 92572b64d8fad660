"""Named branches of a directory: try a command on one, look at its changes, commit or discard them.

The names here are for programs; see `api` and `snapshot_api`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unionfs.branches.api import Branch, BranchError, ConflictError, TrioBranch, branch, trio_branch
    from unionfs.branches.snapshot_api import SnapshotError, Snapshots, TrioSnapshots

__all__ = [
    "Branch", "BranchError", "ConflictError", "SnapshotError", "Snapshots", "TrioBranch", "TrioSnapshots",
    "branch", "trio_branch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # For start-up time: the command line does not need it.
    from unionfs.branches import api, snapshot_api

    return getattr(snapshot_api if "Snapshot" in name else api, name)
