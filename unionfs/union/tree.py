"""The tree of a union: its nodes, their attributes, and where a node's object really is."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from unionfs.sys.creds import Identity
from unionfs.union import bound
from unionfs.union.attributes import Attributes
from unionfs.union.layers import LayerStack
from unionfs.union.listing import Listing
from unionfs.union.merge import Merge
from unionfs.union.nodes import UNSEEN, Node, NodeTable
from unionfs.union.openfiles import OpenFiles
from unionfs.union.places import Layer
from unionfs.union.shortcuts import Capabilities, Shortcuts
from unionfs.union.work import Work

NAME_MAX: Final = 255
_ALL_SHORTCUTS: Final = Shortcuts()
_PATH: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Union:
    """The merged tree of a layer stack. Not thread-safe: one thread calls it."""

    def __init__(
        self, stack: LayerStack, *, directory_fds: int = 1024, shortcuts: Shortcuts = _ALL_SHORTCUTS
    ) -> None:
        self.stack = stack
        self.markers = stack.markers
        self.merge = Merge(stack.layers, stack.markers, directory_fds=directory_fds)
        self.gate = self.merge.gate
        self.nodes = NodeTable(self.merge.roots, self._gone)
        self.work = Work(stack.work_fd)
        self.identity = Identity(stack.work_fd)
        self.shortcuts = shortcuts
        self.capabilities = Capabilities(shortcuts)
        self.files = OpenFiles(self.gate, self.markers, self.capabilities, shortcuts)
        #: Nodes whose attributes changed by being copied up, which nobody asked to change them: whoever
        #: serves the union tells the kernel, and empties the list.
        self.stale: list[Node] = []
        #: Directories whose size may be another one since something in them was copied up. That may be told
        #: a little later: who is told asks again, and copy-ups come in large numbers.
        self.resized: set[Node] = set()

    # -- finding --------------------------------------------------------------------------------------

    def lookup(self, parent: Node, name: bytes, first: int = 0) -> tuple[Node, Attributes] | None:
        """The node called ``name`` in ``parent`` with its attributes; ``None`` when there is none.

        ``first``: the topmost of the parent's parts that may have the name, for who knows.
        """
        if len(name) > NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        known = self.nodes.child(parent, name)
        if parent.identity is not None:
            return bound.lookup(self, parent, name, known)
        if known is not None:
            try:
                return known, self.attributes(known)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
            self.nodes.lose(known, parent, name)  # another object has the name now
        found = self.merge.search(parent.parts, name, first)
        if found is None:
            return None
        node = self.nodes.add(parent, name, *found)
        return node, self.attributes_of(node, found[0])

    def number(self, parent: Node, name: bytes) -> tuple[int, int] | None:
        """``st_ino`` and file type (S_IFMT bits) of what has that name, without a node for it."""
        known = self.nodes.child(parent, name)
        if parent.identity is not None and not (known is not None and known.is_mountpoint):
            st = bound.stat_name(self, parent, name)
            if st is None:
                return None
            return self.nodes.number(parent, name, st, parent.parts[0]), stat.S_IFMT(st.st_mode)
        if known is not None:
            return known.ino, known.kind
        found = self.merge.search(parent.parts, name)
        if found is None:
            return None
        st, places = found
        kind = stat.S_IFMT(st.st_mode)
        if kind == stat.S_IFDIR:
            self.merge.forget(places)  # no node stands for them
        return self.nodes.number(parent, name, st, places[0]), kind

    def number_of_unreachable(self, parent: Node, name: bytes) -> tuple[int, int] | None:
        """What a listing shows of a name whose lookup fails: a number, and the file type (0: not known).

        None when it is gone by now. As overlayfs (readdir.c, ovl_cache_update), which lists all names.
        """
        for part in parent.parts:
            try:
                st = os.stat(name, dir_fd=self.gate.fd(part), follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError:
                return self.nodes.unreachable(parent, name), 0
            return self.nodes.unreachable(parent, name), stat.S_IFMT(st.st_mode)
        return None

    def number_of_bare_whiteout(self, parent: Node, name: bytes) -> tuple[int, int] | None:
        """As :meth:`number_of_unreachable`, of a name that has no object but that overlayfs lists."""
        if parent.identity is None and self.merge.lists_bare_whiteout(parent.parts, name):
            return self.nodes.unreachable(parent, name), stat.S_IFREG
        return None

    def _gone(self, node: Node) -> None:
        self.files.gone(node)
        self.merge.forget(node.parts)

    def listing(self, node: Node) -> Listing:
        """The names of a directory. Raises ``OSError``."""
        parts = () if node.unlinked else node.parts
        return self.merge.listing(parts) if node.identity is None else Listing(self.gate, parts)

    def is_empty(self, node: Node) -> bool:
        """Whether a directory has no visible name."""
        return not self.listing(node).names()

    def is_visible_below(self, parent: Node, name: bytes) -> bool:
        """Whether a lower has ``name`` in ``parent``, so that removing it from the upper takes a whiteout."""
        return parent.identity is None and self.merge.is_visible_below(parent.parts, name)

    # -- attributes -----------------------------------------------------------------------------------

    def attributes(self, node: Node) -> Attributes:
        """stat(2) of a node."""
        return self.attributes_of(node, self.stat(node))

    def stat(self, node: Node) -> os.stat_result:
        """The attributes of the real object. Raises ESTALE when another one has its name by now."""
        if node.held >= 0:
            return os.stat(node.held)
        if node.is_dir:
            return os.stat(self.gate.fd(node.parts[0]))
        assert node.place is not None
        st = os.stat(node.name, dir_fd=self.gate.fd(node.place), follow_symlinks=False)
        node.check(st)
        return st

    def attributes_of(self, node: Node, st: os.stat_result) -> Attributes:
        """What stat(2) says of a node whose object has the attributes ``st``."""
        nlink = st.st_nlink
        if node.unlinked and (node.is_dir or not node.is_upper):
            nlink = 0
        elif len(node.parts) > 1:
            nlink = 1  # as overlayfs: counting the subdirectories of a merged directory is not worth it
        # copying up one name of a lower file with several breaks the link: its count is 1 from then on
        # and what is bound may be changed by everybody on the host
        lasting = (st.st_nlink == 1 or node.is_dir or node.is_upper) and node.identity is None
        ctime = st.st_ctime_ns
        if node.ctime is not None:
            given, shown = node.ctime
            if given == UNSEEN:
                node.ctime = ctime, shown
            if given in (UNSEEN, ctime):
                ctime = shown
        return Attributes(node.ino, nlink, st, ctime, lasting=lasting)

    # -- where a node's object is ---------------------------------------------------------------------

    def path(self, node: Node) -> tuple[bytes, bool]:
        """A path of /proc/self/fd for calls without an ``at`` form, and whether to follow its last link."""
        if node.held >= 0:
            return b"/proc/self/fd/%d" % node.held, True
        if node.is_dir:
            return b"/proc/self/fd/%d" % self.gate.fd(node.parts[0]), True
        assert node.place is not None
        return b"/proc/self/fd/%d/%b" % (self.gate.fd(node.place), node.name), False

    def path_fd(self, node: Node) -> tuple[int, bool]:
        """An O_PATH fd of the node's object, to be used at once, and whether it is the caller's to close."""
        if node.held >= 0:
            return node.held, False
        if node.is_dir:
            return self.gate.fd(node.parts[0]), False
        assert node.place is not None
        fd = os.open(node.name, _PATH, dir_fd=self.gate.fd(node.place))
        try:
            node.check(os.fstat(fd))
        except OSError:
            os.close(fd)
            raise
        return fd, True

    @contextmanager
    def checked_path(self, node: Node) -> Iterator[bytes]:
        """A path of the node's object within the block, for calls that follow its last link."""
        fd, opened = self.path_fd(node)
        try:
            yield b"/proc/self/fd/%d" % fd
        finally:
            if opened:
                os.close(fd)

    def open_path(self, node: Node) -> int:
        """A new O_PATH fd of the node's object; the caller closes it."""
        fd, opened = self.path_fd(node)
        return fd if opened else os.dup(fd)

    @contextmanager
    def outliving(self, node: Node) -> Iterator[None]:
        """When the last known name of ``node`` goes within the block, an fd of its object is kept.

        Not before the block succeeded: an object that still has its name is reached by the name.
        """
        fd = self.open_path(node)
        try:
            yield
            if node.unlinked and node.held < 0:
                node.held, fd = fd, -1
                if node.is_upper and not node.is_dir and node.identity is None:
                    st = os.stat(node.held)
                    if st.st_nlink > self.require_upper().links_of_removed:
                        # it has names that nobody looked up yet
                        self.nodes.linked(node, st)
        finally:
            if fd >= 0:
                os.close(fd)

    def readlink(self, node: Node) -> bytes:
        """The target of a symlink."""
        if node.held >= 0:
            return os.readlink(b"", dir_fd=node.held)
        assert node.place is not None
        return os.readlink(node.name, dir_fd=self.gate.fd(node.place))

    def refuse_metacopy(self, node: Node) -> None:
        """Raises EPERM for a file whose data is in another layer."""
        if node.identity is None:
            path, follow = self.path(node)
            self.markers.refuse_metacopy(path, follow=follow)

    def require_upper(self) -> Layer:
        """The upper layer. Raises EROFS when there is none."""
        if self.stack.upper is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return self.stack.upper

    def require_writable(self, node: Node) -> None:
        """Raises EROFS when nothing of the node can be changed: no upper, or read-only storage."""
        layer = node.bound
        if layer is None:
            self.require_upper()
        elif layer.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def stored_name(self, node: Node, name: bytes) -> bytes:
        """The name on disk of the xattr that the user calls ``name``."""
        return name if node.identity is not None else self.markers.stored_name(name)

    def shown_names(self, node: Node, stored: list[bytes]) -> list[bytes]:
        """What the user sees of the names of xattrs kept on disk."""
        return stored if node.identity is not None else self.markers.shown_names(stored)

    def close(self) -> None:
        """Close every fd that the tree opened (the layers' own stay)."""
        self.merge.close()
