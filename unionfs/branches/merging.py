"""Merges texts that both a branch and its base have changed, by git merge-file.

That needs the text that both began with. It is kept when a command of `try` has ended, for files that the
branch has changed and the base has not yet.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress

from unionfs.branches.describe import Describer, Difference
from unionfs.branches.seen import Conflict, State
from unionfs.branches.store import Branch
from unionfs.branches.view import View
from unionfs.errors import UserError, on_failure

_FILE = "originals.zip"
_MOST_BYTES = 64 << 20


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
                name = _name(b"/" + item.path)
                is_changed = item.kind == "C" and "content" in item.what
                if not is_changed or name in names or seen.get(os.fsdecode(b"/" + item.path)) is False:
                    continue
                data = describer.data(item, new=False)
                if data is not None and b"\0" not in data and total + len(data) <= _MOST_BYTES:
                    kept.writestr(name, data)
                    total += len(data)


def merged(branch: Branch, view: View, conflicts: Iterable[Conflict]) -> dict[bytes, bytes]:
    """The merged texts of those conflicts that can be merged. Raises UserError without git."""
    describer, texts = Describer(view), {}
    for conflict in conflicts:
        change = conflict.change
        item = describer.difference(conflict.path[1:], change) if conflict.what == "changed" else None
        if item is None or item.kind != "C" or conflict.path.rpartition(b"/")[2] != change.name:
            continue
        original = _original(branch, conflict.path)
        ours, theirs = describer.data(item, new=True), describer.data(item, new=False)
        if original is None or ours is None or theirs is None or b"\0" in ours + theirs:
            continue
        if (text := _merge(ours, original, theirs)) is not None:
            texts[conflict.path] = text
    return texts


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


def _original(branch: Branch, path: bytes) -> bytes | None:
    with suppress(OSError, KeyError, zipfile.BadZipFile), zipfile.ZipFile(f"{branch.path}/{_FILE}") as kept:
        return kept.read(_name(path))
    return None


def _name(path: bytes) -> str:
    return hashlib.sha256(path).hexdigest()
