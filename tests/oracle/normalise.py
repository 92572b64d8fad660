"""All differences that the comparison with kernel overlayfs permits, with reasons. No others are permitted.

1. Inode values: only their relation is compared (which names are one file). A number may change when a name
   of a lower file with several is copied up with ``index=off``: the copy is then a file of its own.
2. ``st_nlink`` of a directory, if either side reports 1: a merged directory has no true count.
3. Size and blocks of directories, and their listing order.
4. atime, and ctime. An mtime is compared to the nanosecond unless it is within the time of the run: then both
   sides must have it there ("now").
5. An open lower file that lost its last name: overlayfs keeps ``st_nlink`` at 1 and returns EEXIST for every
   call that would copy it up (O_RDWR reopening, fchmod ...). A native filesystem reports 0 and succeeds, as
   the union must; afterwards the two sides are not comparable, so the handles are closed.
6. Filesystem type and statfs figures, except the maximum name length.
7. The umask is 0 if the parent directory has a default ACL: without FUSE_DONT_MASK the kernel applies the
   umask before the request, though a default ACL should have replaced it. A documented limit.
8. A directory whose last names are hidden by xattr whiteouts of a lower: overlayfs counts them when it checks
   whether the directory is empty (``ovl_check_empty_dir`` does not query the xattr) and returns ENOTEMPTY,
   though its own listing is empty. The union removes it, as a native filesystem does; the one directory of
   the layers where this can happen is not removed here.
9. Only ``--session pyfuse3``: chown(-1, -1) of a regular file with setgid, but without group execute, by a
   caller outside its group. overlayfs clears the bit, or refuses; the kernel sends no request. Our file then
   gets overlayfs's mode.
10. A setxattr that fails because of XATTR_CREATE or XATTR_REPLACE: overlayfs copies the file up before the
    check, which breaks a hard link needlessly. The union then changes nothing, so the flags are not drawn for
    the lowers' hard links.
11. Only ``--io passthrough``: an open lower file keeps the lower's data when it is copied up, and reopening
    the old descriptor is ESTALE (docs/compliance.md). So such handles are closed at the copy-up, and are not
    reopened for writing.
12. Only ``--io cached``: an open for writing does not copy up, the first write does. Until then a lower's
    hard link keeps its ``st_nlink``, which overlayfs has broken.
13. Only ``--io cached``: truncation to the current size keeps a file's mtime (POSIX requires a new one only
    if the size changes): under writeback the FUSE client keeps the times, and does not treat this as a change
    (``fuse_do_setattr``). Our file then gets the new mtime.
14. Only ``metacopy=on``: when the data of a file follows its metadata into the upper, at the open for
    writing, overlayfs sets its mtime to the time of that copy; in the union a copy-up changes no mtime. Our
    file then gets the new mtime. A name whose path in the lowers is longer than a redirect may be: overlayfs
    returns EXDEV for another name, the union copies the data first. Such names are not renamed or linked.
15. Only ``--session pyfuse3``, without an index of hard links: each name of a lower's file has an inode
    number of its own, for the library has one number for node and inode; another one once it was forgotten,
    also if the name has been copied up alone meanwhile. One that is forgotten while a tree is read may leave
    its number to another one.
16. Where an upper has become a lower, overlayfs has other numbers than the union: there only copies in the
    upper have the number of their origin (``ovl_lookup`` calls ``ovl_check_origin`` for the upper alone), in
    the union copies in lowers too. So the numbers of the two sides differ then.
17. An index of hard links is not used any more when its upper becomes a lower. Then a name that is not in
    that upper is the first lower's file again. overlayfs puts a name there when the file is changed by it;
    the union cannot know by which of those that the kernel knows, and puts all of them there. So both sides
    change such files by all names before. Afterwards the index's own entry counts in ``st_nlink``, and the
    file has a new number, as in overlayfs. So have other files with several hard links in the upper.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from typing import Any

from tests.oracle.operations import Attributes
from tests.support.snapshot import Entry, Tree

NOW = -(10**18)
"""Represents every mtime within the run."""

KEPT = frozenset({b"marked"})
"""The directories of rule 8."""

METACOPY = "metacopy=on"
"""The option of rule 14."""
LONG_NAME = 200
"""Bytes; see rule 14."""
KEEPING = "direct-passthrough"
"""The session of rule 11."""
LATE = "direct-cached"
"""The session of rule 12."""
SEPARATE = "pyfuse3"
"""The session of rule 15."""
HASHED = 1 << 62
"""Set in the numbers of its own that a name has by rule 15 (``unionfs/union/numbers.py``)."""

Result = tuple[str, Any]


@dataclass(frozen=True)
class Clock:
    """The span of the run, nanoseconds of the real-time clock."""

    started: int

    @classmethod
    def start(cls) -> Clock:
        """A run that starts now."""
        return cls(time.time_ns() - 5 * 10**9)

    def mtime(self, value: int) -> int:
        """``value``, or NOW if it is within the run."""
        return NOW if self.started <= value <= time.time_ns() + 5 * 10**9 else value


def _nlinks(kind: int, ours: int, theirs: int) -> bool:
    return ours == theirs or (stat.S_ISDIR(kind) and 1 in (ours, theirs))


def keeps_idle_setgid(ours: int, theirs: int) -> bool:
    """Whether the two modes of a regular file differ as rule 9 permits."""
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
    is_late: Callable[[bytes], bool] = lambda path: False,
    *,
    separate: bool = False,
) -> list[str]:
    """The differences, one per line. ``is_late`` returns whether rule 12 applies to a path; ``separate``:
    rule 15 applies."""
    lines = [f"{path!r} is missing" for path in theirs.keys() - ours.keys()]
    lines += [f"{path!r} should not be there" for path in ours.keys() - theirs.keys()]
    shared = sorted(ours.keys() & theirs.keys())
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
    mine_groups, their_groups = _relations(ours, late), _relations(theirs, late)
    extra = mine_groups - their_groups
    if separate:
        extra = {group for group in extra if not any(group < other for other in their_groups)}
    lines += [f"one file: {sorted(group)!r}" for group in extra]
    if not separate:
        lines += [f"not one file: {sorted(group)!r}" for group in their_groups - mine_groups]
    return lines


def strict(ours: Tree, *, separate: bool = False) -> list[str]:
    """Rules for the union alone: d_ino = st_ino, and one st_dev for all. ``separate``: rule 15 applies."""
    lines = [
        f"{path!r}: d_ino is {entry.d_ino}, st_ino {entry.ino}"
        for path, entry in ours.items()
        if path != b"." and entry.d_ino != entry.ino
        and not (separate and HASHED & (entry.d_ino | entry.ino) and not stat.S_ISDIR(entry.mode))
    ]
    devices = {entry.dev for entry in ours.values()}
    if len(devices) > 1:
        lines.append(f"st_dev differs within the tree: {sorted(devices)}")
    return lines


def truncated_to_same(before: Tree, ours: Tree, theirs: Tree, clock: Clock) -> list[bytes]:
    """The files of rule 13: their size is unchanged, and only overlayfs has a new mtime."""
    return [
        path
        for path in sorted(before.keys() & ours.keys() & theirs.keys())
        if stat.S_ISREG(theirs[path].mode)
        and before[path].size == ours[path].size == theirs[path].size
        and clock.mtime(theirs[path].mtime) == NOW != clock.mtime(ours[path].mtime)
        and clock.mtime(ours[path].mtime) == clock.mtime(before[path].mtime)
    ]


def moved_inodes(
    before: Tree, after: Tree, touched: tuple[bytes, ...], *, separate: bool = False
) -> list[str]:
    """Names that kept their object but changed st_ino; ``touched`` are those that a step may replace.
    ``separate``: rule 15 applies."""
    lines = []
    for path in before.keys() & after.keys():
        if any(path == name or path.startswith(name + b"/") for name in touched):
            continue
        old, new = before[path], after[path]
        broken = not stat.S_ISDIR(old.mode) and (separate or old.nlink > 1 == new.nlink)
        if old.ino != new.ino and old.kind == new.kind and not broken:
            lines.append(f"{path!r}: st_ino changed from {old.ino} to {new.ino}")
    return lines


def numbers_lost(
    ours: tuple[Tree, Tree], theirs: tuple[Tree, Tree], linked: Set[bytes], own: Set[int]
) -> list[str]:
    """Names that have another st_ino after the layers were mounted again; pairs of trees before and after.

    ``linked``: the names of rule 17; they may have another number if overlayfs has a new one. ``own``: the
    numbers to which rule 15 applies.
    """
    lines = []
    for path in sorted(ours[0].keys() & ours[1].keys()):
        old, new = ours[0][path].ino, ours[1][path].ino
        if old == new or (own and (HASHED & (old | new) or old in own or new in own)):
            continue
        kernel = [tree[path].ino for tree in theirs]
        if path not in linked or kernel[0] == kernel[1]:
            lines.append(f"{path!r}: st_ino changed from {old} to {new}; overlayfs has {kernel}")
    return lines


def renamed_inodes(before: Tree, after: Tree, old: bytes, new: bytes, flags: int) -> list[str]:
    """A renamed name, and names in a renamed directory, that have another st_ino than before.

    One of several names of a lower file becomes a file of its own when it is renamed.
    """
    if flags & 2 or old not in before or old in after or new not in after or new in before:
        return []  # exchanged, not renamed, or not by these names
    if before[old].kind != stat.S_IFDIR and before[old].nlink > 1:
        return []
    lines = []
    for path, entry in before.items():
        if path == old or path.startswith(old + b"/"):
            moved = after.get(new + path[len(old) :])
            if moved is not None and moved.ino != entry.ino:
                lines.append(f"{path!r}: st_ino changed from {entry.ino} to {moved.ino} when it was renamed")
    return lines


def compare_results(ours: Result, theirs: Result, *, dead_lower: bool, late: bool = False) -> str | None:
    """The error in our result, or None. ``dead_lower``: rule 5 applies to the handle, ``late``: rule 12 to
    the session."""
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
