"""The merged tree: lookup and merge rules, attributes, and where a node's object really is.

Merge rules (Documentation/filesystems/overlayfs.rst): going down the layers, the first object of a name
wins; a directory merges with the directories of that name below it until a non-directory, a whiteout or an
opaque directory ends the search; a redirect says under which name to go on searching.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import Final

from unionfs.sys.creds import Identity
from unionfs.union.files import OpenFile, open_backing, open_held
from unionfs.union.layers import Layer, LayerStack
from unionfs.union.markers import Markers
from unionfs.union.nodes import Node, NodeTable
from unionfs.union.places import Gate, Place

NAME_MAX: Final = 255


class Attributes:
    """What stat(2) says of a node: the object's own, but number and link count of the merged tree."""

    __slots__ = ("ino", "nlink", "st")

    def __init__(self, ino: int, nlink: int, st: os.stat_result) -> None:
        self.ino = ino
        self.nlink = nlink
        self.st = st


class Union:
    """The merged tree of a layer stack. Not thread-safe: one thread calls it."""

    def __init__(self, stack: LayerStack, *, directory_fds: int = 1024) -> None:
        self.stack = stack
        self.markers = Markers(stack.xattr_prefix)
        self.gate = Gate(directory_fds)
        self.nodes = NodeTable([layer.root for layer in stack.layers])
        self.identity = Identity()
        self._merge_root()

    def _merge_root(self) -> None:
        """An opaque root of a layer hides the roots below it."""
        parts = self.nodes.root.parts
        for index, place in enumerate(parts[:-1]):
            if self.markers.directory(place.fd)[0]:
                del parts[index + 1 :]
                break

    # -- finding --------------------------------------------------------------------------------------

    def lookup(self, parent: Node, name: bytes) -> tuple[Node, Attributes] | None:
        """The node called ``name`` in ``parent`` with its attributes; ``None`` when there is none."""
        if len(name) > NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        known = self.nodes.child(parent, name)
        if known is not None:
            return known, self.attributes(known)
        found = self._search(parent, name)
        if found is None:
            return None
        st, where = found
        node = self.nodes.add(parent, name, st, where)
        return node, self._attributes(node, st)

    def _search(self, parent: Node, name: bytes) -> tuple[os.stat_result, list[Place] | Place] | None:
        """What the layers hold under ``name``: attributes, and the parts or the place."""
        first: os.stat_result | None = None
        found: list[Place] = []
        remaining = [(part, name) for part in parent.parts]
        while remaining:
            part, here = remaining.pop(0)
            dir_fd = self.gate.fd(part)
            try:
                st = os.stat(here, dir_fd=dir_fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if not stat.S_ISDIR(st.st_mode):
                if first is not None or self.markers.is_whiteout(st, dir_fd, here):
                    break
                return st, part
            place = Place(part.layer, part, here)
            if first is None:
                first = st
            found.append(place)
            if not remaining:
                break
            opaque, redirect = self.markers.directory(self.gate.fd(place))
            if opaque:
                break
            if redirect is not None:
                remaining = list(self._redirected(redirect, remaining))
        return None if first is None else (first, found)

    def _redirected(
        self, redirect: bytes, remaining: list[tuple[Place, bytes]]
    ) -> Iterator[tuple[Place, bytes]]:
        """Where to search on: a sibling's name, or a path from the root of each layer further down."""
        if b"/" not in redirect:
            for part, _ in remaining:
                yield part, redirect
            return
        *above, last = [step for step in redirect.split(b"/") if step]
        lowest = remaining[0][0].layer.index
        for layer in self.stack.layers[lowest:]:
            place = self._walk(layer, above)
            if place is not None:
                yield place, last

    def _walk(self, layer: Layer, steps: list[bytes]) -> Place | None:
        """The place of a path in one layer, if all of it are directories."""
        place = layer.root
        for step in steps:
            if step in (b".", b".."):
                return None
            place = Place(layer, place, step)
            try:
                self.gate.fd(place)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return place

    def is_visible_below(self, parent: Node, name: bytes) -> bool:
        """Whether a lower has ``name`` in ``parent``, so that removing it from the upper takes a whiteout."""
        for part in parent.parts:
            if part.layer.is_upper:
                continue
            dir_fd = self.gate.fd(part)
            try:
                st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            return not self.markers.is_whiteout(st, dir_fd, name)
        return False

    # -- attributes -----------------------------------------------------------------------------------

    def attributes(self, node: Node) -> Attributes:
        """stat(2) of a node."""
        return self._attributes(node, self.stat(node))

    def stat(self, node: Node) -> os.stat_result:
        """The attributes of the real object."""
        if node.held >= 0:
            return os.stat(node.held)
        if node.is_dir:
            return os.stat(self.gate.fd(node.parts[0]))
        assert node.place is not None
        return os.stat(node.name, dir_fd=self.gate.fd(node.place), follow_symlinks=False)

    def _attributes(self, node: Node, st: os.stat_result) -> Attributes:
        nlink = st.st_nlink
        if node.unlinked and (node.is_dir or not node.is_upper):
            nlink = 0
        elif len(node.parts) > 1:
            nlink = 1  # as overlayfs: counting the subdirectories of a merged directory is not worth it
        return Attributes(node.ino, nlink, st)

    # -- where a node's object is ---------------------------------------------------------------------

    def path(self, node: Node) -> tuple[bytes, bool]:
        """A path of /proc/self/fd for calls without an ``at`` form, and whether to follow its last link."""
        if node.held >= 0:
            return b"/proc/self/fd/%d" % node.held, True
        if node.is_dir:
            return b"/proc/self/fd/%d" % self.gate.fd(node.parts[0]), True
        assert node.place is not None
        return b"/proc/self/fd/%d/%b" % (self.gate.fd(node.place), node.name), False

    def open_path(self, node: Node) -> int:
        """A new O_PATH fd of the node's object; the caller closes it."""
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        if node.held >= 0:
            return os.dup(node.held)
        if node.is_dir:
            return os.dup(self.gate.fd(node.parts[0]))
        assert node.place is not None
        return os.open(node.name, flags, dir_fd=self.gate.fd(node.place))

    def hold(self, node: Node) -> None:
        """Keep an fd of an object whose last known name is about to go."""
        if node.held < 0 and not node.links:
            node.held = self.open_path(node)

    def readlink(self, node: Node) -> bytes:
        """The target of a symlink."""
        if node.held >= 0:
            return os.readlink(b"", dir_fd=node.held)
        assert node.place is not None
        return os.readlink(node.name, dir_fd=self.gate.fd(node.place))

    def open_file(self, node: Node, *, write: bool) -> OpenFile:
        """The node's backing file with one user more. It must be in the upper when ``write``."""
        file = node.file
        if file is None or not file.readable or (write and not file.writable):
            file = self._open_file(node, write=write)
            node.file = file
        file.users += 1
        return file

    def _open_file(self, node: Node, *, write: bool) -> OpenFile:
        assert node.place is not None
        waits = not node.place.layer.memory
        if node.held >= 0:
            return open_held(node.held, write=write, waits=waits)
        dir_fd = self.gate.fd(node.place)
        self._refuse_metacopy(node, dir_fd)
        return open_backing(dir_fd, node.name, write=write, waits=waits)

    def _refuse_metacopy(self, node: Node, dir_fd: int) -> None:
        """A file with only its metadata in this layer cannot be read as a whole: better EPERM than zeros."""
        assert node.parent is not None
        if len(node.parent.parts) <= 1:
            return
        try:
            os.getxattr(b"/proc/self/fd/%d/%b" % (dir_fd, node.name), self.markers.metacopy,
                        follow_symlinks=False)  # fmt: skip
        except OSError:
            return
        raise PermissionError(errno.EPERM, "a metacopy file needs kernel overlayfs")

    def close_file(self, node: Node, file: OpenFile) -> None:
        """Undo one :meth:`open_file`."""
        if node.file is file and file.users == 1:
            node.file = None
        file.release()

    def require_upper(self) -> Layer:
        """The upper layer. Raises EROFS when there is none."""
        if self.stack.upper is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return self.stack.upper

    def close(self) -> None:
        """Close every fd that the tree opened (the layers' own stay)."""
        self.gate.close()
