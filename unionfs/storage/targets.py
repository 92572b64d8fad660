"""Resolves targets in a merged tree: symlinks resolve with the tree's root as `/`, and never leave it.

Missing parts are created as in Docker: directories with mode 0755, and an empty file as the target of a file.
The tree is either a mounted union (`MountedTree`) or one that is not mounted yet (`served.UnionTree`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from unionfs.errors import UserError, quoted, reason
from unionfs.sys.fds import Owned
from unionfs.sys.openat2 import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2

_MOST_LINKS = 40  # as many as the kernel follows: MAXSYMLINKS, include/linux/namei.h
_EMPTY_FILE = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC

Names = tuple[bytes, ...]
"""A path from the root of a tree, free of symlinks and dots."""


class Tree(Protocol):
    """The tree to resolve a target in. Methods raise OSError; all names but the last are directories."""

    def kind(self, names: Names) -> int:
        """The file type (S_IFMT bits); symlinks are not followed."""

    def readlink(self, names: Names) -> bytes:
        """The target of a symlink."""

    def mkdir(self, names: Names) -> None:
        """Make a directory, mode 0755."""

    def create(self, names: Names) -> None:
        """Make an empty file, mode 0644."""

    def remove(self, names: Names, *, directory: bool) -> None:
        """Remove a file or directory created here."""


@dataclass(frozen=True, slots=True)
class Target:
    """An existing target. `undo` removes what was created for it."""

    names: Names
    undo: Callable[[], None]

    @property
    def path(self) -> str:
        return "/" + os.fsdecode(b"/".join(self.names))


def find(tree: Tree, target: str) -> tuple[Names, Names]:
    """Returns the existing part of a target, and the missing names below it. Raises OSError."""
    done: list[bytes] = []
    rest = os.fsencode(target).split(b"/")
    links = 0
    while rest:
        name = rest.pop(0)
        if name in (b"", b"."):
            continue
        if name == b"..":
            del done[-1:]
            continue
        here = (*done, name)
        try:
            kind = tree.kind(here)
        except FileNotFoundError:
            missing = [name, *(step for step in rest if step not in (b"", b"."))]
            if b".." in missing:
                raise
            return tuple(done), tuple(missing)
        if kind == stat.S_IFLNK:
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            link = tree.readlink(here)
            if link.startswith(b"/"):
                done.clear()
            rest[:0] = link.split(b"/")
            continue
        if kind != stat.S_IFDIR and any(step not in (b"", b".") for step in rest):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        done.append(name)
    return tuple(done), ()


def prepare(tree: Tree, target: str, source: str, *, directory: bool) -> Target:
    """Resolve the target of a directory or file, creating missing parts. On UserError, nothing is created."""
    made: list[tuple[Names, bool]] = []

    def undo() -> None:
        while made:
            names, is_directory = made.pop()
            with suppress(OSError):
                tree.remove(names, directory=is_directory)

    try:
        names, missing = find(tree, target)
        if not names and not missing:
            raise UserError(f"target {quoted(target)} leads to the union's root; mount below it.")
        for index, name in enumerate(missing):
            names = (*names, name)
            if directory or index + 1 < len(missing):
                tree.mkdir(names)
                made.append((names, True))
            else:
                tree.create(names)
                made.append((names, False))
        if not missing and (tree.kind(names) == stat.S_IFDIR) != directory:
            here, there = ("a directory", "a file") if directory else ("a file", "a directory")
            raise UserError(
                f"target {quoted(target)} is {there} in the union, but {source} is {here}; mount files on "
                "files and directories on directories."
            )
    except OSError as error:
        undo()
        raise UserError(_refusal(target, error)) from error
    except BaseException:
        undo()
        raise
    return Target(names, undo)


def same_place(taken: dict[Names, str], target: Target, given: str) -> None:
    """Record a target; refuse one that another target resolved to. Raises UserError."""
    if target.names in taken:
        raise UserError(
            f"targets {quoted(taken[target.names])} and {quoted(given)} are the same place in the union, "
            f"{quoted(target.path)}; mount one thing at each target."
        )
    taken[target.names] = given


def _refusal(target: str, error: OSError) -> str:
    shown = f"target {quoted(target)}"
    match error.errno:
        case errno.EROFS:
            return (
                f"{shown} does not exist, and nothing can be made there ({reason(error)}); make it in a "
                "layer, or give the union an upper."
            )
        case errno.ENOTDIR:
            return f"{shown} leads through something that is not a directory; choose another target."
        case errno.ELOOP:
            return f"{shown} leads through a loop of symlinks; choose another target."
        case errno.ENOENT:
            return f"{shown} leads through a symlink to something that is missing; choose another target."
    return f"{shown} cannot be used: {reason(error)}; choose another target."


class MountedTree:
    """A mounted union, by an fd of its root (O_PATH)."""

    def __init__(self, root_fd: int) -> None:
        self._root = root_fd

    def open(self, names: Names) -> int:
        """An O_PATH fd. Raises ELOOP if a name on the path became a symlink after it was resolved."""
        return openat2(
            self._root,
            b"/".join(names) or b".",
            os.O_PATH | os.O_NOFOLLOW,
            RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS,
        )

    def kind(self, names: Names) -> int:
        with Owned(self._open_last(names)) as fd:
            return stat.S_IFMT(os.fstat(fd).st_mode)

    def readlink(self, names: Names) -> bytes:
        with Owned(self._open_last(names)) as fd:
            return os.readlink(b"", dir_fd=fd)

    def mkdir(self, names: Names) -> None:
        with Owned(self.open(names[:-1])) as fd:
            os.mkdir(names[-1], 0o755, dir_fd=fd)

    def create(self, names: Names) -> None:
        with Owned(self.open(names[:-1])) as fd:
            os.close(os.open(names[-1], _EMPTY_FILE, 0o644, dir_fd=fd))

    def remove(self, names: Names, *, directory: bool) -> None:
        with Owned(self.open(names[:-1])) as fd:
            if directory:
                os.rmdir(names[-1], dir_fd=fd)
            else:
                os.unlink(names[-1], dir_fd=fd)

    def _open_last(self, names: Names) -> int:
        """Open the last name without following a symlink."""
        with Owned(self.open(names[:-1])) as fd:
            return openat2(fd, names[-1], os.O_PATH | os.O_NOFOLLOW, RESOLVE_NO_MAGICLINKS)
