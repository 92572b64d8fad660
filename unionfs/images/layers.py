"""Single layers: an upper exported, a layer imported, several squashed."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from unionfs.errors import UserError, on_failure, quoted
from unionfs.images.blobs import Written, file_blob, opened_layers, unpack_blob, write_layer
from unionfs.images.indexed import opened_index
from unionfs.images.rules import Rules
from unionfs.images.store import Store, kind_of, markers_of
from unionfs.images.unpack import Contents
from unionfs.storage.archive.compress import kind_for
from unionfs.storage.archive.output import whole_file
from unionfs.storage.archive.progress import UNSEEN, Progress
from unionfs.storage.root import is_own_directory
from unionfs.sys.capabilities import may_use_trusted_xattrs
from unionfs.sys.fds import directory
from unionfs.sys.trees import remove_path
from unionfs.union.resting import resting


def export_layer(
    upper: str, lowers: Sequence[str], output: str, *, work: str | None = None, userxattr: bool
) -> Written:
    """Write an upper that is not mounted as a layer's file. Paths are absolute, without symlinks.

    `work`: its work directory, if hard links of the lowers were changed. Raises UserError, and then leaves no
    file.
    """
    complaint = f"the layer {quoted(output)} cannot be written"
    with (
        on_failure(complaint, "check the layers, and free space"),
        resting(upper, lowers, work, userxattr=userxattr, writable=False) as layers,
        whole_file(output, "layer") as out,
    ):
        kind = kind_for(output)
        if layers.work is None:
            return write_layer(layers.merge, 1, out, kind, may_have_index=True)
        with opened_index(layers.work[1], layers.merge) as index:
            return write_layer(layers.merge, 1, out, kind, index)


def import_layer(
    file: str, target: str, *, userxattr: bool, rules: Rules, progress: Progress = UNSEEN
) -> tuple[Contents, str]:
    """Unpack a layer's file into a directory that is missing or empty; returns its contents and diff id.

    Raises UserError, and then leaves the directory as it was.
    """
    target = os.path.abspath(target)
    start = f".{os.path.basename(target)[:200]}.unionfs-"
    new = f"{os.path.dirname(target)}/{start}{secrets.token_hex(4)}"
    with on_failure(f"{quoted(target)} cannot be filled", "name a directory that is missing or empty"):
        if os.path.lexists(target) and (os.path.islink(target) or os.listdir(target)):
            raise UserError(f"{quoted(target)} is not empty; name a directory that is missing or empty.")
        _sweep(os.path.dirname(target), start)
        with file_blob(file) as blob, ExitStack() as held:
            os.mkdir(new, 0o700)
            try:
                fcntl.flock(held.enter_context(directory(new)), fcntl.LOCK_EX)
                found = unpack_blob(blob, new, markers_of(kind_of(userxattr)), rules, progress)
                os.rename(new, target)
            except BaseException:
                with suppress(OSError):
                    remove_path(new)
                raise
    return found


def _sweep(above: str, start: str) -> None:
    """Remove what killed imports into the same directory have left: their names begin so, without a lock."""
    for name in os.listdir(above):
        path = f"{above}/{name}"
        if name.startswith(start) and is_own_directory(path):
            with suppress(OSError), directory(path) as fd:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_path(path, unlock=True)


def squash_layers(
    files: Sequence[str], output: str, root: str, rules: Rules, progress: Progress = UNSEEN
) -> tuple[Written, list[str]]:
    """Write one layer's file with the content of several, the lowest first; returns it and notes.

    They are unpacked in the store meanwhile, where `prune` finds what a killed process leaves. Raises
    UserError, and then leaves no file.
    """
    kind = kind_of(not may_use_trusted_xattrs())
    notes: list[str] = []
    with Store(root).workspace(kind) as place:
        paths: list[str] = []
        for number, file in enumerate(files):
            paths.insert(0, f"{place}/{number}")
            os.mkdir(paths[0], 0o700)
            with file_blob(file) as blob:
                contents, _ = unpack_blob(blob, paths[0], markers_of(kind), rules, progress)
                notes += contents.notes
        with opened_layers(paths, markers_of(kind)) as merge, whole_file(output, "layer") as out:
            return write_layer(merge, len(files), out, kind_for(output)), notes

