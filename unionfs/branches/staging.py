"""Prepares the new objects of a commit, with all attributes, in a directory on the base's filesystem.

The branch does not change before the commit has ended. Files of its layer are moved where possible
(`sharing`); other objects are copied, by reflink where the filesystem supports it, and holes are kept. Hard
links of the branch are hard links again.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from unionfs.branches.beneath import Beneath
from unionfs.branches.merging import Merged
from unionfs.branches.plan import Chosen, Put
from unionfs.branches.sharing import Sharing
from unionfs.branches.view import Entry, View
from unionfs.core.places import Layer, Place
from unionfs.sys import attributes
from unionfs.sys.fds import Owned, close_quietly
from unionfs.union.diff import Object
from unionfs.union.filedata import clone, copy_data

_SMALL = 256 * 1024
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ACCESS = 0o700


class Staged(NamedTuple):
    """A prepared object."""

    inode: int
    is_directory: bool
    mode: int = 0
    """As st_mode. A directory lacks these permission bits until it is in place, if they exclude its owner."""
    own: bool = False
    """Whether it is a file of the branch's layer, and stays there until it is put in place."""
    shared: Sequence[str] = ()
    """Files below a directory that are hard links of the layer's files: paths below the directory."""


@dataclass(slots=True)
class _Level:
    """A directory being filled; the next name is the last."""

    path: bytes
    fd: int
    found: Object
    names: list[bytes]


