"""Merges texts that both a branch and its base have changed, by git merge-file, and their attributes.

That needs the text and the attributes that both began with. They are kept when a command of `try` has ended,
for files that the branch has changed and the base has not yet, under a name that has the state of the base.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from unionfs.branches import links
from unionfs.branches.describe import Describer, Difference
from unionfs.branches.journal import attributes_from_json, attributes_to_json
from unionfs.branches.seen import Conflict, State, is_same, state, without_ctime
from unionfs.branches.store import Branch, may_own
from unionfs.branches.view import View
from unionfs.errors import UserError, on_failure
from unionfs.sys.attributes import ACL_ACCESS, FileAttributes

_FILE = "originals.zip"
_MOST_BYTES = 64 << 20
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged file."""

    data: bytes
    attributes: FileAttributes


class _DifferentlyError(Exception):
    """Both sides have given an attribute another value."""


def keep_originals(
    branch: Branch, describer: Describer, found: Iterable[Difference], seen: Mapping[str, State]
) -> None:
    """Keep what changed text files were before, unless it is kept or too much. Raises UserError."""
    with on_failure("the originals of changed files cannot be kept", "free space for the store"):
        path = f"{branch.path}/{_FILE}"
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as kept:
            names = set(kept.namelist())
            total = sum(item.file_size for item in kept.infolist())
            for item in found:
                if item.kind != "C" or "content" not in item.what or item.old is None:
                    continue
                known = seen.get(os.fsdecode(b"/" + item.path))
                if known is False or not is_same(known, state(item.change.old)):
                    continue  # the base has changed it
                name = _name(b"/" + item.path, known)
                data = None if name in names else describer.data(item, new=False)
                if data is not None and b"\0" not in data and total + len(data) <= _MOST_BYTES:
                    kept.writestr(name, data)
                    kept.writestr(_attributes_of(name), json.dumps(attributes_to_json(item.old.attributes)))
                    total += len(data)


def merged(
    branch: Branch, view: View, conflicts: Sequence[Conflict], seen: Mapping[str, State]
) -> tuple[dict[bytes, Merged], dict[bytes, str]]:
    """Those conflicts that can be merged, and, of others, which attributes differ. Raises UserError without
    git.
    """
    describer, found, refused = Describer(view), dict[bytes, Merged](), dict[bytes, str]()
    linked = {path for group in links.groups(view) for path in group.paths} if conflicts else set()
    for conflict in conflicts:
        change = conflict.change
        if conflict.path in linked:
            refused[conflict.path] = f"{conflict.what}, not merged: the branch has other names (links) of it"
            continue
        item = describer.difference(conflict.path[1:], change) if conflict.what == "changed" else None
        if item is None or item.kind != "C" or conflict.path.rpartition(b"/")[2] != change.name:
            continue
        original = _original(branch, _name(conflict.path, seen.get(os.fsdecode(conflict.path))))
        ours, theirs = describer.data(item, new=True), describer.data(item, new=False)
        if original is None or ours is None or theirs is None or b"\0" in ours + theirs:
            continue
        if (text := _merge(ours, original.data, theirs)) is None or item.new is None or item.old is None:
            continue
        try:
            both = _merge_attributes(item.new.attributes, original.attributes, item.old.attributes)
            found[conflict.path] = Merged(text, both)
        except _DifferentlyError as error:
            refused[conflict.path] = f"{error} changed differently"
    return found, refused


def _merge_attributes(
    ours: FileAttributes, original: FileAttributes, theirs: FileAttributes
) -> FileAttributes:
    """Each attribute that only one side has changed is that side's. Raises _DifferentlyError."""
    sides = ours, original, theirs
    if may_own(theirs.uid, theirs.gid):
        uid = _merge_values("owner", *(side.uid for side in sides))
        gid = _merge_values("group", *(side.gid for side in sides))
    else:
        uid, gid = ours.uid, ours.gid
    # An access ACL has the mode in it, and the mode a part of the ACL.
    mode, acl = _merge_values("mode", *((side.mode, side.xattrs.get(ACL_ACCESS)) for side in sides))
    xattrs = {ACL_ACCESS: acl}
    for name in {name for side in sides for name in side.xattrs} - {ACL_ACCESS}:
        label = f"xattr {os.fsdecode(name)}"
        xattrs[name] = _merge_values(label, *(side.xattrs.get(name) for side in sides))
    times = max(ours.atime_ns, theirs.atime_ns), max(ours.mtime_ns, theirs.mtime_ns)
    kept = {name: value for name, value in xattrs.items() if value is not None}
    return FileAttributes(mode, uid, gid, *times, kept)


def _merge_values(name: str, ours: _T, original: _T, theirs: _T) -> _T:
    if theirs in (ours, original):
        return ours
    if ours == original:
        return theirs
    raise _DifferentlyError(name)


def _merge(ours: bytes, original: bytes, theirs: bytes) -> bytes | None:
    """None if both changed the same lines."""
    with tempfile.TemporaryDirectory() as place:
        for name, data in (("ours", ours), ("original", original), ("theirs", theirs)):
            with open(f"{place}/{name}", "wb") as out:
                out.write(data)
        try:
            done = subprocess.run(
                ["git", "merge-file", "-p", "ours", "original", "theirs"], cwd=place, capture_output=True
            )
        except FileNotFoundError as error:
            raise UserError("git is missing, and --merge merges by `git merge-file`; install git.") from error
    return done.stdout if done.returncode == 0 else None


def _original(branch: Branch, name: str) -> Merged | None:
    with (
        suppress(OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile),
        zipfile.ZipFile(f"{branch.path}/{_FILE}") as kept,
    ):
        found = attributes_from_json(json.loads(kept.read(_attributes_of(name))))
        return Merged(kept.read(name), found)
    return None


def _name(path: bytes, known: State) -> str:
    return hashlib.sha256(b"%b\0%b" % (path, repr(without_ctime(known)).encode())).hexdigest()


def _attributes_of(name: str) -> str:
    return f"{name}.json"
