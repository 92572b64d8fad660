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
from contextlib import contextmanager
from functools import partial
from typing import Final

from unionfs.sys.creds import Identity
from unionfs.union import bound
from unionfs.union.files import OpenFile, UnreadFile, open_backing, open_held
from unionfs.union.layers import Layer, LayerStack
from unionfs.union.listing import hides_xattr_whiteouts
from unionfs.union.lowernames import MANY, LowerNames
from unionfs.union.markers import Markers
from unionfs.union.merging import Merging
from unionfs.union.nodes import UNSEEN, Node, NodeTable
from unionfs.union.places import Gate, Place
from unionfs.union.work import Work
from unionfs.union.xattrs import CAPABILITY

NAME_MAX: Final = 255
#: A filesystem of a layer may have shorter names than others; as namei.c, ovl_lookup_single.
_NOT_THERE: Final = (errno.ENOENT, errno.ENAMETOOLONG)
_CAPABILITY: Final = os.fsdecode(CAPABILITY)
_PATH: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Attributes:
    """What stat(2) says of a node: the object's own, but number, link count and ctime of the merged tree."""

    __slots__ = ("ctime_ns", "ino", "lasting", "nlink", "st")

    def __init__(
        self, ino: int, nlink: int, st: os.stat_result, ctime_ns: int, *, lasting: bool = True
    ) -> None:
        self.ino = ino
        self.nlink = nlink
        self.st = st
        self.ctime_ns = ctime_ns
        #: Whether they stay true until the daemon is asked to change them.
        self.lasting = lasting


