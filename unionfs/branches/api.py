"""Branches for programs: `unionfs.branches`.

    with branch("/srv/site") as fix:
        fix.run(["make", "install"], check=True)
        if all(change["path"].startswith("dist/") for change in fix.diff()):
            fix.commit()

Every call is one of the command line, in a process of its own, so threads, event loops and signals of the
caller are not touched. `trio_branch` is the same with `async`.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Literal

from unionfs.branches.calling import call, in_thread, program

_CONFLICTS = 3


class BranchError(Exception):
    """A branch cannot be used: one sentence, as of the command line."""


class ConflictError(BranchError):
    """A commit was stopped, and nothing changed: the same paths were changed below the branch, too."""

    def __init__(self, conflicts: Sequence[tuple[str, str]]) -> None:
        paths = "one path was" if len(conflicts) == 1 else f"{len(conflicts)} paths were"
        super().__init__(f"{paths} changed below the branch, too; nothing was committed.")
        self.conflicts = conflicts
        """The change below (`changed`, `added`, `removed`), and the path."""


class Branch:
    """A branch over a directory."""

    def __init__(self, name: str, root: str | None = None) -> None:
        """An existing branch; `branch` makes one. `root`: the storage root, as `--root`."""
        self.name = name
        self._root = root
        self._kept = False

    def run(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        check: bool = False,
        capture_output: bool = False,
        input: str | None = None,
        cwd: str | os.PathLike[str] | None = None,
        network: bool = True,
        hide: Sequence[str] = (),
        writable: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the branch, as `unionfs try`. `cwd`: by default the base.

        Raises CalledProcessError if it fails and `check` is set. Its `returncode` is 1 with a sentence on
        stderr if the branch cannot be used.
        """
        words = ["try", "--keep", "--quiet", "-n", self.name, *self._options()]
        words += [] if network else ["--net", "none"]
        words += [word for path in hide for word in ("--hide", path)]
        words += [word for path in writable for word in ("--rw", path)]
        given: dict[str, Any] = {"input": input} if input is not None else {"stdin": subprocess.DEVNULL}
        return subprocess.run(
            [*program(), *words, "--", *(os.fspath(word) for word in command)],
            cwd=cwd or self.base, check=check, text=True, errors="surrogateescape",
            capture_output=capture_output, **given,
        )  # fmt: skip

    @property
    def base(self) -> str:
        """The directory that it lies over."""
        found = [values for values in self._call("ls") if values["name"] == self.name]
        if not found:
            raise BranchError(f"there is no branch {self.name}.")
        return str(found[0]["base"])

    def diff(self, *, content: bool = False, everything: bool = True) -> list[dict[str, Any]]:
        """The changes, as of `unionfs branch diff --json`; without `everything` no caches and temporary
        files.
        """
        words = [*(["--content"] if content else []), *(["--all"] if everything else []), self.name]
        found = self._call("diff", *words)
        assert isinstance(found, list)
        return found

    def commit(
        self,
        *,
        only: Sequence[str] = (),
        leave: Sequence[str] = (),
        conflicts: Literal["stop", "ours", "theirs", "merge"] = "stop",
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Apply it to what lies below it; returns the result, as of `unionfs branch commit --json`.

        Raises ConflictError, also of a dry run, and BranchError.
        """
        words = [word for path in only for word in ("--only", path)]
        words += [word for path in leave for word in ("--except", path)]
        words += [] if conflicts == "stop" else [f"--{conflicts}"]
        words += ["--dry-run"] if dry_run else []
        found = self._call("commit", *words, self.name)
        assert isinstance(found, dict)
        if found["conflicts"] and not found["done"] and conflicts in ("stop", "merge"):
            raise ConflictError([(what, path) for what, path in found["conflicts"]])
        return found

    def keep(self) -> None:
        """Keep it after the `with` block."""
        self._kept = True

    def discard(self) -> None:
        """Remove it with its changes. Raises BranchError."""
        self._call("discard", self.name)

    def end(self) -> None:
        """Remove it unless it is kept or gone: the end of a `with` block. Raises BranchError."""
        if not self._kept and any(values["name"] == self.name for values in self._call("ls")):
            self.discard()

    def _options(self) -> list[str]:
        return [] if self._root is None else ["--root", self._root]

    def _call(self, command: str, *words: str) -> Any:
        words = ("branch", command, *self._options(), "--json", *words)
        return call(words, BranchError, codes=(0, _CONFLICTS))


@contextmanager
def branch(
    base: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    parent: str | None = None,
    root: str | None = None,
) -> Iterator[Branch]:
    """A new branch over the directory `base`, or over the branch `parent`; it is removed at the end unless
    it was committed or kept. Raises BranchError.
    """
    found = Branch(name or f"api-{secrets.token_hex(4)}", root)
    over = ["--base", os.fspath(base)] if base is not None else []
    over += ["--from", parent] if parent is not None else []
    found._call("create", "--no-mount", *over, found.name)
    try:
        yield found
    finally:
        found.end()


class TrioBranch:
    """A `Branch` for trio: its methods, in a thread."""

    def __init__(self, branch: Branch) -> None:
        self._branch = branch
        self.name = branch.name

    async def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """See `Branch.run`."""
        result: subprocess.CompletedProcess[str] = await in_thread(self._branch.run, command, **options)
        return result

    async def diff(self, **options: Any) -> list[dict[str, Any]]:
        """See `Branch.diff`."""
        result: list[dict[str, Any]] = await in_thread(self._branch.diff, **options)
        return result

    async def commit(self, **options: Any) -> dict[str, Any]:
        """See `Branch.commit`."""
        result: dict[str, Any] = await in_thread(self._branch.commit, **options)
        return result

    async def discard(self) -> None:
        """See `Branch.discard`."""
        await in_thread(self._branch.discard)

    def keep(self) -> None:
        """See `Branch.keep`."""
        self._branch.keep()


@asynccontextmanager
async def trio_branch(
    base: str | os.PathLike[str] | None = None, **options: Any
) -> AsyncIterator[TrioBranch]:
    """As `branch`, for trio."""
    # For start-up time: only programs that use trio need it.
    import trio

    manager = branch(base, **options)
    found = await in_thread(manager.__enter__)
    try:
        yield TrioBranch(found)
    finally:
        with trio.CancelScope(shield=True):
            await in_thread(manager.__exit__, None, None, None)
