"""Changes of the merged tree: all kinds of them."""

from __future__ import annotations

from unionfs.union.making import ACL_DEFAULT, Caller, Making
from unionfs.union.removing import Removing
from unionfs.union.renaming import Renaming

__all__ = ["ACL_DEFAULT", "Caller", "Changes"]


class Changes(Making, Removing, Renaming):
    """The changing operations on one union."""
