"""Puts a new, empty upper on top of the upper of a union that is in use: a snapshot is what lies below it.

Between two requests the former upper becomes a lower: of its nodes nothing changes but that they are copied
up by the next change. So it takes the same time however many files there are. Only files that are open for
writing are looked at, each by itself: programs go on with the inode that they have open (the kernel may write
to it without a request, also through a mapping), so that inode moves to the new upper, and a copy of it takes
its place below, by one exchange of names. Shared blocks or bytes are copied, as the filesystem allows.

- Nothing of it is visible on disk before the caller exchanges the directories; until then it can be undone.
  If the daemon is killed meanwhile, the former upper has the same content as before.
- A file without a name has no place in a snapshot: it goes on in the new upper.
- A lower has no index. So all names of the hard links in one must be in the former upper (`Lacking`), which
  gets a new index then.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple

from unionfs.core import stacking
from unionfs.core.files import Handle
from unionfs.core.node import Node
from unionfs.core.places import Layer, Place
from unionfs.core.validity import valid
from unionfs.sys import attributes, calls
from unionfs.sys.fds import Owned
from unionfs.union.copyup import CopyUp
from unionfs.union.filedata import clone, copy_data
from unionfs.union.index import Index
from unionfs.union.newupper import new_upper
from unionfs.union.tree import Union, path_of

_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class Copied(NamedTuple):
    """A file that was open for writing, and has a copy in the snapshot."""

    path: bytes
    """From the root of the union."""
    size: int
    changed: bool
    """Whether it was written while it was copied."""
    mapped: bool
    """Whether it may be mapped to write."""


class _Moved(NamedTuple):
    node: Node
    names: list[tuple[Place, Place, bytes]]
    """The directories in the former and in the new upper, and the name."""


class Stacking:
    """The change of one union; every function runs without waiting."""

    def __init__(self, union: Union, copy_up: CopyUp, handles: Iterable[Handle]) -> None:
        """``handles``: the open files."""
        self._union = union
        self._copy_up = copy_up
        self._handles = list(handles)
        self._former = union.require_upper()
        self._moved: list[_Moved] = []
        self._index: Index | None = None
        #: Names that the kernel must look up again: parent's id and name.
        self.outdated: list[tuple[int, bytes]] = []

    # -- the new upper --------------------------------------------------------------------------------------

    @contextmanager
    def on_top(self, fd: int, path: str) -> Iterator[None]:
        """Within the context the empty directory ``fd`` (O_PATH, on the mount of upper and work) is the
        upper; an error takes everything back. Raises ``OSError``, ``LayerError``."""
        union, former = self._union, self._former
        shown = union.nodes.root.attributes_of(os.stat(former.root_fd)).ctime_ns
        with new_upper(union, fd, path, union.stack.layers) as self._index:
            union.nodes.root.show_ctime(shown, os.stat(fd).st_ctime_ns)
            try:
                yield
            except BaseException:
                self._take_back(union.require_upper())
                raise

    def _take_back(self, new: Layer) -> None:
        gate = self._union.gate
        for moved in reversed(self._moved):
            for below, above, name in reversed(moved.names):
                st = os.stat(gate.fd(below))
                calls.renameat2(gate.fd(above), name, gate.fd(below), name, calls.RENAME_EXCHANGE)
                calls.set_times(gate.fd(below), st.st_atime_ns, st.st_mtime_ns)
        for node in self._union.nodes:
            if node.is_dir and node.parent is not None and node.parts and node.parts[0].layer is new:
                gate.forget(node.parts.pop(0))

    # -- files that are open for writing ------------------------------------------------------------------

    def move_written(self) -> list[Copied]:
        """Move every file that is open for writing to the new upper, within :meth:`on_top`. Raises
        ``OSError``."""
        return [self._move(node) for node in self._written()]

    def _written(self) -> list[Node]:
        former = self._former
        found: dict[Node, None] = {}
        for handle in self._handles:
            node = handle.node
            if self._is_named_in(node, former) and (
                handle.writes or (node.use is not None and node.use.mapped)
            ):
                found[node] = None
        for node in stacking.mapped(self._union.nodes):
            if self._is_named_in(node, former) and node.place is not None:
                self._union.gate.fd(node.place)
                valid(node, True)  # asks the kernel whether anybody has it open
                if node.use is not None and node.use.mapped:
                    found[node] = None
        return list(found)

    def _is_named_in(self, node: Node, layer: Layer) -> bool:
        if node.kind != stat.S_IFREG or node.unlinked or node.successor is not None or node.place is None:
            return False
        return node.place.layer is layer and node.lower_data is None

    def _move(self, node: Node) -> Copied:
        union, first = self._union, self._names(node)
        moved = _Moved(node, [])
        self._moved.append(moved)
        parent, name = first[0]
        below = _part(parent, self._former)
        file = None if node.use is None else node.use.file
        with union.work.temporary() as temporary:
            if file is not None and file.users and file.is_open and file.readable:
                before, after = self._copy(file.fd, temporary.at)
            else:
                with Owned(os.open(name, _READ, dir_fd=union.gate.fd(below))) as fd:
                    before, after = self._copy(fd, temporary.at)
            self._exchange(moved, parent, name, below, temporary.at)
        for directory, other in first[1:]:
            with union.work.temporary() as temporary:
                os.link(
                    name,
                    temporary.name,
                    src_dir_fd=union.gate.fd(below),
                    dst_dir_fd=union.work.fd,
                    follow_symlinks=False,
                )
                self._exchange(moved, directory, other, _part(directory, self._former), temporary.at)
        changed = (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
        mapped = node.use is not None and node.use.mapped
        return Copied(path_of(parent) + b"/" + name, before.st_size, changed, mapped)

    def _copy(self, source: int, at: tuple[int, bytes]) -> tuple[os.stat_result, os.stat_result]:
        """Copy a file with all its attributes. Returns those of the source before and after that."""
        union, nlink = self._union, self._union.markers.nlink
        with Owned(os.open(at[1], _NEW, 0o600, dir_fd=at[0])) as target:
            st = os.fstat(source)
            if not clone(source, target, st.st_dev, union.stack.never_clones):
                copy_data(source, target, st.st_size)
            xattrs = attributes.read_xattrs(source, lambda name: name != nlink, attributes.unsupported)
            attributes.write(target, None, attributes.attributes(st, xattrs), attributes.unsupported)
            return st, os.fstat(source)

    def _exchange(
        self, moved: _Moved, parent: Node, name: bytes, below: Place, copy: tuple[int, bytes]
    ) -> None:
        """Put a copy in the place of a file, and the file into the new upper."""
        union, gate = self._union, self._union.gate
        above = self._copy_up.directory(parent)
        st = os.stat(gate.fd(below))
        calls.renameat2(*copy, gate.fd(below), name, calls.RENAME_EXCHANGE)
        try:
            self._copy_up.appears(
                parent, lambda fd: os.rename(copy[1], name, src_dir_fd=copy[0], dst_dir_fd=fd)
            )
        except BaseException:
            calls.renameat2(*copy, gate.fd(below), name, calls.RENAME_EXCHANGE)
            raise
        finally:
            calls.set_times(gate.fd(below), st.st_atime_ns, st.st_mtime_ns)
        moved.names.append((below, above, name))
        if moved.node.from_origin:
            union.origins.becomes_impure(above, gate.fd(above))

    def _names(self, node: Node) -> list[tuple[Node, bytes]]:
        """All names of a file in the former upper; a walk finds those that are not known."""
        names = node.names()
        parent, name = names[0]
        st = os.stat(name, dir_fd=self._union.gate.fd(_part(parent, self._former)), follow_symlinks=False)
        indexed = 1 if node.is_indexed else 0
        if st.st_nlink - indexed <= len(names):
            return names
        found = list(dict.fromkeys(names))
        for path in _paths_of(self._former.root_fd, st):
            directory = self._union.node_at(path[:-1])
            if (directory, path[-1]) not in found:
                found.append((directory, path[-1]))
        return found

    # -- the end ------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Go on with the new upper: the directories are exchanged on disk, and :meth:`on_top` has ended, so
        that the former index is not counted among the names of files."""
        union, former, new = self._union, self._former, self._union.require_upper()
        for moved in self._moved:
            moved.node.lies_in(moved.names[0][1])
        for node in stacking.nameless(union.nodes, former):
            node.lies_in(new.root)
        for handle in self._handles:
            node = handle.node
            if node.place is None or node.place.layer is not former or node.successor is not None:
                continue
            if not node.unlinked and node.use is not None and node.use.of_upper:
                node.use.becomes_lower()
        union.files.kept.clear()
        written = {moved.node for moved in self._moved}
        for node in stacking.linked(union.nodes):
            self._relink(node, new if node in written else former)
        union.has_index(self._index)

    def _relink(self, node: Node, layer: Layer) -> None:
        """Go on with an object that has several hard links."""
        union = self._union
        if node.unlinked or node.place is None or node.place.layer not in (self._former, layer):
            return
        stacking.becomes_lower(node, layer)
        if layer is not self._former:
            with suppress(OSError):
                fd = union.gate.fd(node.place)
                os.removexattr(
                    b"/proc/self/fd/%d/%b" % (fd, node.name), union.markers.nlink, follow_symlinks=False
                )
            return
        entry = None
        if self._index is not None:
            with suppress(OSError):
                fd = union.gate.fd(node.place)
                st = os.stat(node.name, dir_fd=fd, follow_symlinks=False)
                entry = self._index.entry_of_lower(fd, node.name, st)
                if entry is not None:
                    node.may_be_indexed(entry, st.st_nlink)
        if entry is None:
            self._separate(node)

    def _separate(self, node: Node) -> None:
        """Without an index each name of a lower's file is a file of its own."""
        nodes = self._union.nodes
        for parent, name in node.names()[1:]:
            nodes.lose(node, parent, name)
            self.outdated.append((parent.id, name))
        stacking.unlink(nodes, node)


def lacking_names(union: Union) -> bool:
    """Whether a copy in the index has names that only a lower has."""
    return union.index is not None and union.index.lacks_names()


def _part(directory: Node, layer: Layer) -> Place:
    return next(part for part in directory.parts if part.layer is layer)


def _paths_of(root_fd: int, st: os.stat_result) -> Iterator[list[bytes]]:
    """The paths of an object below a directory."""
    top = b"/proc/self/fd/%d/" % root_fd
    for at, _, files in os.walk(top, followlinks=False):
        for name in files:
            with suppress(OSError):
                if os.path.samestat(os.lstat(os.path.join(at, name)), st):
                    yield [step for step in at[len(top) :].split(b"/") if step] + [name]
