"""Snapshots for programs: `unionfs.branches.Snapshots`.

    snapshots = Snapshots("/mnt")
    snapshots.create("before-upgrade")
    if not upgrade():
        snapshots.restore("before-upgrade")

Every call is one of the command line, as in `api`. `TrioSnapshots` is the same with `async`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from unionfs.branches.calling import ForTrio, call, threaded


class SnapshotError(Exception):
    """A snapshot cannot be taken, read, restored or removed: the sentence of the command line."""


class Snapshots:
    """The snapshots of a mounted union."""

    def __init__(self, mountpoint: str | os.PathLike[str]) -> None:
        """The calls raise SnapshotError if no union is mounted there, not this one."""
        self.mountpoint = os.path.abspath(mountpoint)

    def create(self, name: str | None = None, *, stop: bool = True) -> dict[str, Any]:
        """Take a snapshot, by default with the present time as its name; returns its `name`, and what
        `unionfs snapshot create --json` prints besides.

        `stop`: stop programs that have files open for writing, so that all files are of one moment. Raises
        SnapshotError; then there is no new snapshot.
        """
        words = [] if stop else ["--no-stop"]
        found = self._call("create", *words, names=[] if name is None else [name])
        assert isinstance(found, dict)
        return found

    def ls(self) -> list[dict[str, Any]]:
        """All snapshots, the oldest first, as of `unionfs snapshot ls --json`. Raises SnapshotError."""
        found = self._call("ls")
        assert isinstance(found, list)
        return found

    def diff(self, name: str, other: str | None = None, *, content: bool = False) -> list[dict[str, Any]]:
        """The changes from a snapshot to another one, None: to the present state, as of `unionfs snapshot
        diff --json`. Raises SnapshotError.
        """
        words = ["--content"] if content else []
        found = self._call("diff", *words, names=[name] if other is None else [name, other])
        assert isinstance(found, list)
        return found

    def restore(self, name: str) -> None:
        """Go back to a snapshot, and drop what was changed since the newest one. Raises SnapshotError; then
        nothing has changed.
        """
        self._call("restore", names=[name])

    def rm(self, *names: str, wait: bool = False) -> None:
        """Remove snapshots; `wait` until their layers are joined with those on them. Raises SnapshotError."""
        self._call("rm", *(["--wait"] if wait else []), names=names)

    def _call(self, command: str, *options: str, names: Sequence[str] = ()) -> Any:
        return call(["snapshot", command, "--json", *options, "--", self.mountpoint, *names], SnapshotError)


class TrioSnapshots(ForTrio[Snapshots]):
    """`Snapshots` for trio: its methods, in a thread."""

    def __init__(self, mountpoint: str | os.PathLike[str]) -> None:
        super().__init__(Snapshots(mountpoint))
        self.mountpoint = self._wrapped.mountpoint

    create = threaded(Snapshots.create)
    ls = threaded(Snapshots.ls)
    diff = threaded(Snapshots.diff)
    restore = threaded(Snapshots.restore)
    rm = threaded(Snapshots.rm)
