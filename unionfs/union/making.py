"""New names: files, directories, symlinks, devices and hard links."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Final, TypeVar

from unionfs.union import bound
from unionfs.union.attributes import Attributes
from unionfs.union.changing import Changing, fail
from unionfs.union.nodes import Node
from unionfs.union.places import Place
from unionfs.union.work import rename

ACL_DEFAULT: Final = b"system.posix_acl_default"
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_T = TypeVar("_T")
_Make = Callable[[int, bytes, int], _T]
"""Makes something, from the fd of its directory, its name and its mode."""


class Caller:
    """Who asks for a change. ``umask``: what is still to be taken off a new object's mode, unless its
    directory has a default ACL; 0 when the kernel took it off already."""

    __slots__ = ("gid", "uid", "umask")

    def __init__(self, uid: int, gid: int, umask: int = 0) -> None:
        self.uid = uid
        self.gid = gid
        self.umask = umask


class Making(Changing):
    """Makes new names."""

    def create(self, parent: Node, name: bytes, mode: int, caller: Caller) -> tuple[Node, Attributes, int]:
        """A new regular file, and an fd of it (O_RDWR), which the caller owns."""
        fd = self._make(parent, name, mode, caller, _create)
        return (*self._new_node(parent, name, fd), fd)

    def tmpfile(self, parent: Node, mode: int, caller: Caller, flags: int) -> tuple[Node, Attributes, int]:
        """A new regular file without a name (O_TMPFILE), and an fd of it (O_RDWR), which the caller owns.

        With O_EXCL in ``flags`` it can never get one. Raises EOPNOTSUPP where the upper's filesystem can't.
        """
        union = self._union
        place = self._writable(parent)
        wanted = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC | flags & os.O_EXCL
        dir_fd = union.gate.fd(place)
        mode = self._masked(place, dir_fd, mode, caller)
        with union.identity.acting_as(caller.uid, caller.gid):
            fd = os.open(b".", wanted, mode, dir_fd=dir_fd)
        try:
            held = os.open(b"/proc/self/fd/%d" % fd, os.O_PATH | os.O_CLOEXEC)
            try:
                node = union.nodes.unnamed(parent, held)
            except BaseException:
                os.close(held)
                raise
            return node, union.attributes(node), fd
        except BaseException:
            os.close(fd)
            raise

    def mkdir(self, parent: Node, name: bytes, mode: int, caller: Caller) -> tuple[Node, Attributes]:
        """A new directory."""
        self._make(parent, name, mode, caller, _mkdir, directory=True)
        return self._new_node(parent, name)

    def symlink(self, parent: Node, name: bytes, target: bytes, caller: Caller) -> tuple[Node, Attributes]:
        """A new symlink."""
        self._make(parent, name, 0, caller, lambda fd, here, _: os.symlink(target, here, dir_fd=fd))
        return self._new_node(parent, name)

    def mknod(
        self, parent: Node, name: bytes, mode: int, rdev: int, caller: Caller
    ) -> tuple[Node, Attributes]:
        """A new fifo, socket, device or regular file. Character device 0/0 is a whiteout, so EPERM."""
        if stat.S_ISCHR(mode) and rdev == 0 and parent.identity is None:
            raise fail(errno.EPERM)
        self._make(parent, name, mode, caller, lambda fd, here, kept: os.mknod(here, kept, rdev, dir_fd=fd))
        return self._new_node(parent, name)

    def link(self, node: Node, parent: Node, name: bytes) -> tuple[Node, Attributes]:
        """Another name for a node that is in the upper already."""
        union = self._union
        if node.place is None:
            raise fail(errno.ENOENT)
        if not bound.same_storage(node, parent):
            raise fail(errno.EXDEV)
        if node.identity is not None:
            return bound.link(union, node, parent, name)
        union.refuse_metacopy(node)
        place = self._writable(parent)
        with self._directories(node.place, place) as (source, dir_fd):
            try:
                _link(node, source, dir_fd, name)
            except FileExistsError:
                st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
                if not union.markers.is_whiteout(st, dir_fd, name):
                    raise
                with self._work.temporary() as temporary:
                    _link(node, source, *temporary.at)
                    temporary.put(dir_fd, name)
            st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        union.nodes.linked(node, st)
        union.nodes.add_name(node, parent, name, place)
        return node, union.attributes(node)

    # -- how it is made -------------------------------------------------------------------------------

    def _new_node(self, parent: Node, name: bytes, fd: int = -1) -> tuple[Node, Attributes]:
        """The node for what was just made in the upper (``fd``, if it is open): nothing is below it."""
        union, place = self._union, parent.parts[0]
        st = os.fstat(fd) if fd >= 0 else os.stat(name, dir_fd=union.gate.fd(place), follow_symlinks=False)
        is_directory = stat.S_ISDIR(st.st_mode)
        where = Place(place.layer, place, name, key=place.layer.key(st)) if is_directory else place
        node = union.nodes.add(parent, name, st, [where])
        union.capabilities.none(node)
        return node, union.attributes_of(node, st)

    def _make(
        self,
        parent: Node,
        name: bytes,
        mode: int,
        caller: Caller,
        make: _Make[_T],
        *,
        directory: bool = False,
    ) -> _T:
        """Run ``make`` as the caller: in place, or in work when a whiteout is there."""
        union = self._union
        place = self._writable(parent)
        dir_fd = union.gate.fd(place)
        mode = self._masked(place, dir_fd, mode, caller)
        try:
            with union.identity.acting_as(caller.uid, caller.gid):
                return make(dir_fd, name, mode)
        except FileExistsError:
            st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            if parent.identity is not None or not union.markers.is_whiteout(st, dir_fd, name):
                raise
        return self._make_over_whiteout(place, dir_fd, name, mode, caller, make, directory=directory)

    def _make_over_whiteout(
        self,
        place: Place,
        dir_fd: int,
        name: bytes,
        mode: int,
        caller: Caller,
        make: _Make[_T],
        *,
        directory: bool,
    ) -> _T:
        """Make it in work, and put it into the place of the whiteout: a directory as an opaque one."""
        work = self._work
        st, acl = os.stat(dir_fd), self._default_acl(place, dir_fd)
        with work.temporary() as temporary, ExitStack() as fds:
            made = temporary.at
            room = -1
            if directory or acl or st.st_mode & stat.S_ISGID:
                room = temporary.mkdir()  # in work itself nothing is inherited
                fds.callback(os.close, room)
                _inherit(room, st, acl)
                made = room, name
            with self._union.identity.acting_as(caller.uid, caller.gid):
                result = make(*made, mode)
            try:
                if directory:
                    fd = os.open(name, _DIRECTORY, dir_fd=room)
                    fds.callback(os.close, fd)
                    self._union.markers.set_opaque(fd)
                    work.exchange(made, (dir_fd, name))
                    with suppress(OSError):
                        os.unlink(name, dir_fd=room)  # the whiteout
                elif room >= 0:
                    rename(made, (dir_fd, name))
                else:
                    temporary.put(dir_fd, name)
            except BaseException:
                if isinstance(result, int):
                    os.close(result)
                raise
            return result

    def _masked(self, place: Place, dir_fd: int, mode: int, caller: Caller) -> int:
        """The mode with which to create something in a directory: a default ACL stands in for the umask."""
        if caller.umask and not self._default_acl(place, dir_fd):
            return mode & ~caller.umask
        return mode

    def _default_acl(self, place: Place, dir_fd: int) -> bytes:
        """The default ACL of a directory, b"" without one."""
        acl = place.default_acl
        if acl is None:
            try:
                acl = os.getxattr(b"/proc/self/fd/%d" % dir_fd, ACL_DEFAULT)
            except OSError as error:
                if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                    raise
                acl = b""
            if not place.layer.bound:  # which is changed by others too
                place.default_acl = acl
        return acl


def _inherit(fd: int, st: os.stat_result, acl: bytes) -> None:
    """Have files in the directory ``fd``, which is empty, inherit as in one with ``st`` and ``acl``."""
    if st.st_mode & stat.S_ISGID:
        os.fchown(fd, -1, st.st_gid)
        os.fchmod(fd, 0o700 | stat.S_ISGID)
    if acl:
        os.setxattr(fd, ACL_DEFAULT, acl)


def _create(dir_fd: int, name: bytes, mode: int) -> int:
    return os.open(name, _NEW, mode, dir_fd=dir_fd)


def _mkdir(dir_fd: int, name: bytes, mode: int) -> None:
    os.mkdir(name, mode, dir_fd=dir_fd)


def _link(node: Node, source: int, dir_fd: int, name: bytes) -> None:
    """linkat(2) of the node's object. One without a name gets its first only if it never had one: a file of
    O_TMPFILE; any other is ENOENT (fs/namei.c, vfs_link)."""
    if node.held >= 0:
        os.link(b"/proc/self/fd/%d" % node.held, name, dst_dir_fd=dir_fd, follow_symlinks=True)
    else:
        os.link(node.name, name, src_dir_fd=source, dst_dir_fd=dir_fd, follow_symlinks=False)