class Union:
    """The merged tree of a layer stack. Not thread-safe: one thread calls it."""

    def __init__(self, stack: LayerStack, *, directory_fds: int = 1024) -> None:
        self.stack = stack
        self.markers = Markers(stack.xattr_prefix)
        self.gate = Gate(directory_fds)
        self.work = Work(stack.work_fd)
        self._lower_names = LowerNames(self.gate)
        #: All roots are merged: overlayfs heeds no `opaque` on them (super.c, ovl_get_root).
        self.nodes = NodeTable([layer.root for layer in stack.layers])
        self.identity = Identity(stack.work_fd)
        self._metacopy = os.fsdecode(self.markers.metacopy)
        self._merging = Merging(stack, self.markers, self.gate)
        #: Backing files to be closed, for which nobody need wait. None: they are closed at once. A session
        #: that sets it to a list closes what is in it as soon as it has sent an answer.
        self.to_close: list[tuple[Node, OpenFile]] | None = None

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
        found = self._search(parent, name, first)
        if found is None:
            return None
        st, where = found
        node = self.nodes.add(parent, name, st, where)
        return node, self.attributes_of(node, st)

    def number(self, parent: Node, name: bytes) -> tuple[int, int] | None:
        """``st_ino`` and file type (S_IFMT bits) of what has that name, without a node for it."""
        known = self.nodes.child(parent, name)
        if parent.identity is not None and not (known is not None and known.is_mountpoint):
            st = bound.stat_name(self, parent, name)
            if st is None:
                return None
            return self.nodes.number(parent, name, st, parent.parts), stat.S_IFMT(st.st_mode)
        if known is not None:
            return known.ino, known.kind
        found = self._search(parent, name)
        if found is None:
            return None
        st, where = found
        if isinstance(where, list):
            self.forget_places(where)
        return self.nodes.number(parent, name, st, where), stat.S_IFMT(st.st_mode)

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
        """What a listing shows of a name that has no object but an xattr whiteout in a place without `x`.

        A lookup of it finds nothing, but on overlayfs it is in listings; see `listing.hides_xattr_whiteouts`.
        """
        if parent.identity is not None:
            return None
        for part in parent.parts:
            fd = self.gate.fd(part)
            try:
                st = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError:
                return None
            if stat.S_ISREG(st.st_mode) and not hides_xattr_whiteouts(self, parent, part, fd):
                return self.nodes.unreachable(parent, name), stat.S_IFREG
            return None
        return None

    def forget_places(self, places: list[Place]) -> None:
        """Close the fds of real directories that no node stands for."""
        for place in places:
            self.gate.forget(place)

    def _search(
        self, parent: Node, name: bytes, first: int = 0
    ) -> tuple[os.stat_result, list[Place] | Place] | None:
        """What the layers hold under ``name``, from part ``first`` of the parent on: attributes, and the
        parts or the place."""
        parts = parent.parts
        if len(parts) >= MANY:
            parts, first = self._lower_names.parts(parts, name), 0
        elif first == 0 and parts[0].empty:
            first = 1
        for index in range(first, len(parts)):
            part = parts[index]
            dir_fd = self.gate.fd(part)
            try:
                st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            except OSError as error:
                if error.errno in _NOT_THERE:
                    continue
                raise
            kind = stat.S_IFMT(st.st_mode)
            if kind == stat.S_IFDIR:
                return st, self._merging.parts(parent.parts, part, name, st, parts[index + 1 :])
            # Most names are of what can be no marker.
            if (kind == stat.S_IFREG and st.st_size) or kind == stat.S_IFLNK:
                return st, part
            return None if self.markers.is_whiteout(st, dir_fd, name) else (st, part)
        return None

    def is_visible_below(self, parent: Node, name: bytes) -> bool:
        """Whether a lower has ``name`` in ``parent``, so that removing it from the upper takes a whiteout."""
        for part in self._lower_names.parts(parent.parts, name):
            if part.layer.is_upper:
                continue
            dir_fd = self.gate.fd(part)
            try:
                st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            except OSError as error:
                if error.errno in _NOT_THERE:
                    continue
                raise
            return not self.markers.is_whiteout(st, dir_fd, name)
        return False

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
        _check(node, st)
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
            _check(node, os.fstat(fd))
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

    def open_file(self, node: Node, *, write: bool) -> OpenFile:
        """The node's backing file with one user more. It must be in the upper when ``write``."""
        file = node.file
        # No user: it was closed by work in a thread that went on longer than the last open.
        if file is None or not file.users or not file.readable or (write and not file.writable):
            file = self._open_file(node, write=write)
            node.file = file
        file.users += 1
        return file

    def open_unread(self, node: Node) -> OpenFile:
        """As :meth:`open_file`, to read a lower's file of which nothing may have to be read: the kernel was
        given its data before."""
        file = node.file
        if file is None or not file.users or not file.readable:
            assert node.place is not None
            waits = not node.place.layer.memory
            file = node.file = UnreadFile(partial(self._open_file, node, write=False), waits=waits)
        file.users += 1
        return file

    def _open_file(self, node: Node, *, write: bool) -> OpenFile:
        assert node.place is not None
        if write and not node.is_upper:
            raise OSError(errno.EROFS, "a lower is never written")
        waits = not node.place.layer.memory
        if write and node.place.layer.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if node.held >= 0:
            file = open_held(node.held, write=write, waits=waits)
        else:
            file = open_backing(self.gate.fd(node.place), node.name, write=write, waits=waits)
            try:
                _check(node, file.st)
            except OSError:
                os.close(file.fd)
                raise
        if node.identity is not None:
            return file
        try:
            file.xattrs = os.listxattr(file.fd)
            metacopy = self._metacopy in file.xattrs
            node.no_capability = _CAPABILITY not in file.xattrs
        except OSError:  # too many to be listed, say
            metacopy = self._is_metacopy(file.fd)
        if metacopy:
            os.close(file.fd)
            raise _metacopy()
        return file

    def _is_metacopy(self, where: bytes | int, *, follow: bool = True) -> bool:
        try:
            os.getxattr(where, self._metacopy, follow_symlinks=follow)
        except OSError:
            return False
        return True

    def refuse_metacopy(self, node: Node) -> None:
        """A regular file with only its metadata in this layer: better EPERM than zeros for its data."""
        if node.identity is not None:
            return
        path, follow = self.path(node)
        if self._is_metacopy(path, follow=follow):
            raise _metacopy()

    def close_file(self, node: Node, file: OpenFile) -> None:
        """Undo one :meth:`open_file`."""
        if node.file is file and file.users == 1:
            node.file = None
        file.release()

    def close_later(self, node: Node, file: OpenFile) -> None:
        """As :meth:`close_file`, after the answer to the request if the session does so."""
        if self.to_close is None:
            self.close_file(node, file)
        else:
            self.to_close.append((node, file))

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
        self.gate.close()


def _check(node: Node, st: os.stat_result | None) -> None:
    """Raise ESTALE for an object that is not the node's, so that the kernel looks the name up again."""
    if node.key and st is not None:
        place = node.place
        assert place is not None
        if place.layer.key(st) != node.key:
            raise OSError(errno.ESTALE, "a layer holds another object there")


def _metacopy() -> PermissionError:
    return PermissionError(errno.EPERM, "a metacopy file needs kernel overlayfs")
