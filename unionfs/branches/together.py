"""The changes of a branch and of its parts, as those of one tree."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from unionfs.branches.beneath import opened
from unionfs.branches.describe import Describer, Difference
from unionfs.branches.parts import parts_of
from unionfs.branches.store import Branch
from unionfs.branches.view import View, viewed


@dataclass(slots=True)
class Viewed:
    """The changes of a branch on one filesystem: of the branch itself, or of a part."""

    branch: Branch
    view: View
    above: bytes = b""
    """The path of a part's mountpoint below the branch's base, with a leading slash; empty for the branch."""


@contextmanager
def all_viewed(branch: Branch) -> Iterator[list[Viewed]]:
    """The branch first, then its parts, sorted by mountpoint. Raises UserError."""
    values = branch.record()
    base = values.base.rstrip("/")
    with ExitStack() as resources:
        # One that was replaced has nothing to do with the branch.
        resources.enter_context(opened(values.base, values.base_inode, values.filesystem))
        whole, found = Viewed(branch, resources.enter_context(viewed(branch))), []
        for part in parts_of(branch):
            record = part.record()
            with opened(record.base, record.base_inode, record.filesystem):
                view = resources.enter_context(viewed(part))
            found.append(Viewed(part, view, os.fsencode(record.base[len(base) :])))
        yield [whole, *sorted(found, key=lambda one: one.above)]


class Describers:
    """Describes the changes of a branch and its parts."""

    def __init__(self, viewed: Sequence[Viewed]) -> None:
        self.each = [(one, Describer(one.view)) for one in viewed]

    def differences(self) -> list[Difference]:
        """Those of all, sorted by path. Raises OSError."""
        return self.together([describer.differences() for _, describer in self.each])

    def together(self, found: Sequence[list[Difference]]) -> list[Difference]:
        """Those of each, with paths below the base of the branch. The items of `found` are changed."""
        for (one, _), items in zip(self.each, found, strict=True):
            for item in items if one.above else ():
                item.is_below(one.above[1:])
        result = [item for items in found for item in items]
        return result if len(found) == 1 else sorted(result, key=lambda item: item.path.split(b"/"))

    def unified(self, item: Difference) -> list[str] | None:
        """As `Describer.unified`."""
        return self._of(item).unified(item)

    def digest(self, item: Difference, *, new: bool) -> str:
        """As `Describer.digest`."""
        return self._of(item).digest(item, new=new)

    def _of(self, item: Difference) -> Describer:
        root = item.change
        while root.parent is not None:
            root = root.parent
        return next(describer for one, describer in self.each if one.view.root is root)
