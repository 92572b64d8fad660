"""Copy-up: the first change to an object of a lower moves it into the upper.

With `metacopy` a change of metadata moves only the metadata of a regular file; the data follows with the
first write. The copy of a regular file is a `filecopy.FileCopy`.

A copy is prepared in the work directory and appears by one rename, so a crash or a full disk leaves no trace.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Final, NamedTuple

from unionfs.core import layercalls
from unionfs.core.copyup import entered, enters
from unionfs.core.node import Node
from unionfs.core.nodes import Stored
from unionfs.core.places import Place
from unionfs.sys import attributes
from unionfs.sys.fds import Owned
from unionfs.union.tree import Union
from unionfs.union.work import Temporary
from unionfs.union.xattrs import copied_xattrs

_PATH: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Effects(NamedTuple):
    """Side effects of a copy-up: cached attributes that the kernel must request again."""

    node: Node | None
    """The copied object: its ctime has changed. None: the answer contains its attributes."""
    resized: Node | None = None
    """Its directory, if its size may have changed for the kernel. This can wait: copy-ups come in bulk, and
    each notice costs another GETATTR."""
    listing: Node | None = None
    """The directory that lists it, if the copy has another number."""


Tell = Callable[[Effects], None]


def _unless_owner(name: bytes, error: OSError) -> None:
    """As `unsupported`, but keeps an owner that cannot be set."""
    if name != attributes.OWNER or error.errno not in (errno.EPERM, errno.EINVAL):
        attributes.unsupported(name, error)


class CopyUp:
    """Copies up objects of one union; calls ``tell`` with the effects of each as soon as it appears."""

    def __init__(self, union: Union, tell: Tell = lambda effects: None) -> None:
        self.union = union
        self.tell = tell

    def unreadable(self, node: Node, refused: PermissionError) -> None:
        """Copy up a regular file that this process may not read, which was `refused`, if it is empty.

        Overlayfs does not open an empty file either (copy_up.c, ovl_copy_up_tmpfile). Raises ``OSError``.
        """
        with Owned(self.union.open_path(node)) as source:
            st = os.fstat(source)
        is_plain = node.lower_data is None and node.entry is None and st.st_nlink == 1
        if not stat.S_ISREG(st.st_mode) or st.st_size or not is_plain:
            raise refused
        self.special(node)

    def special(self, node: Node) -> None:
        """Copy up a symlink, fifo, socket or device, which have metadata only, or an empty file."""
        union = self.union
        union.require_upper()
        work = union.work.fd
        with Owned(union.open_path(node)) as source, union.work.temporary() as temporary:
            st, name = layercalls.call(os.fstat, source), temporary.name
            if stat.S_ISLNK(st.st_mode):
                os.symlink(layercalls.call(os.readlink, b"", dir_fd=source), name, dir_fd=work)
            else:
                os.mknod(name, stat.S_IFMT(st.st_mode) | 0o600, st.st_rdev, dir_fd=work)
            self._copy_attributes(node, source, st, work, name)
            path = b"/proc/self/fd/%d/%b" % temporary.at
            origin = union.origins.store(node, source, st, path, follow=False)
            with Owned(os.open(name, _PATH, dir_fd=work)) as target:
                self.put(node, temporary, target, origin)
            self.link_up_known(node)

    def directory(self, node: Node) -> Place:
        """The upper's directory of a directory node; copies up the directory and its parents if necessary."""
        self.union.require_upper()
        if node.unlinked:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        missing: list[Node] = []
        while not node.in_place:
            missing.append(node)
            assert node.parent is not None, "the upper's root is part of the merged root"
            node = node.parent
        for node in reversed(missing):
            self._directory(node)
        return node.parts[0]

    def _directory(self, node: Node) -> None:
        assert node.parent is not None
        union = self.union
        lower = union.gate.fd(node.parts[0])
        st = layercalls.call(os.stat, lower)
        shown = node.attributes_of(st).ctime_ns
        with union.work.temporary() as temporary:
            with Owned(temporary.mkdir()) as copy:
                origin = union.origins.store(node, lower, st, copy)
                union.flags.copy_directory(node, copy)
                self._copy_attributes(node, lower, st, copy)
            parent = node.parent.parts[0]
            resized = self.appears(node.parent, lambda fd: temporary.put(fd, node.name))
        place = Place(parent.layer, parent, node.name)
        place.copied_up(empty=union.shortcuts.empty_places)
        try:
            st = os.stat(union.gate.fd(place))
        except OSError:
            union.gate.forget(place)
            os.rmdir(node.name, dir_fd=union.gate.fd(parent))
            raise
        node.parts.insert(0, place)
        place.stands_for(st)
        node.show_ctime(shown, st.st_ctime_ns)
        union.nodes.copied_up(node, st, origin)
        self.tell(Effects(node, resized))

    def _copy_attributes(
        self, node: Node, source: int, st: os.stat_result, at: int, name: bytes | None = None
    ) -> None:
        """Copy the attributes of ``source`` (O_PATH) to ``name`` in ``at``, by default to the fd ``at``."""
        union, owners = self.union, self.union.stack.owners
        xattrs = copied_xattrs(union.markers, union.gate.rights, source, path_only=True)
        permissions = union.require_upper().permissions
        if permissions is not None:
            shown, kind = union.shown(node, st, source), stat.S_IFMT(st.st_mode)
            new = permissions.of_copy(shown, kind, xattrs, node.layer.permissions, union.markers)
            special = kind not in (stat.S_IFREG, stat.S_IFDIR)
            failed = _unless_owner if special else attributes.unsupported
            attributes.write(at, name, new, failed, owner=special)
            return
        if owners is not None:
            st, xattrs = owners.copied(st, xattrs, node.layer)
        owner = not union.identity.owns(st)
        if owner and owners is not None and owners.squashes:
            with Owned(os.dup(at) if name is None else os.open(name, _PATH, dir_fd=at)) as fd:
                st, owner = owners.give(fd, st), False
        try:
            attributes.write(at, name, attributes.attributes(st, xattrs), attributes.unsupported, owner=owner)
        except PermissionError:
            if owner:
                union.owner_refused(node, st)
            raise

    def put(self, node: Node, temporary: Temporary, fd: int, origin: Stored) -> os.stat_result:
        """Put the copy of a node (``fd``: an fd of the copy) into the upper. Returns its attributes.

        If the node's name was removed, the copy has no name either; only an fd of it is held. One in the
        index has no name before :meth:`link_up_known`. Raises ``OSError``; then nothing is left.
        """
        union, resized = self.union, None
        if origin is Stored.INDEXED:
            assert union.index is not None
            st = os.fstat(fd)  # before its entry, which would have to be removed after an error
            union.index.put(node, temporary)
        elif node.unlinked:
            upper = union.require_upper()
            st = os.fstat(fd)
            held = os.open(temporary.name, _PATH, dir_fd=union.work.fd)
            temporary.discard()
            node.hold(held)
            node.lies_in(Place(upper, upper.root, b""))
        else:
            assert node.parent is not None
            place = node.parent.parts[0] if node.parent.in_place else self.directory(node.parent)
            resized = self.appears(node.parent, lambda fd: temporary.put(fd, node.name))
            if origin is Stored.READABLE and not place.impure:
                origin = Stored.UNKNOWN
            try:
                st = os.fstat(fd)
            except OSError:
                os.unlink(node.name, dir_fd=union.gate.fd(place))
                raise
            node.lies_in(place)
        union.nodes.copied_up(node, st, origin)
        self.tell(Effects(node, resized, node.parent if origin is Stored.BROKEN else None))
        return st

    def link_up_known(self, node: Node) -> None:
        """Make all known names of a copy in the index, which is to be changed, names in the upper.

        The kernel links the name by which a file is changed (copy_up.c, ovl_link_up). FUSE does not say which
        one that is; but it is a known one. One name in the upper suffices; OSError is raised without any.
        """
        if not node.lacks_names:
            return
        error: OSError | None = None
        linked = False
        for parent, name in node.names():
            try:
                self.tell(Effects(node, self._link_up(node, parent, name)))
                linked = True
            except OSError as caught:
                error = caught
        if error is not None and not linked:
            raise error

    def link_up(self, node: Node, parent: Node, name: bytes) -> None:
        """Make a name of a copy in the index, which only a lower has, a name in the upper."""
        if node.is_indexed:
            self.tell(Effects(node, self._link_up(node, parent, name)))

    def _link_up(self, node: Node, parent: Node, name: bytes) -> Node | None:
        """Returns the directory if its size may have changed for the kernel."""
        index, dir_fd = self.union.index, self.union.gate.fd(self.directory(parent))
        assert index is not None
        try:
            os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            return self.appears(parent, lambda fd: index.link(node, fd, name))
        return None

    def appears(self, directory: Node, put: Callable[[int], None]) -> Node | None:
        """Put a copy into a directory of the upper (an fd of it), restoring its mtime and the ctime shown for
        it: a copy-up is not a change. Returns the directory if its size may have changed for the kernel."""
        resized = enters(self.union.nodes, directory)
        try:
            put(self.union.gate.fd(directory.parts[0]))
        finally:
            entered(self.union.nodes, directory)
        return resized
