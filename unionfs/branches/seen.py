"""What lies below a branch where the branch changes it, remembered to find conflicts.

A branch is made without a look at its base, so nothing is remembered of what it does not touch. Of every
path that it changes or removes, the state below is remembered when the path is first seen here: before each
mount and each commit. A state that is younger than the last mount may have come after the branch's own
copy, and counts as a change of the base.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from unionfs.branches.store import Branch
from unionfs.branches.view import View
from unionfs.core.places import Layer
from unionfs.errors import on_failure, quoted
from unionfs.settings.features import DEFAULTS
from unionfs.storage import jsonfiles
from unionfs.sys import calls
from unionfs.sys.fds import exists
from unionfs.union.diff import Change, Object
from unionfs.union.markers import ABSENT
from unionfs.union.origin import Origins

_FILE = "seen.json"

_BROKEN = (None, errno.EINVAL, errno.EACCES, errno.EPERM)
"""Errors of what cannot be read at any time, above all broken redirects; others may pass."""
_CTIME = 6
"""The place of the ctime in a state."""
State = list[int] | bool | None
"""Of an object: numbers that change with it. None: nothing was there. False: the base has changed it."""


@dataclass(frozen=True, slots=True)
class Touched:
    """A path that the branch changes, and the state below it."""

    path: bytes
    old: Object | None
    change: Change
    """The change that affects it: of the path itself, or the removal of a directory above it."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A path that both the branch and what lies below it have changed."""

    path: bytes
    what: str
    """What happened to it below: `changed`, `added` or `removed`."""
    change: Change


def touched(view: View) -> Iterator[Touched]:
    """Every path below the branch that it changes or removes, and those it adds. Raises OSError."""
    waiting = [(b"", child) for child in reversed(view.root.children)]
    while waiting:
        above, change = waiting.pop()
        path = above + b"/" + change.name
        yield Touched(path, change.old, change)
        if change.old is None or not change.old.is_directory:
            continue
        if change.new is not None and change.new.is_directory and not view.is_replaced(change):
            waiting += [(path, child) for child in reversed(change.children)]
        else:
            yield from _below(view, path, change, change.old)


def _below(view: View, path: bytes, change: Change, directory: Object) -> Iterator[Touched]:
    waiting = [(path, directory)]
    while waiting:
        above, parent = waiting.pop()
        for name in view.names(parent):
            found = view.child(parent, name)
            if found is not None:
                yield Touched(above + b"/" + name, found, change)
                if found.is_directory:
                    waiting.append((above + b"/" + name, found))


def look(branch: Branch, view: View) -> tuple[Mapping[str, State], list[Conflict]]:
    """Record the states of paths that have none yet, and compare those of all changed paths with the record.

    Returns the record, and the conflicts sorted by path. Raises UserError.
    """
    complaint = f"what branch {quoted(branch.name)} changes in its base cannot be compared"
    with on_failure(complaint, "check the base, and free space for the store"):
        known = _read(branch)
        conflicts, new, moved = [], False, []
        session = branch.record().session
        for item in touched(view):
            key = os.fsdecode(item.path)
            now = state(item.old)
            if key not in known:
                new = True
                known[key] = now
                if _is_younger(item.old, session):
                    # What the branch has itself may be a copy of a file that the base replaced since.
                    is_own = item.change.old is item.old
                    known[key] = None if not is_own and _was_made_since(view, item, session) else False
                if item.old is None and item.change.new is not None and not item.change.new.is_directory:
                    moved.append(item)
            if not is_same(known[key], now) and not _is_as_below(view, item):
                conflicts.append(Conflict(item.path, _what(known[key], now), item.change))
        for item in _orphans(view, moved):
            known[os.fsdecode(item.path)] = False
            conflicts.append(Conflict(item.path, "removed", item.change))
        if new:
            jsonfiles.write(f"{branch.path}/{_FILE}", known, sync=False)
    return known, sorted(conflicts, key=lambda conflict: conflict.path)


def accept(
    branch: Branch, view: View, paths: Collection[str], single: Collection[str], former: str
) -> None:
    """Remember the present state of some paths and of all below them, and of `single` ones. Raises
    UserError.

    `former`: a file that gets what was remembered before, for `restore`, unless it exists.
    """
    wanted, alone = set(paths), set(single)
    with on_failure(f"branch {quoted(branch.name)} cannot remember its base", "free space"):
        known = _read(branch)
        if not exists(former):
            jsonfiles.write(former, known)
        for key in [key for key in known if key in alone or _is_below(key, wanted)]:
            del known[key]
        for item in touched(view):
            key = os.fsdecode(item.path)
            if key in alone or _is_below(key, wanted):
                known[key] = state(item.old)
        jsonfiles.write(f"{branch.path}/{_FILE}", known, sync=False)


def restore(branch: Branch, paths: Collection[str], single: Collection[str], former: str) -> None:
    """Remember again what was remembered before `accept`, if it was called. Raises UserError."""
    wanted, alone = set(paths), set(single)
    with (
        on_failure(f"branch {quoted(branch.name)} cannot remember its base", "free space"),
        suppress(FileNotFoundError),
    ):
        found = jsonfiles.read(former)
        known = _read(branch)
        for key in {*known, *found}:
            if key not in alone and not _is_below(key, wanted):
                continue
            if key in found:
                known[key] = found[key]
            else:
                del known[key]
        jsonfiles.write(f"{branch.path}/{_FILE}", known, sync=False)


