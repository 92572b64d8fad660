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
from typing import Any, Literal, TypeAlias

from unionfs.branches.calling import ForTrio, call, in_thread, program, run_to_end, threaded
from unionfs.errors import quoted

_CONFLICTS = 3
Path: TypeAlias = str | os.PathLike[str]
Decision: TypeAlias = Literal["stop", "ours", "theirs", "merge"]


class BranchError(Exception):
    """A branch cannot be used: one sentence, as of the command line."""

    branch: str | None = None
    """The name of the branch that `commit` did not commit, and which is kept."""


class ConflictError(BranchError):
    """A commit was stopped, and nothing changed: the same paths were changed below the branch, too."""

    def __init__(self, conflicts: Sequence[tuple[str, str]], branch: str) -> None:
        paths = "one path was" if len(conflicts) == 1 else f"{len(conflicts)} paths were"
        super().__init__(f"{paths} changed below branch {branch}, too; nothing was committed.")
        self.branch = branch
        self.conflicts = conflicts
        """The change below (`changed`, `added`, `removed`), and the path."""


class Branch:
    """A branch over a directory."""

    def __init__(self, name: str, root: str | None = None) -> None:
        """An existing branch; `branch` makes one. `root`: the storage root, as `--root`."""
        self.name = name
        self._root = root
        self._kept = False
        self._failed = False

    def run(
        self,
        command: Sequence[Path],
        *,
        check: bool = False,
        capture_output: bool = False,
        input: str | None = None,
        cwd: Path | None = None,
        network: bool = True,
        hide: Sequence[str] = (),
        writable: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the branch, as `unionfs try`. `cwd`: by default the base.

        Raises CalledProcessError if it fails and `check` is set. Its `returncode` is 1 with a sentence on
        stderr if the branch cannot be used.
        """
        given: dict[str, Any] = {"input": input} if input is not None else {"stdin": subprocess.DEVNULL}
        return subprocess.run(
            self._words(command, network, hide, writable), cwd=cwd or self.base, check=check, text=True,
            errors="surrogateescape", capture_output=capture_output, **given,
        )  # fmt: skip

    def _words(
        self, command: Sequence[Path], network: bool, hide: Sequence[str], writable: Sequence[str]
    ) -> list[str]:
        """The call of `unionfs try`."""
        words = ["try", "--keep", "--quiet", "-n", self.name, *self._options()]
        words += [] if network else ["--net", "none"]
        words += [word for path in hide for word in ("--hide", path)]
        words += [word for path in writable for word in ("--rw", path)]
        return [*program(), *words, "--", *(os.fspath(word) for word in command)]

    @property
    def base(self) -> str:
        """The directory that it lies over."""
        values = self._listed()
        if values is None:
            raise BranchError(f"there is no branch {self.name}.")
        return str(values["base"])

    def _listed(self) -> dict[str, Any] | None:
        """What `unionfs branch ls --json` prints of it; None if it does not exist."""
        return next((values for values in self._call("ls") if values["name"] == self.name), None)

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
        conflicts: Decision = "stop",
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Apply it to what lies below it; returns the result, as of `unionfs branch commit --json`.

        Raises ConflictError, also of a dry run, and BranchError. The branch is then kept after the `with`
        block, even if the error is caught, unless a later call commits or discards it; after a dry run only
        if the error leaves the block.
        """
        words = [word for path in only for word in ("--only", path)]
        words += [word for path in leave for word in ("--except", path)]
        words += [] if conflicts == "stop" else [f"--{conflicts}"]
        words += ["--dry-run"] if dry_run else []
        self._failed = self._failed or not dry_run
        try:
            found = self._call("commit", *words, self.name)
        except BranchError as error:
            error.branch = self.name
            raise
        assert isinstance(found, dict)
        if found["conflicts"] and not found["done"] and conflicts in ("stop", "merge"):
            raise ConflictError([(what, path) for what, path in found["conflicts"]], self.name)
        self._failed = self._failed and dry_run
        return found

    def keep(self) -> None:
        """Keep it after the `with` block."""
        self._kept = True

    def discard(self) -> None:
        """Remove it with its changes. Raises BranchError."""
        self._call("discard", self.name)

    def end(self, error: BaseException | None = None) -> None:
        """Remove it unless it is kept or gone, or could not be committed: the end of a `with` block, which
        `error` leaves. Raises BranchError.
        """
        failed = self._failed or (isinstance(error, BranchError) and error.branch == self.name)
        if not (self._kept or failed) and self._listed() is not None:
            self.discard()

    def _options(self) -> list[str]:
        return [] if self._root is None else ["--root", self._root]

    def _call(self, command: str, *words: str) -> Any:
        words = ("branch", command, *self._options(), "--json", *words)
        return call(words, BranchError, codes=(0, _CONFLICTS))


def _opened(base: Path | None, name: str | None, parent: str | None, root: str | None) -> Branch:
    """A kept branch of that name, or a new one. Raises BranchError."""
    found = Branch(name or f"api-{secrets.token_hex(4)}", root)
    values = None if name is None else found._listed()
    if values is None:
        over = ["--base", os.fspath(base)] if base is not None else []
        over += ["--from", parent] if parent is not None else []
        found._call("create", "--no-mount", *over, found.name)
        return found
    is_other = base is not None and (values["parent"] or os.path.realpath(base) != values["base"])
    if is_other or (parent is not None and values["parent"] != parent):
        below = quoted(values["base"]) if values["parent"] is None else f"branch {values['parent']}"
        wanted = quoted(os.fspath(base)) if base is not None else f"branch {parent}"
        raise BranchError(f"branch {name} lies over {below}, not over {wanted}; choose another name.")
    found.keep()
    return found


@contextmanager
def branch(
    base: Path | None = None,
    *,
    name: str | None = None,
    parent: str | None = None,
    root: str | None = None,
) -> Iterator[Branch]:
    """A new branch over the directory `base`, or over the branch `parent`; it is removed at the end unless
    it was committed or kept, or its commit failed. If there is a branch `name` over the same, that one is
    continued, and stays until it is committed or discarded. Raises BranchError.
    """
    found = _opened(base, name, parent, root)
    try:
        yield found
    except BaseException as error:
        found.end(error)
        raise
    found.end()


class TrioBranch(ForTrio[Branch]):
    """A `Branch` for trio: its methods, in a thread, which is not cancelled before their end."""

    def __init__(self, branch: Branch) -> None:
        super().__init__(branch)
        self.name = branch.name

    async def run(
        self,
        command: Sequence[Path],
        *,
        check: bool = False,
        capture_output: bool = False,
        input: str | None = None,
        cwd: Path | None = None,
        network: bool = True,
        hide: Sequence[str] = (),
        writable: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        """See `Branch.run`. When it is cancelled, the command gets SIGTERM, and after five seconds everything
        in it is killed.
        """
        here = cwd or await self.base()
        words = self._wrapped._words(command, network, hide, writable)
        done = await run_to_end(words, cwd=here, input=input, capture_output=capture_output)
        if check:
            done.check_returncode()
        return done

    async def base(self) -> str:
        """See `Branch.base`."""
        return await in_thread(lambda: self._wrapped.base)

    diff = threaded(Branch.diff)
    commit = threaded(Branch.commit)
    discard = threaded(Branch.discard)

    def keep(self) -> None:
        """See `Branch.keep`."""
        self._wrapped.keep()


@asynccontextmanager
async def trio_branch(
    base: Path | None = None,
    *,
    name: str | None = None,
    parent: str | None = None,
    root: str | None = None,
) -> AsyncIterator[TrioBranch]:
    """As `branch`, for trio."""
    # For start-up time: only programs that use trio need it.
    import trio

    found = await in_thread(_opened, base, name, parent, root)
    cause: BaseException | None = None
    try:
        yield TrioBranch(found)
    except BaseException as error:
        cause = error
        raise
    finally:
        with trio.CancelScope(shield=True):
            await in_thread(found.end, cause)
