"""Copy-up: the first change to an object of a lower moves it into the upper.

With `metacopy` a change of metadata moves only the metadata of a regular file; the data follows with the
first write (:class:`DataCopy`).

A copy is prepared in the work directory and appears by one rename, so a crash or a full disk leaves no trace.
:meth:`FileCopy.copy` copies a regular file's data; it may run in any thread and uses only its own fds. All
other code runs in the union's thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from typing import Final, NamedTuple

from unionfs.sys import attributes, calls
from unionfs.sys.fds import Owned
from unionfs.union.filedata import clone, copy_data
from unionfs.union.files import OpenFile, open_backing, open_held
from unionfs.union.flags import read_flags
from unionfs.union.node import UNSEEN, Node
from unionfs.union.origin import Stored
from unionfs.union.places import LowerData, Place
from unionfs.union.setids import SET_IDS
from unionfs.union.tree import Union
from unionfs.union.work import Temporary
from unionfs.union.xattrs import CAPABILITY, copied_xattrs, unsupported

#: Up to this size (bytes) a file is copied at once if no sync is needed, and its holes are searched only if
#: it has some.
SMALL: Final = 256 * 1024
_PATH: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class Effects(NamedTuple):
    """Side effects of a copy-up: cached attributes that the kernel must request again."""

    node: Node
    """The copied object: its ctime has changed."""
    resized: Node | None = None
    """Its directory, if its size may have changed for the kernel. This can wait: copy-ups come in bulk, and
    each notice costs another GETATTR."""
    listing: Node | None = None
    """The directory that lists it, if the copy has another number."""


Tell = Callable[[Effects], None]


class CopyUp:
    """Copies up objects of one union; calls ``tell`` with the effects of each as soon as it appears."""

    def __init__(self, union: Union, tell: Tell = lambda effects: None) -> None:
        self.union = union
        self.tell = tell

    def special(self, node: Node) -> None:
        """Copy up a symlink, fifo, socket or device, which have metadata only."""
        union = self.union
        union.require_upper()
        work = union.work.fd
        with Owned(union.open_path(node)) as source, union.work.temporary() as temporary:
            st, name = os.fstat(source), temporary.name
            if stat.S_ISLNK(st.st_mode):
                os.symlink(os.readlink(b"", dir_fd=source), name, dir_fd=work)
            else:
                os.mknod(name, stat.S_IFMT(st.st_mode) | 0o600, st.st_rdev, dir_fd=work)
            self._copy_attributes(node, source, st, work, name)
            path = b"/proc/self/fd/%d/%b" % temporary.at
            origin = union.origins.store(node, source, st, path, follow=False)
            with Owned(os.open(name, _PATH, dir_fd=work)) as target:
                self.put(node, temporary, target, origin)

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
        st = os.stat(lower)
        shown = node.attributes_of(st).ctime_ns
        with union.work.temporary() as temporary:
            with Owned(temporary.mkdir()) as copy:
                origin = union.origins.store(node, lower, st, copy)
                union.flags.copy_directory(node, copy)
                self._copy_attributes(node, lower, st, copy)
            parent = node.parent.parts[0]
            resized = self._appears(node.parent, lambda fd: temporary.put(fd, node.name))
        place = Place(parent.layer, parent, node.name)
        place.copied_up(empty=union.shortcuts.empty_places)
        node.parts.insert(0, place)
        st = os.stat(union.gate.fd(place))
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
        if owners is not None:
            st, xattrs = owners.copied(st, xattrs, node.layer)
        owner = not union.identity.owns(st)
        if owner and owners is not None and owners.squashes:
            with Owned(os.dup(at) if name is None else os.open(name, _PATH, dir_fd=at)) as fd:
                st, owner = owners.give(fd, st), False
        attributes.write(at, name, attributes.attributes(st, xattrs), unsupported, owner=owner)

    def put(self, node: Node, temporary: Temporary, fd: int, origin: Stored) -> os.stat_result:
        """Put the copy of a node (``fd``: an fd of the copy) into the upper. Returns its attributes.

        If the node's name was removed, the copy has no name either; only an fd of it is held.
        """
        union, resized = self.union, None
        if origin is Stored.INDEXED:
            assert union.index is not None
            union.index.put(node, temporary)
            if not node.unlinked:
                assert node.parent is not None
                resized = self._link_up(node, node.parent, node.name)
        elif node.unlinked:
            upper = union.require_upper()
            held = os.open(temporary.name, _PATH, dir_fd=union.work.fd)
            temporary.discard()
            node.hold(held)
            node.lies_in(Place(upper, upper.root, b""))
        else:
            assert node.parent is not None
            place = node.parent.parts[0] if node.parent.in_place else self.directory(node.parent)
            resized = self._appears(node.parent, lambda fd: temporary.put(fd, node.name))
            node.lies_in(place)
            if origin is Stored.READABLE and not place.impure:
                origin = Stored.UNKNOWN
        st = os.fstat(fd)
        union.nodes.copied_up(node, st, origin)
        self.tell(Effects(node, resized, node.parent if origin is Stored.BROKEN else None))
        return st

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
            return self._appears(parent, lambda fd: index.link(node, fd, name))
        return None

    def _appears(self, directory: Node, put: Callable[[int], None]) -> Node | None:
        """Put a copy into a directory of the upper (an fd of it), restoring its mtime and the ctime shown for
        it: a copy-up is not a change. Returns the directory if its size may have changed for the kernel."""
        place, resized = directory.parts[0], None
        dir_fd = self.union.gate.fd(place)
        if directory.ctime is not None and directory.ctime[0] == UNSEEN:
            shown = directory.ctime[1]
        else:  # the first copy-up since its attributes were requested, or since a change
            resized = directory
            st = os.stat(dir_fd)
            place.keep_mtime(st.st_mtime_ns)
            shown = directory.attributes_of(st).ctime_ns
        place.fills()
        self.union.origins.becomes_impure(place, dir_fd)
        put(dir_fd)
        with contextlib.suppress(OSError):
            calls.utimensat(calls.AT_FDCWD, b"/proc/self/fd/%d" % dir_fd, None, place.mtime_ns, follow=True)
        directory.show_ctime(shown)
        return resized


class FileCopy:
    """The copy-up of one regular file. Leaving its context without :meth:`finish` discards the copy."""

    def __init__(
        self,
        copy_up: CopyUp,
        node: Node,
        limit: int | None = None,
        mode: int | None = None,
        *,
        data: bool = True,
    ) -> None:
        """Open the source and create the temporary file.

        ``limit``: copy only that many bytes (truncation). ``mode``: permission bits to set instead of the
        source's. ``data``: False for a metacopy file, unless it is empty.
        """
        union = copy_up.union
        union.require_upper()
        self._union = union
        self._copy_up = copy_up
        self.node = node
        self._temporary = union.work.temporary()
        self._target = self._metadata = -1
        self._no_capability = False
        self._origin = Stored.UNKNOWN
        self._source = union.files.lend(node, write=False)
        self._open = True
        try:
            if node.lower_data is not None:
                with Owned(union.open_path(node)) as path_fd:
                    self._metadata = union.gate.reopen(node.layer, path_fd, _READ)
                self._st = os.fstat(self._metadata)
            else:
                # with one user it was just opened and not read since, so its atime is unchanged
                known = self._source.st if self._source.users == 1 else None
                self._st = known or os.fstat(self._source.fd)
            #: See `flags`.
            self._flags = read_flags(self._source.fd if self._metadata < 0 else self._metadata)
            node.know_flags(self._flags)
            #: Where the data stays; None: it is copied.
            self._lower_data = None if data or not self._st.st_size else _data_of(node, self._st)
            self.size = self._st.st_size if limit is None else min(limit, self._st.st_size)
            if self._lower_data is not None:
                self.size = 0
            self._mode = stat.S_IMODE(self._st.st_mode if mode is None else mode)
            self._is_plain = self._source.xattrs == [] and self._mode & ~union.identity.sets == 0
            if union.markers.requires_write and not self._mode & stat.S_IWUSR:
                self._is_plain = False  # such a mode comes last
            self._target = os.open(
                self._temporary.name, _NEW, self._mode if self._is_plain else 0o600, dir_fd=union.work.fd
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> FileCopy:
        return self

    @property
    def is_quick(self) -> bool:
        """Whether :meth:`copy` is fast enough to run between two requests."""
        return self._lower_data is not None or (self.size <= SMALL and not self._union.stack.durable)

    def copy(self, goes_on: Callable[[], None] = lambda: None) -> None:
        """Copy data and metadata, and sync them. Raises ``OSError``.

        ``goes_on`` is called between pieces of data; an exception from it ends the copy.
        """
        if self.size:
            _copy(self._union, self._source.fd, self._st, self._target, self.size, goes_on)
        goes_on()
        of = self._source.fd if self._metadata < 0 else self._metadata
        self._origin = self._union.origins.store(self.node, of, self._st, self._target)
        self._union.flags.copy(self._flags, self._target)
        if self._lower_data is not None:
            self._leave_data()  # the xattr that goes last is the one to be removed
        self._copy_metadata()
        if self._union.stack.durable and self._lower_data is None:
            os.fsync(self._target)

    def _leave_data(self) -> None:
        """Make the copy metacopy, of the same size, with the digest that the source has for its data."""
        markers, digest = self._union.markers, b""
        if self._metadata >= 0:
            digest = markers.metacopy_value(self._metadata) or b""
        os.setxattr(self._target, markers.metacopy, digest)
        os.ftruncate(self._target, self._st.st_size)

    def _copy_metadata(self) -> None:
        st, target, union = self._st, self._target, self._union
        xattrs, mode, owners = None, self._mode, union.stack.owners
        of = self._source.fd if self._metadata < 0 else self._metadata
        if owners is not None:
            xattrs = copied_xattrs(union.markers, union.gate.rights, of)
            st, xattrs = owners.copied(st, xattrs, self.node.layer)
        owner = not union.identity.owns(st)
        if owner and owners is not None and owners.squashes:
            given, owner = owners.give(target, st), False
            mode &= ~(given.st_mode ^ st.st_mode)
        if self._is_plain:
            if owner:
                os.fchown(target, st.st_uid, st.st_gid)
            os.utime(target, ns=(st.st_atime_ns, st.st_mtime_ns))
            self._no_capability = True
            return
        if xattrs is None:
            xattrs = copied_xattrs(union.markers, union.gate.rights, of)
        new = attributes.attributes(st, xattrs)._replace(mode=mode)
        attributes.write(target, None, new, unsupported, owner=owner)
        self._no_capability = CAPABILITY not in xattrs

    def finish(self, *, keep: bool = False) -> OpenFile | None:
        """Put the copy into the upper and switch all opens of the file to it, unless it is metacopy.

        ``keep``: lend it to the caller too. Its ``st`` is up to date.
        """
        union, node = self._union, self.node
        st = self._copy_up.put(node, self._temporary, self._target, self._origin)
        if self._no_capability:
            union.capabilities.none(node)
        else:
            union.capabilities.changed(node)
        node.data_lies_in(self._lower_data)
        if self._lower_data is not None:
            return None
        file = union.files.hand_over(node, self._target, st, lend=keep)
        if file is not None:
            self._target = -1
        return file if keep else None

    def close(self, *exc: object) -> None:
        """Close all fds, and discard an unfinished copy."""
        if self._temporary.taken:
            self._temporary.discard()
        for fd in (self._target, self._metadata):
            if fd >= 0:
                os.close(fd)
        self._target = self._metadata = -1
        if self._open:
            self._open = False
            self._union.files.take_back_later(self.node, self._source)

    __exit__ = close


class DataCopy:
    """The data of one metacopy file in the upper follows, into the same object, which may have several names.

    Readers use the lower's until the xattr `metacopy` is removed, after all data was copied; so a crash in
    between changes nothing (copy_up.c, ovl_copy_up_meta_inode_data).
    """

    def __init__(self, copy_up: CopyUp, node: Node, limit: int | None = None) -> None:
        """Open both files. ``limit``: copy only that many bytes, and truncate the file to them."""
        assert node.place is not None
        self._union = union = copy_up.union
        self._copy_up = copy_up
        self.node = node
        self._target: OpenFile | None = None
        self._source = union.files.lend(node, write=False)
        self._open = True
        try:
            waits, rights = not node.place.layer.memory, union.gate.rights
            if node.held >= 0:
                self._target = open_held(node.held, write=True, waits=waits, rights=rights, upper=True)
            else:
                self._target = open_backing(
                    union.gate.fd(node.place), node.name, write=True, waits=waits, rights=rights, upper=True
                )
            self._st = os.fstat(self._target.fd)
            if node.held < 0:
                node.check(self._st)
            self.size = self._st.st_size if limit is None else min(limit, self._st.st_size)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> DataCopy:
        return self

    @property
    def is_quick(self) -> bool:
        """Whether :meth:`copy` is fast enough to run between two requests."""
        return self.size <= SMALL and not self._union.stack.durable

    def copy(self, goes_on: Callable[[], None] = lambda: None) -> None:
        """Copy the data, sync it, and make the file an ordinary one.

        Raises ``OSError``; then the file is as before. ``goes_on`` is called between pieces of data; an
        exception from it ends the copy.
        """
        assert self._target is not None
        fd, capability = self._target.fd, self._capability(self._target.fd)
        try:
            if self.size:
                _copy(self._union, self._source.fd, os.fstat(self._source.fd), fd, self.size, goes_on)
            goes_on()
            os.ftruncate(fd, self.size)
            if capability is not None:
                os.setxattr(fd, CAPABILITY, capability)
            if self._st.st_mode & SET_IDS:
                os.fchmod(fd, stat.S_IMODE(self._st.st_mode))
            os.utime(fd, ns=(self._st.st_atime_ns, self._st.st_mtime_ns))
            if self._union.stack.durable:
                os.fsync(fd)
            os.removexattr(fd, self._union.markers.metacopy)
        except BaseException:
            self._take_data_away(fd)
            raise

    def _capability(self, fd: int) -> bytes | None:
        """The capabilities, which writing removes."""
        try:
            return os.getxattr(fd, CAPABILITY)
        except OSError:
            return None

    def _take_data_away(self, fd: int) -> None:
        """Free the space of an incomplete copy, and restore size and times."""
        with contextlib.suppress(OSError):
            os.ftruncate(fd, self._st.st_size)
            calls.fallocate(fd, calls.PUNCH_HOLE | calls.KEEP_SIZE, 0, self._st.st_size)
        with contextlib.suppress(OSError):
            os.utime(fd, ns=(self._st.st_atime_ns, self._st.st_mtime_ns))

    def finish(self, *, keep: bool = False) -> OpenFile | None:
        """Switch all opens of the file to the upper's. ``keep``: lend it to the caller too."""
        assert self._target is not None
        union, node, fd = self._union, self.node, self._target.fd
        node.data_lies_in(None)
        node.changes()
        file = union.files.hand_over(node, fd, os.fstat(fd), lend=keep)
        if file is not None:
            self._target = None
        self._copy_up.tell(Effects(node))
        return file if keep else None

    def close(self, *exc: object) -> None:
        """Close all fds."""
        if self._target is not None:
            os.close(self._target.fd)
            self._target = None
        if self._open:
            self._open = False
            self._union.files.take_back_later(self.node, self._source)

    __exit__ = close


def _data_of(node: Node, st: os.stat_result) -> LowerData:
    """Where the data of a lower file lies; ``st``: its attributes."""
    assert node.place is not None
    return node.lower_data or LowerData(node.place, node.name, node.place.layer.key(st), st.st_blocks)


def _copy(
    union: Union, source: int, st: os.stat_result, target: int, size: int, goes_on: Callable[[], None]
) -> None:
    """Copy the first ``size`` bytes of a file with the attributes ``st``."""
    dense = size <= SMALL and st.st_blocks * 512 >= st.st_size
    if size != st.st_size or not clone(source, target, st.st_dev, union.stack.never_clones):
        copy_data(source, target, size, goes_on, dense=dense)