def returned(branch: Branch, view: View, paths: Collection[str]) -> None:
    """Remember the ctimes of what has its name again, which a rename sets, and nothing else: what was changed
    meanwhile is a conflict. Raises UserError.
    """
    wanted = set(paths)
    with on_failure(f"branch {quoted(branch.name)} cannot remember its base", "free space"):
        known = _read(branch)
        for item in touched(view):
            key = os.fsdecode(item.path)
            before, now = known.get(key), state(item.old)
            if key not in wanted or not isinstance(before, list) or not isinstance(now, list):
                continue
            if before[:_CTIME] == now[:_CTIME]:
                known[key] = now
        jsonfiles.write(f"{branch.path}/{_FILE}", known, sync=False)


def _is_below(path: str, wanted: set[str]) -> bool:
    while path:
        if path in wanted:
            return True
        path = path.rpartition("/")[0]
    return False


def _read(branch: Branch) -> dict[str, State]:
    with suppress(FileNotFoundError):
        found = jsonfiles.read(f"{branch.path}/{_FILE}")
        if isinstance(found, dict):
            return found
    return {}


def state(old: Object | None) -> State:
    """The state of an object below. Raises OSError if it cannot be read at the moment."""
    if old is None:
        return None
    st = old.st
    if st is None:
        if old.failure not in _BROKEN:
            raise OSError(old.failure, os.strerror(old.failure or 0))
        return False
    if old.is_directory:
        # Its size and times change with the names in it, which are compared themselves.
        return [st.st_ino, st.st_mode, st.st_uid, st.st_gid]
    # A file with several names gets another ctime when one of the others comes or goes.
    ctime = st.st_ctime_ns if st.st_nlink == 1 else 0
    return [st.st_ino, st.st_mode, st.st_uid, st.st_gid, st.st_size, st.st_mtime_ns, ctime]


def _was_made_since(view: View, item: Touched, session: int) -> bool:
    """Whether an object below did not exist when the branch was last mounted. Raises OSError."""
    assert item.old is not None
    name = b"." if item.old.is_directory else item.path.rpartition(b"/")[2]
    at = view.merge.gate.fd(item.old.parts[0])
    return calls.birth_ns(at, name, calls.AT_SYMLINK_NOFOLLOW) > session


def is_same(known: State, now: State) -> bool:
    """Whether an object is as it was. Its ctime is unknown if it has, or had, several names."""
    if not isinstance(known, list) or not isinstance(now, list):
        return known == now
    has_ctimes = 0 not in (*known[_CTIME:], *now[_CTIME:])
    return known == now if has_ctimes else known[:_CTIME] == now[:_CTIME]


def without_ctime(known: State) -> State:
    """A state without what a mere rename changes."""
    return known[:_CTIME] if isinstance(known, list) else known


def _is_younger(old: Object | None, session: int) -> bool:
    if old is None or old.st is None or old.st.st_ctime_ns <= session:
        return False
    # A name that comes or goes sets both times of a directory, which is not a change in itself.
    return not old.is_directory or old.st.st_ctime_ns != old.st.st_mtime_ns


def _is_as_below(view: View, item: Touched) -> bool:
    """Whether it is a directory that stays, with the attributes that it has below."""
    new = item.change.new
    if new is None or item.change.old is not item.old:
        return False
    if item.old is None or not (new.is_directory and item.old.is_directory) or view.is_replaced(item.change):
        return False
    now, before = view.both_of(item.change)
    return (now.mode, now.uid, now.gid, now.xattrs) == (before.mode, before.uid, before.gid, before.xattrs)


def _what(known: State, now: State) -> str:
    if now is None:
        return "removed"
    return "added" if known is None else "changed"


def _orphans(view: View, added: list[Touched]) -> Iterator[Touched]:
    """Those of the added files that are copies of files which the branch did not remove: the base did."""
    markers, gate = view.merge.markers, view.merge.gate
    layers = [root.layer for root in view.merge.roots]
    origins = Origins(layers, markers, DEFAULTS, gate)
    if not added or not _has_handles(origins, layers[-1]):
        return
    removed: set[bytes] | None = None
    for item in added:
        assert item.change.new is not None
        place = item.change.new.parts[0]
        where = b"/proc/self/fd/%d/%b" % (gate.fd(place), item.change.name)
        try:
            origin = os.getxattr(where, markers.origin, follow_symlinks=False)
        except OSError as error:
            if error.errno not in ABSENT:
                raise
            continue
        if not origin:
            continue
        if removed is None:
            removed = set()
            for other in touched(view):
                removed |= _origins_of(other, view, origins)
        if origin not in removed:
            yield item


def _has_handles(origins: Origins, layer: Layer) -> bool:
    """Whether copies of the layer's objects have an origin."""
    try:
        return bool(origins.encoded(layer.root_fd, b"", layer.dev))
    except OSError as error:
        _refuse_passing(error)
        return False


def _refuse_passing(error: OSError) -> None:
    """Raise an error that may pass, and by which a change would be overlooked. Others say that there is no
    origin.
    """
    if error.errno in (errno.EIO, errno.EINTR, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE):
        raise error


def _origins_of(item: Touched, view: View, origins: Origins) -> set[bytes]:
    """What copies of an object below have as their origin."""
    if item.old is None or (st := item.old.st) is None or stat.S_ISDIR(st.st_mode):
        return set()
    name = item.path.rpartition(b"/")[2]
    at = view.merge.gate.fd(item.old.parts[0])
    found = set()
    where = b"/proc/self/fd/%d/%b" % (at, name)
    try:
        found.add(origins.encoded(at, name, st.st_dev))
    except OSError as error:
        _refuse_passing(error)
    try:
        found.add(os.getxattr(where, view.merge.markers.origin, follow_symlinks=False))
    except OSError as error:
        _refuse_passing(error)
    return found
