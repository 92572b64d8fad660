"""Named branches of a directory: try a command on one, look at its changes, commit or discard them.

The names here are for programs; see `api`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unionfs.branches.api import Branch, BranchError, ConflictError, TrioBranch, branch, trio_branch

__all__ = ["Branch", "BranchError", "ConflictError", "TrioBranch", "branch", "trio_branch"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # For start-up time: the command line does not need it.
    from unionfs.branches import api

    return getattr(api, name)
