"""Names of one file among the changes of a branch: hard links, which a commit of a part keeps together."""

from __future__ import annotations

import stat
from collections.abc import Collection
from dataclasses import dataclass, field

from unionfs.branches.seen import touched
from unionfs.branches.view import View
from unionfs.union.diff import Change, Object, in_order

_Key = tuple[int, int]


@dataclass(slots=True)
class Group:
    """All changed names of one file of the layer; paths with a leading slash."""

    paths: list[bytes] = field(default_factory=list)
    entry: bytes | None = None
    """Its name in the index, if it is there, too."""


def groups(view: View) -> list[Group]:
    """Those of all files that have several names in the layer, or one there and one in the index. Raises
    OSError.
    """
    indexed, found = view.index_entries(), dict[_Key, Group]()
    has_index = bool(indexed)
    originals = dict[_Key, _Key]()
    linked = {*view.linked}
    for path, change in in_order(view.root):
        key = _key(view, change, has_index=has_index)
        if key is not None:
            found.setdefault(key, Group(entry=indexed.get(key))).paths.append(path)
            if path in linked and change.old is not None and change.old.st is not None:
                originals[change.old.st.st_dev, change.old.st.st_ino] = key
    if originals:
        # A name that shows the copy needs the other names of its original.
        for item in touched(view):
            key = _original(item.old, originals)
            if key is not None and item.path not in found[key].paths:
                found[key].paths.append(item.path)
    return [group for group in found.values() if len(group.paths) > 1 or group.entry is not None]


def whole(view: View, paths: Collection[bytes]) -> list[bytes]:
    """The paths, with all names of the files that have one of these names. Raises OSError."""
    result = {*paths}
    for group in groups(view) if paths else ():
        if not result.isdisjoint(group.paths):
            result.update(group.paths)
    return sorted(result)


def _key(view: View, change: Change, *, has_index: bool) -> _Key | None:
    """The file of a changed name, if it is one of the layer that may have others."""
    new = change.new
    if new is None or new.st is None or stat.S_ISDIR(new.st.st_mode):
        return None
    if new.parts[0].layer.is_upper:
        return (new.st.st_dev, new.st.st_ino) if new.st.st_nlink > 1 else None
    if not has_index:
        return None
    with view.entry(change.name, new) as entry:
        return (entry.st.st_dev, entry.st.st_ino) if entry.indexed else None


def _original(old: Object | None, originals: dict[_Key, _Key]) -> _Key | None:
    if old is None or old.st is None or old.is_directory:
        return None
    return originals.get((old.st.st_dev, old.st.st_ino))
