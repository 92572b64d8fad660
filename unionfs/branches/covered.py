"""What is in a base but not in its filesystem's branch: mounts below it, and what is hidden.

The store is hidden if it is in the base; an ordinary user's branch of the whole system also hides the
directories that apt downloads into, which belong to the user _apt and which nobody else may search. The layer
has an opaque directory in their place, which no diff shows and no commit applies.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from unionfs.branches.record import WHOLE, Record
from unionfs.errors import UserError, on_failure, quoted
from unionfs.sys.mountinfo import MountEntry, mounted_at, read_mountinfo
from unionfs.union.hiding import hide, parts_below

_KINDS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "zfs", "jfs", "tmpfs")
"""Filesystems that keep all attributes and belong to this host alone; an overlay is usually a container's."""
_DOWNLOADS = ("/var/cache/apt/archives/partial", "/var/lib/apt/lists/partial")
_FLAGS = ("noexec", "nosuid", "nodev")


def store_in(base: str, root: str) -> tuple[str, ...] | None:
    """The names on the path from a base to the storage root; None if that is not below the base."""
    return parts_below(base, os.path.realpath(root))


def hidden_in(record: Record, root: str) -> list[tuple[str, ...]]:
    """The names on the paths from the base of a branch or part to each directory that it hides."""
    found = [store_in(record.base, root)]
    if record.uid != 0 and (record.whole or record.base) == WHOLE:
        found += [parts_below(record.base, path) for path in _DOWNLOADS]
    return [parts for parts in found if parts]


def refuse_inside(base: str, root: str) -> None:
    """Refuse a base that is in the storage root. Raises UserError."""
    real = os.path.realpath(root)
    if f"{base}/".startswith(f"{real}/"):
        raise UserError(
            f"the base {quoted(base)} is in the storage root {quoted(real)}, where branches are kept; name "
            "another directory, or give a storage root elsewhere by --root or UNIONFS_ROOT."
        )


def hide_in(upper: str, record: Record, root: str) -> None:
    """Hide the directories that a new branch or part must not show. Raises UserError."""
    store = store_in(record.base, root)
    for parts in hidden_in(record, root):
        path = os.path.join(record.base, *parts)
        # A parent hides these already, or has something else there.
        if parts != store and (record.parent is not None or not _is_directory_on(path, record.base)):
            continue
        with on_failure(
            f"{quoted(path)}, which is in the base {quoted(record.base)}, cannot be hidden from the branch",
            "give another storage root by --root or UNIONFS_ROOT",
        ):
            _hide(upper, record.base, parts, userxattr=record.userxattr)


def _is_directory_on(path: str, base: str) -> bool:
    """Whether there is a directory, on the base's own filesystem, without a symlink on the way."""
    try:
        st = os.lstat(path)
    except OSError:
        return False
    is_own = st.st_dev == os.lstat(base).st_dev and os.path.realpath(path) == path
    return is_own and stat.S_ISDIR(st.st_mode)


def _hide(upper: str, base: str, parts: Sequence[str], *, userxattr: bool) -> None:
    hide(upper, base, parts, userxattr=userxattr)
    for count in range(len(parts), -1, -1):
        below, above = (os.path.join(place, *parts[:count]) for place in (upper, base))
        st = os.lstat(above)
        os.utime(below, ns=(st.st_atime_ns, st.st_mtime_ns))


@dataclass(frozen=True, slots=True)
class Below:
    """A filesystem that is mounted below a base."""

    path: str
    """Its mountpoint."""
    obstacle: str | None
    """Why a branch cannot cover it, as the end of a sentence; None if it can."""
    flags: tuple[str, ...] = ()
    """Those of its mount flags that restrict programs."""


def filesystems_below(base: str, without: Sequence[str]) -> list[Below]:
    """The visible mounts below a base, sorted by path, but not those at or below the paths `without`."""
    table = read_mountinfo()
    found = []
    for path in mounted_below(base):
        entry = None if is_in(path, without) else mounted_at(path, table)
        if entry is not None and not _is_gone(path):
            found.append(entry)
    # Of several mounts of one filesystem, the branch covers the one that shows the most.
    found.sort(key=lambda entry: (entry.root.count("/") if entry.root != "/" else 0, entry.mountpoint))
    shown, result = {os.stat(base).st_dev: base}, []
    for entry in found:
        flags = tuple(flag for flag in entry.options.split(",") if flag in _FLAGS)
        result.append(Below(entry.mountpoint, _obstacle(entry, shown), flags))
    return sorted(result, key=lambda one: one.path)


def _is_gone(mountpoint: str) -> bool:
    try:
        os.lstat(mountpoint)
    except FileNotFoundError:
        return True
    except OSError:
        pass  # it is in a directory that this user may not search
    return False


def _obstacle(entry: MountEntry, shown: dict[int, str]) -> str | None:
    path = entry.mountpoint
    if entry.fstype not in _KINDS:
        return f"a branch cannot cover {quoted(entry.fstype)}"
    if not os.access(path, os.R_OK):
        return "you may not read it"
    st = os.stat(path)
    if not stat.S_ISDIR(st.st_mode):
        return "a file is mounted there"
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return "it is mounted read-only"
    if st.st_dev in shown:
        return f"it is the filesystem that {quoted(shown[st.st_dev])} shows"
    shown[st.st_dev] = path
    return None


def is_in(path: str, places: Sequence[str]) -> bool:
    """Whether a path is one of the places, or below one."""
    return any(path == place or path.startswith(place.rstrip("/") + "/") for place in places)


def mounted_below(base: str) -> list[str]:
    """The mountpoints below a base, absolute."""
    above = base.rstrip("/") + "/"
    points = {entry.mountpoint for entry in read_mountinfo()}
    return sorted(point for point in points if point.startswith(above) and point != base)


class Fixed:
    """Paths below a base whose directories a commit neither replaces nor removes."""

    def __init__(self, base: str, root: str, before: str = "") -> None:
        """`before`: what belongs before the paths to make them those of the branch."""
        self._before = before
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
                    path, inner = (quoted(self._before + os.fsdecode(one)) for one in (above, fixed))
                    raise UserError(
                        f"{path} of the base cannot be replaced or removed, since {inner} {what}; leave it "
                        f"out by --except {path}, or put it back in the branch."
                    )
                above = above.rpartition(b"/")[0]
