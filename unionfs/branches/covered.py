"""The parts of a base that a branch does not cover: mounts below it, and the store, if it is in the base.

The store is hidden: the layer has an opaque directory in its place, which no diff shows and no commit
applies.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from unionfs.errors import UserError, on_failure, quoted
from unionfs.sys.mountinfo import read_mountinfo
from unionfs.union.hiding import hide, parts_below


def store_in(base: str, root: str) -> tuple[str, ...] | None:
    """The names on the path from a base to the storage root; None if that is not below the base."""
    return parts_below(base, os.path.realpath(root))


def refuse_inside(base: str, root: str) -> None:
    """Refuse a base that is in the storage root. Raises UserError."""
    real = os.path.realpath(root)
    if f"{base}/".startswith(f"{real}/"):
        raise UserError(
            f"the base {quoted(base)} is in the storage root {quoted(real)}, where branches are kept; name "
            "another directory, or give a storage root elsewhere by --root or UNIONFS_ROOT."
        )


def hide_store(upper: str, base: str, root: str, *, userxattr: bool) -> None:
    """Hide a store in the base from the branch. Raises UserError."""
    parts = store_in(base, root)
    if parts is not None:
        with on_failure(
            f"the storage root {quoted(root)}, which is in the base {quoted(base)}, cannot be hidden from "
            "the branch", "give one elsewhere by --root or UNIONFS_ROOT",
        ):  # fmt: skip
            hide(upper, base, parts, userxattr=userxattr)
            for count in range(len(parts), -1, -1):
                below, above = (os.path.join(place, *parts[:count]) for place in (upper, base))
                st = os.lstat(above)
                os.utime(below, ns=(st.st_atime_ns, st.st_mtime_ns))


def mounted_below(base: str) -> list[str]:
    """The mountpoints below a base, absolute."""
    above = base.rstrip("/") + "/"
    points = {entry.mountpoint for entry in read_mountinfo()}
    return sorted(point for point in points if point.startswith(above) and point != base)


class Fixed:
    """Paths below a base whose directories a commit neither replaces nor removes."""

    def __init__(self, base: str, root: str) -> None:
        above = base.rstrip("/")
        self._found = {os.fsencode(path[len(above) :]): "is mounted there" for path in mounted_below(base)}
        parts = store_in(base, root)
        if parts is not None:
            self._found[os.fsencode("/" + "/".join(parts))] = "is the storage root"

    def refuse(self, paths: Sequence[bytes]) -> None:
        """Raise UserError if one of the paths is a fixed directory, or above one."""
        touched = set(paths)
        for fixed, what in self._found.items():
            above = fixed
            while above:
                if above in touched:
                    path, inner = (quoted(os.fsdecode(one)) for one in (above, fixed))
                    raise UserError(
                        f"{path} of the base cannot be replaced or removed, since {inner} {what}; leave it "
                        f"out by --except {path}, or put it back in the branch."
                    )
                above = above.rpartition(b"/")[0]