class Stager:
    """Copies objects of a branch into the directory `at`."""

    def __init__(
        self,
        view: View,
        at: int,
        has: Callable[[bytes], bool],
        base: Layer | None,
        texts: Mapping[bytes, Merged],
        sharing: Sharing | None,
    ) -> None:
        """`has`: whether a path below a new directory is selected. `base`: the layer that is changed, if any.

        `texts`: the merged files. `sharing`: moves files of the branch's layer; None copies all.
        """
        self._view = view
        self._at = at
        self._has = has
        self._chosen = Chosen(view, has)
        self._base = base
        self._texts = texts
        self._sharing = sharing
        self._shared: list[str] = []
        self._links: dict[int, bytes] = {}
        self._never_clones: set[int] = set()

    def put(self, name: bytes, step: Put) -> Staged:
        """Copy the object of one step, a directory with its content, to `name`. Raises OSError."""
        self._shared = []
        if not step.new.is_directory:
            inode = self._own(step.path, step.new)
            if inode is not None:
                return Staged(inode, False, own=True)
            self._object(self._at, name, step.above.parts, step.path, step.new, name)
            st = os.stat(name, dir_fd=self._at, follow_symlinks=False)
            return Staged(st.st_ino, False, st.st_mode)
        os.mkdir(name, _ACCESS, dir_fd=self._at)
        levels = [self._level(self._at, name, step.path, step.new)]
        mode = 0
        try:
            while levels:
                level = levels[-1]
                if level.names:
                    self._next(levels, level, name)
                else:
                    mode = self._finish(level, is_top=len(levels) == 1)
                    close_quietly(levels.pop().fd)
        finally:
            for level in levels:
                close_quietly(level.fd)
        inode = os.stat(name, dir_fd=self._at, follow_symlinks=False).st_ino
        return Staged(inode, True, mode, shared=self._shared)

    def _level(self, at: int, name: bytes, path: bytes, found: Object) -> _Level:
        names = self._view.names(found)
        names.reverse()
        return _Level(path, os.open(name, _DIRECTORY, dir_fd=at), found, names)

    def _next(self, levels: list[_Level], level: _Level, top: bytes) -> None:
        name = level.names.pop()
        path = level.path + b"/" + name
        found = self._view.child(level.found, name)
        if found is None:
            return
        if found.is_directory:
            if self._chosen.reaches(path, found):
                os.mkdir(name, _ACCESS, dir_fd=level.fd)
                levels.append(self._level(level.fd, name, path, found))
        elif self._has(path):
            staged = top + b"/" + b"/".join([*(one.path.rpartition(b"/")[2] for one in levels[1:]), name])
            self._object(level.fd, name, level.found.parts, path, found, staged)

    def _finish(self, level: _Level, *, is_top: bool) -> int:
        """Set the attributes of a filled directory. Returns its mode."""
        new = self._view.of_directory(level.found)
        mode = new.mode
        if is_top and os.geteuid() != 0:
            # Its owner needs them to rename it to another directory (rename(2)).
            new = new._replace(mode=mode | _ACCESS)
        attributes.write(level.fd, None, new, attributes.unsupported)
        return mode

    def _object(
        self, at: int, name: bytes, above: list[Place], path: bytes, found: Object, staged: bytes
    ) -> None:
        """Copy a non-directory; `staged`: its path below the staging directory."""
        sharing = self._sharing if at != self._at else None
        if sharing and self._own(path, found) is not None and sharing.link(path, found, at, name):
            self._shared.append(os.fsdecode(staged.partition(b"/")[2]))
            return
        with self._view.entry(path.rpartition(b"/")[2], found) as entry:
            st = entry.st
            key = hash((st.st_dev, st.st_ino)) if st.st_nlink > 1 else 0
            if key and (first := self._links.get(key)) is not None:
                self._link(first, at, name)
                return
            if key and not entry.indexed and self._linked(at, name, path, found):
                self._links[key] = staged
                return
            merged = self._texts.get(path)
            new = self._view.attributes_of(entry) if merged is None else merged.attributes
            if stat.S_ISREG(st.st_mode):
                with Owned(os.open(name, _NEW, 0o600, dir_fd=at)) as target:
                    self._data(above, path, found, entry, target)
                    attributes.write(target, None, new, attributes.unsupported)
            else:
                if stat.S_ISLNK(st.st_mode):
                    os.symlink(os.readlink(b"", dir_fd=entry.fd), name, dir_fd=at)
                else:
                    os.mknod(name, stat.S_IFMT(st.st_mode) | 0o600, st.st_rdev, dir_fd=at)
                attributes.write(at, name, new, attributes.unsupported)
            if key:
                self._links[key] = staged

    def _link(self, staged: bytes, at: int, name: bytes) -> None:
        """Hard link a staged object, whose path may be longer than PATH_MAX."""
        above, _, last = staged.rpartition(b"/")
        with Owned(Beneath(self._at).directory(above)) as fd:
            os.link(last, name, src_dir_fd=fd, dst_dir_fd=at, follow_symlinks=False)

    def _own(self, path: bytes, found: Object) -> int | None:
        """The inode number of a file that can be moved from the layer; None for others."""
        if self._sharing is None or path in self._texts:
            return None
        return self._sharing.inode(path, found)

    def _linked(self, at: int, name: bytes, path: bytes, found: Object) -> bool:
        """Hard link the base's file itself, since it may have other names that stay."""
        place = found.parts[0]
        if place.layer is not self._base:
            return False
        try:
            os.link(
                path.rpartition(b"/")[2], name, src_dir_fd=self._view.merge.gate.fd(place), dst_dir_fd=at,
                follow_symlinks=False,
            )  # fmt: skip
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK):
                return False
            raise
        return True

    def _data(self, above: list[Place], path: bytes, found: Object, entry: Entry, target: int) -> None:
        name, st = path.rpartition(b"/")[2], entry.st
        if path in self._texts:
            with open(target, "wb", closefd=False) as out:
                out.write(self._texts[path].data)
            return
        if not st.st_size:
            return
        with Owned(self._view.open_data(above, name, found, entry)) as source:
            dense = st.st_size <= _SMALL and st.st_blocks * 512 >= st.st_size
            if not clone(source, target, os.fstat(source).st_dev, self._never_clones):
                copy_data(source, target, st.st_size, dense=dense)
