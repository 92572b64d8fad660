"""Mounts a branch for a command of this process: by the launcher, if there is one, which is faster."""

from __future__ import annotations

import os
from collections.abc import Sequence

from unionfs.branches.ids import entered
from unionfs.branches.parts import Part
from unionfs.branches.store import Branch
from unionfs.daemon import launcher


def attach(branches: Sequence[Branch]) -> None:
    """Mount a branch that this process has claimed, and its parts, below the store, until it ends.

    Signals are blocked afterwards. Raises UserError; some may be mounted then.
    """
    # A resident of the namespace that this process has entered would mount nothing else.
    path = launcher.find() if entered() is None else None
    if path is not None:
        fixed = ["branch", "mount", "--lives-with", str(os.getpid()), "--root", branches[0].store.root]
        launcher.hand_over(path, [[*fixed, *_part(one), "--", one.name] for one in branches])
        return
    # For start-up time: the launcher's resident has it imported.
    from unionfs.branches.mounts import mount_branch

    for one in branches:
        mount_branch(one, lives_with=os.getpid())


def _part(branch: Branch) -> list[str]:
    return ["--part", branch.key] if isinstance(branch, Part) else []
