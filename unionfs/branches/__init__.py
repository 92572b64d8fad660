"""Named branches of a directory: try a command on one, look at its changes, commit or discard them.

The names here are for programs; see `api`.
"""

from unionfs.branches.api import Branch, BranchError, ConflictError, TrioBranch, branch, trio_branch

__all__ = ["Branch", "BranchError", "ConflictError", "TrioBranch", "branch", "trio_branch"]
