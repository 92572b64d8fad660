"""Copy-up: the first change to an object of a lower moves it into the upper.

Everything is prepared in the work directory and appears by one rename, so that a crash or a full disk leaves
no trace. A regular file's data is copied by :meth:`FileCopy.copy`, which may
run in any thread and touches only its own fds; begin and finish belong to the thread of the union.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from unionfs.sys import calls
from unionfs.union import bound
from unionfs.union.filedata import clone, copy_data
from unionfs.union.files import OpenFile
from unionfs.union.nodes import UNSEEN, Node
from unionfs.union.places import Place
from unionfs.union.tree import Union
from unionfs.union.work import Temporary
from unionfs.union.xattrs import CAPABILITY, copy_xattrs

#: A file up to this size (bytes) is copied at once when nothing has to reach a disk, and its holes are looked
#: for only if it has some.
SMALL: Final = 256 * 1024
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class FileCopy:
    """The copy-up of one regular file."""

    def __init__(self, union: Union, node: Node, limit: int | None, mode: int | None = None) -> None:
        """Open the source and make the temporary file.

        ``limit``: copy only so many bytes (truncation). ``mode``: the permission bits that it is to have
        instead of the source's.
        """
        union.require_upper()
        self._union = union
        self.node = node
        self._temporary = union.work.temporary()
        self._target = -1
        self._no_capability = False
        self._source = union.files.lend(node, write=False)
        self._open = True
        try:
            # one user: it was opened just now, and has not been read since, which changes the time of access
            known = self._source.st if self._source.users == 1 else None
            self._st = known or os.fstat(self._source.fd)
            self.size = self._st.st_size if limit is None else min(limit, self._st.st_size)
            self._mode = stat.S_IMODE(self._st.st_mode if mode is None else mode)
            self._is_plain = self._source.xattrs == [] and self._mode & ~union.identity.sets == 0
            self._target = os.open(
                self._temporary.name, _NEW, self._mode if self._is_plain else 0o600, dir_fd=union.work.fd
            )
        except BaseException:
            self.abort()
            raise

    @property
    def is_quick(self) -> bool:
        """Whether :meth:`copy` is short enough to run between two requests."""
        return self.size <= SMALL and not self._union.stack.durable

    def copy(self, goes_on: Callable[[], None] = lambda: None) -> None:
        """Copy data and metadata, and wait for the disk. Raises ``OSError``.

        ``goes_on`` is called now and then, and ends the copying by what it raises.
        """
        if self.size:
            dense = self.size <= SMALL and self._st.st_blocks * 512 >= self._st.st_size
            source, never = self._source.fd, self._union.stack.never_clones
            if self.size < self._st.st_size or not clone(source, self._target, self._st.st_dev, never):
                copy_data(source, self._target, self.size, goes_on, dense=dense)
        goes_on()
        self._copy_metadata()
        if self._union.stack.durable:
            os.fsync(self._target)

    def _copy_metadata(self) -> None:
        """Owner, xattrs, mode, times: in the order in which none undoes another."""
        st, target = self._st, self._target
        if not self._union.identity.owns(st):
            os.fchown(target, st.st_uid, st.st_gid)
        if self._is_plain:
            self._no_capability = True
        else:
            names = copy_xattrs(self._union.markers, (self._source.fd, True), (target, True))
            self._no_capability = CAPABILITY not in names
            os.fchmod(target, self._mode)
        os.utime(target, ns=(st.st_atime_ns, st.st_mtime_ns))

    def finish(self, *, keep: bool = False) -> OpenFile | None:
        """Let the copy appear in the upper, and give it to all who have the file open.

        ``keep``: and to the caller, who becomes one more user of the open file. It has its attributes.
        """
        union, node = self._union, self.node
        try:
            _appear(union, node, self._temporary)
            st = os.fstat(self._target)
            _copied_up(union, node, st)
            if self._no_capability:
                union.capabilities.none(node)
            else:
                union.capabilities.changed(node)
            return self._hand_over(st, keep=keep)
        finally:
            self.abort()

    def _hand_over(self, st: os.stat_result, *, keep: bool) -> OpenFile | None:
        """Open handles, which only read, go on with the upper's file: they see what is written from now."""
        file = self._union.files.hand_over(self.node, self._target, st, lend=keep)
        if file is not None:
            self._target = -1
        return file if keep else None

    def abort(self) -> None:
        """Let go of everything; without :meth:`finish` nothing of the copy is left."""
        self._temporary.discard()
        if self._target >= 0:
            os.close(self._target)
            self._target = -1
        if self._open:
            self._open = False
            self._union.files.take_back_later(self.node, self._source)


