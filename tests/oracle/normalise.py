"""Everything that the comparison with kernel overlayfs lets differ, and why. Nothing else may.

1. Inode values: only their relation is compared (which names are one file). A lower file with several hard
   links that is not copied up is left out: overlayfs without ``index`` shows its names as one file until
   copy-up breaks them, the union shows a file a name from the start, which keeps ``st_ino`` the same.
2. ``st_nlink`` of a directory, where either side says 1: a merged directory has no true count.
3. Size and blocks of directories, and the order in which they are listed.
4. atime, and ctime. An mtime is compared to the nanosecond unless it lies in the time of the run: then both
   sides must have it there ("now").
5. An open lower file that lost its last name: overlayfs keeps ``st_nlink`` at 1 and answers EEXIST to
   whatever would copy it up (O_RDWR reopening, fchmod ...). A native filesystem says 0 and succeeds, and that
   is what the union must do; from there the two sides have nothing to compare, so the handles are closed.
6. Filesystem type and statfs figures but for the longest name.
7. The umask is 0 wherever the parent directory has a default ACL: without FUSE_DONT_MASK the kernel applies
   the umask before the filesystem is asked, and a default ACL should have replaced it. A documented limit.
8. A directory whose last names are hidden by xattr whiteouts of a lower: overlayfs counts them when it looks
   whether the directory is empty (``ovl_check_empty_dir`` does not ask for the xattr) and answers ENOTEMPTY,
   where its own listing shows nothing. The union removes it, as a native filesystem does; the one directory
   of the layers where this can happen is not removed here.
9. setgid on a regular file without group execute, which no exec looks at: overlayfs clears it at a write,
   truncation or chown by somebody outside the file's group, the kernel's FUSE client keeps it
   (``fuse_setattr`` drops it only together with S_IXGRP, and sends nothing for chown(-1, -1)). Our file is
   given their mode then.
10. A setxattr that XATTR_CREATE or XATTR_REPLACE lets fail: overlayfs copies the file up before it looks,
   which breaks a hard link for nothing. The union changes nothing then, so the flags are not drawn for the
   lowers' hard links.
11. ``--io passthrough`` alone: whoever has a lower file open keeps the lower's data when it is copied up, and
    opening the old descriptor again is ESTALE (docs/compliance.md). So such handles are closed when it
    happens, and are not reopened for writing.
12. ``--io cached`` alone: an open for writing copies nothing up, the first write does. Until then a lower's
    hard link keeps its ``st_nlink``, which overlayfs has broken.
13. ``--io cached`` alone: truncation to the size that a file has leaves its mtime (POSIX asks for a new one
    only if the size is changed): under writeback the FUSE client keeps the times, and counts this as no
    change (``fuse_do_setattr``). Our file is given the new mtime then.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tests.oracle.operations import Attributes
from tests.support.snapshot import Entry, Tree

NOW = -(10**18)
"""Stands for every mtime within the run."""

KEPT = frozenset({b"marked"})
"""Directories that rule 8 is about."""

KEEPING = "direct-passthrough"
"""The session that rule 11 is about."""
LATE = "direct-cached"
"""The session that rule 12 is about."""

Result = tuple[str, Any]


@dataclass(frozen=True)
class Clock:
    """The span of the run, nanoseconds of the real-time clock."""

    started: int

    @classmethod
    def start(cls) -> Clock:
        """A run that begins now."""
        return cls(time.time_ns() - 5 * 10**9)

    def mtime(self, value: int) -> int:
        """``value``, or NOW when it lies in the run."""
        return NOW if self.started <= value <= time.time_ns() + 5 * 10**9 else value


def _nlinks(kind: int, ours: int, theirs: int) -> bool:
    return ours == theirs or (stat.S_ISDIR(kind) and 1 in (ours, theirs))


def keeps_idle_setgid(ours: int, theirs: int) -> bool:
    """Whether the two modes of a regular file differ as rule 9 lets them."""
    idle = ours & (stat.S_ISGID | stat.S_IXGRP) == stat.S_ISGID
    return stat.S_ISREG(ours) and idle and ours & ~stat.S_ISGID == theirs


def _relations(tree: Tree, without: set[bytes]) -> set[frozenset[bytes]]:
    groups: dict[tuple[int, int], set[bytes]] = {}
    for path, entry in tree.items():
        if path not in without:
            groups.setdefault((entry.dev, entry.ino), set()).add(path)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def _show(entry: Entry, clock: Clock) -> dict[str, object]:
    return {
        "mode": oct(entry.mode),
        "uid": entry.uid,
        "gid": entry.gid,
        "size": 0 if stat.S_ISDIR(entry.mode) else entry.size,
        "rdev": entry.rdev,
        "mtime": clock.mtime(entry.mtime),
        "content": entry.content,
        "xattrs": entry.xattrs,
        "d_type": entry.d_type,
        "names": entry.names,
    }


def compare_trees(
    ours: Tree,
    theirs: Tree,
    clock: Clock,
    is_copied_up: Callable[[bytes], bool] = lambda path: True,
    is_late: Callable[[bytes], bool] = lambda path: False,
) -> list[str]:
    """The differences, a line each. ``is_copied_up`` says of a path whether overlayfs has it in its upper,
    ``is_late`` whether rule 12 holds for it."""
    lines = [f"{path!r} is missing" for path in theirs.keys() - ours.keys()]
    lines += [f"{path!r} should not be there" for path in ours.keys() - theirs.keys()]
    shared = sorted(ours.keys() & theirs.keys())
    broken = {
        path
        for path, entry in theirs.items()
        if not stat.S_ISDIR(entry.mode) and entry.nlink > 1 and not is_copied_up(path)
    }
    late = {
        path
        for path in shared
        if stat.S_ISREG(ours[path].mode) and ours[path].nlink > theirs[path].nlink and is_late(path)
    }
    for path in shared:
        mine, other = _show(ours[path], clock), _show(theirs[path], clock)
        for key, value in other.items():
            if key == "mode" and keeps_idle_setgid(ours[path].mode, theirs[path].mode):
                continue
            if mine[key] != value:
                lines.append(f"{path!r}: {key} is {mine[key]!r}, overlayfs has {value!r}")
        if path not in late and not _nlinks(theirs[path].mode, ours[path].nlink, theirs[path].nlink):
            lines.append(f"{path!r}: nlink is {ours[path].nlink}, overlayfs has {theirs[path].nlink}")
    mine_groups, their_groups = _relations(ours, broken | late), _relations(theirs, broken | late)
    lines += [f"one file: {sorted(group)!r}" for group in mine_groups - their_groups]
    lines += [f"not one file: {sorted(group)!r}" for group in their_groups - mine_groups]
    return lines


def strict(ours: Tree) -> list[str]:
    """What holds for the union by itself: d_ino = st_ino, and one st_dev for all."""
    lines = [
        f"{path!r}: d_ino is {entry.d_ino}, st_ino {entry.ino}"
        for path, entry in ours.items()
        if path != b"." and entry.d_ino != entry.ino
    ]
    devices = {entry.dev for entry in ours.values()}
    if len(devices) > 1:
        lines.append(f"st_dev differs within the tree: {sorted(devices)}")
    return lines


def truncated_to_same(before: Tree, ours: Tree, theirs: Tree, clock: Clock) -> list[bytes]:
    """The files that rule 13 is about: of the same size as before, and only overlayfs has a new mtime."""
    return [
        path
        for path in sorted(before.keys() & ours.keys() & theirs.keys())
        if stat.S_ISREG(theirs[path].mode)
        and before[path].size == ours[path].size == theirs[path].size
        and clock.mtime(theirs[path].mtime) == NOW != clock.mtime(ours[path].mtime)
        and clock.mtime(ours[path].mtime) == clock.mtime(before[path].mtime)
    ]


def moved_inodes(before: Tree, after: Tree, touched: tuple[bytes, ...]) -> list[str]:
    """Names that kept their object and yet changed st_ino; ``touched`` are those that a step may replace."""
    lines = []
    for path in before.keys() & after.keys():
        if any(path == name or path.startswith(name + b"/") for name in touched):
            continue
        old, new = before[path], after[path]
        if old.ino != new.ino and old.kind == new.kind:
            lines.append(f"{path!r}: st_ino changed from {old.ino} to {new.ino}")
    return lines


def compare_results(ours: Result, theirs: Result, *, dead_lower: bool, late: bool = False) -> str | None:
    """What is wrong with our result; None when nothing. ``dead_lower``: rule 5 holds for the handle,
    ``late``: rule 12 for the session."""
    if ours == theirs:
        return None
    text = f"result is {ours!r}, overlayfs has {theirs!r}"
    if ours[0] == theirs[0] == "ok" and isinstance(theirs[1], Attributes) and isinstance(ours[1], Attributes):
        mine, other = ours[1], theirs[1]
        if keeps_idle_setgid(mine.mode, other.mode):
            mine = replace(mine, mode=other.mode)
            if mine == other:
                return None
        if late and stat.S_ISREG(mine.mode) and mine.nlink > other.nlink:
            mine = replace(mine, nlink=other.nlink)
            if mine == other:
                return None
        if mine.deleted and other.deleted and stat.S_ISDIR(other.mode):
            return None if replace(mine, nlink=0) == replace(other, nlink=0) else text
        if dead_lower and mine.nlink in (0, other.nlink - 1):
            return None if replace(mine, nlink=0) == replace(other, nlink=0) else text
        if not dead_lower and _nlinks(other.mode, mine.nlink, other.nlink):
            return None if replace(mine, nlink=0) == replace(other, nlink=0) else text
    return text