def copy_up_special(union: Union, node: Node) -> None:
    """Copy up a symlink, fifo, socket or device, of which there is only metadata."""
    union.require_upper()
    work = union.work.fd
    with ExitStack() as fds:
        source = union.open_path(node)
        fds.callback(os.close, source)
        st = os.fstat(source)
        temporary = fds.enter_context(union.work.temporary())
        name = temporary.name
        if stat.S_ISLNK(st.st_mode):
            os.symlink(os.readlink(b"", dir_fd=source), name, dir_fd=work)
        else:
            os.mknod(name, stat.S_IFMT(st.st_mode) | 0o600, st.st_rdev, dir_fd=work)
        target = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=work)
        fds.callback(os.close, target)
        copy_xattrs(
            union.markers,
            (b"/proc/self/fd/%d" % source, True),
            (b"/proc/self/fd/%d/%b" % (work, name), False),
        )
        calls.chown_fd(target, st.st_uid, st.st_gid)
        if not stat.S_ISLNK(st.st_mode):
            os.chmod(b"/proc/self/fd/%d" % target, stat.S_IMODE(st.st_mode))
        calls.utimensat(work, name, st.st_atime_ns, st.st_mtime_ns)
        _appear(union, node, temporary)
        _copied_up(union, node, os.stat(target))


def ensure_upper(union: Union, node: Node) -> Place:
    """The upper's directory for a directory node, copied up with all above it when there is none yet."""
    if node.identity is not None:
        return bound.writable(node)
    upper = union.require_upper()
    if node.unlinked:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    missing: list[Node] = []
    current = node
    while not current.is_upper:
        missing.append(current)
        assert current.parent is not None, "the upper's root is part of the merged root"
        current = current.parent
    for directory in reversed(missing):
        _copy_up_directory(union, directory)
    place = node.parts[0]
    assert place.layer is upper
    return place


def _copy_up_directory(union: Union, node: Node) -> None:
    assert node.parent is not None
    work = union.work.fd
    lower = union.gate.fd(node.parts[0])
    st = os.stat(lower)
    shown = union.attributes_of(node, st).ctime_ns
    with union.work.temporary() as temporary:
        name = temporary.name
        os.mkdir(name, 0o700, dir_fd=work)
        path = b"/proc/self/fd/%d/%b" % (work, name)
        copy_xattrs(union.markers, (b"/proc/self/fd/%d" % lower, True), (path, False))
        if not union.identity.owns(st):
            os.chown(name, st.st_uid, st.st_gid, dir_fd=work, follow_symlinks=False)
        os.chmod(name, stat.S_IMODE(st.st_mode), dir_fd=work)
        os.utime(name, ns=(st.st_atime_ns, st.st_mtime_ns), dir_fd=work)
        parent = node.parent.parts[0]
        _put(union, temporary, node.parent, node.name)
    place = Place(parent.layer, parent, node.name)
    place.empty = True
    node.parts.insert(0, place)
    st = os.stat(union.gate.fd(place))
    place.key = place.layer.key(st)
    node.ctime = st.st_ctime_ns, shown
    _copied_up(union, node, st)


def _copied_up(union: Union, node: Node, st: os.stat_result) -> None:
    """Note the number that the copy carries, and that its ctime is new."""
    union.nodes.copied_up(node, st)
    union.stale.append(node)


def _appear(union: Union, node: Node, temporary: Temporary) -> None:
    """Give the copy of a node its name, or take its name away when the node has none any more."""
    if node.unlinked:
        _keep_unnamed(union, node, temporary)
        return
    assert node.parent is not None
    place = ensure_upper(union, node.parent)
    _put(union, temporary, node.parent, node.name)
    node.place = place


def _keep_unnamed(union: Union, node: Node, temporary: Temporary) -> None:
    """Keep only an fd of the copy."""
    fd = os.open(temporary.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=union.work.fd)
    temporary.discard()
    if node.held >= 0:
        os.close(node.held)
    node.held = fd
    upper = union.require_upper()
    node.place = Place(upper, upper.root, b"")


def _put(union: Union, temporary: Temporary, directory: Node, name: bytes) -> None:
    """Put a copy into the upper. A copy-up is no change, so the directory keeps its time. Its real ctime
    can't be kept, and is shown as it was; its size is another one, and is shown soon."""
    place = directory.parts[0]
    dir_fd = union.gate.fd(place)
    if directory.ctime is not None and directory.ctime[0] == UNSEEN:
        shown = directory.ctime[1]
    else:  # this is the first copy-up since somebody asked for its attributes, or it was changed
        union.resized.add(directory)
        st = os.stat(dir_fd)
        place.mtime_ns, shown = st.st_mtime_ns, union.attributes_of(directory, st).ctime_ns
    place.empty = False
    temporary.put(dir_fd, name)
    with contextlib.suppress(OSError):
        calls.utimensat(dir_fd, b".", None, place.mtime_ns)
    directory.ctime = UNSEEN, shown
