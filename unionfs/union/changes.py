"""Changes of the merged tree: creating, removing, renaming, linking.

Each change becomes visible by one step: a system call in the upper, or one rename of what was prepared in
work. Order in every function: what can fail first, then that step, then the node table.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Final, TypeVar

from unionfs.sys import calls
from unionfs.union import bound
from unionfs.union.copyup import ensure_upper, temporary_name
from unionfs.union.exchange import NO_FLAGS, exchange, rename_leaving
from unionfs.union.listing import is_empty
from unionfs.union.nodes import Node
from unionfs.union.places import Place
from unionfs.union.removal import remove
from unionfs.union.tree import Attributes, Union

ACL_DEFAULT: Final = b"system.posix_acl_default"
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
#: So many that could not be removed are tried again with each other one: there may be thousands.
_AGAIN: Final = 4
_T = TypeVar("_T")
_Make = Callable[[int, bytes, int], _T]
"""Makes something, from the fd of its directory, its name and its mode."""


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Caller:
    """Who asks for a change. ``umask``: what is still to be taken off a new object's mode, unless its
    directory has a default ACL; 0 when the kernel took it off already."""

    __slots__ = ("gid", "uid", "umask")

    def __init__(self, uid: int, gid: int, umask: int = 0) -> None:
        self.uid = uid
        self.gid = gid
        self.umask = umask


class Changes:
    """The changing operations on one union. Not thread-safe, like the union itself."""

    def __init__(self, union: Union) -> None:
        self._union = union
        #: Temporaries in work that could not be removed yet.
        self._left: list[bytes] = []

    def _writable(self, directory: Node) -> Place:
        """The upper's directory of a node, which is about to change."""
        place = ensure_upper(self._union, directory)
        place.empty = False
        directory.ctime = None
        return place

    def _both_writable(self, one: Node, other: Node) -> tuple[Place, Place]:
        """The same for two. Copying up the second, when it is in the first, kept the ctime of the first."""
        places = self._writable(one), self._writable(other)
        one.ctime = None
        return places

    # -- creating -------------------------------------------------------------------------------------

    def create(self, parent: Node, name: bytes, mode: int, caller: Caller) -> tuple[Node, Attributes, int]:
        """A new regular file; also returns an fd of it (O_RDWR), which the caller owns."""

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
            raise _error(errno.EPERM)
        self._make(parent, name, mode, caller, lambda fd, here, kept: os.mknod(here, kept, rdev, dir_fd=fd))
        return self._new_node(parent, name)

    def _new_node(self, parent: Node, name: bytes, fd: int = -1) -> tuple[Node, Attributes]:
        """The node for what has just been made in the upper (``fd``, if it is open): nothing is below it."""
        union, place = self._union, parent.parts[0]
        st = os.fstat(fd) if fd >= 0 else os.stat(name, dir_fd=union.gate.fd(place), follow_symlinks=False)
        is_directory = stat.S_ISDIR(st.st_mode)
        where = [Place(place.layer, place, name, key=place.layer.key(st))] if is_directory else place
        node = union.nodes.add(parent, name, st, where)
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
        st = os.stat(dir_fd)
        acl = self._default_acl(place, dir_fd)
        if directory or acl or st.st_mode & stat.S_ISGID:
            return self._make_in_room(dir_fd, name, mode, caller, make, st, acl, directory=directory)
        return self._make_in_work(dir_fd, name, mode, caller, make)

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

    def _make_in_work(self, dir_fd: int, name: bytes, mode: int, caller: Caller, make: _Make[_T]) -> _T:
        """Make it in work itself, which hands nothing on, and put it in the place of the whiteout."""
        union = self._union
        work, temporary = union.stack.work_fd, temporary_name()
        try:
            with union.identity.acting_as(caller.uid, caller.gid):
                result = make(work, temporary, mode)
            try:
                calls.renameat2(work, temporary, dir_fd, name)
            except BaseException:
                if isinstance(result, int):
                    os.close(result)
                raise
        except BaseException:
            self._discard(temporary)
            raise
        return result

    def _make_in_room(
        self,
        dir_fd: int,
        name: bytes,
        mode: int,
        caller: Caller,
        make: _Make[_T],
        st: os.stat_result,
        acl: bytes,
        *,
        directory: bool,
    ) -> _T:
        """Make it in a directory that hands on what ``dir_fd``, with these attributes and ACL, would."""
        union = self._union
        work = union.stack.work_fd
        with ExitStack() as cleanup:
            room = self._room_like(st, acl)
            cleanup.callback(self._discard, room)
            room_fd = os.open(room, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=work)
            cleanup.callback(os.close, room_fd)
            with union.identity.acting_as(caller.uid, caller.gid):
                result = make(room_fd, name, mode)
            try:
                if directory:
                    fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                                 dir_fd=room_fd)  # fmt: skip
                    cleanup.callback(os.close, fd)
                    union.markers.set_opaque(fd)
                    exchange(self._temporary, work, room_fd, name, dir_fd, name)
                else:
                    calls.renameat2(room_fd, name, dir_fd, name)
            except BaseException:
                if isinstance(result, int):
                    os.close(result)
                raise
            return result

    def _discard(self, temporary: bytes) -> None:
        """Remove what is left under a temporary name in work, if anything.

        On NFS a directory may hold files that were removed and are still in use (EBUSY): it is tried again
        with later ones, and by the next mount.
        """
        again = self._left[:_AGAIN]
        del self._left[:_AGAIN]
        for name in [temporary, *again]:
            try:
                self._remove(name)
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                    raise
                self._left.append(name)

    def _remove(self, temporary: bytes) -> None:
        work = self._union.stack.work_fd
        with contextlib.suppress(FileNotFoundError):
            try:
                os.unlink(temporary, dir_fd=work)
            except IsADirectoryError:
                try:
                    os.rmdir(temporary, dir_fd=work)
                except OSError:
                    remove(work, temporary)

    @contextmanager
    def _temporary(self) -> Iterator[bytes]:
        """A name in work; what it stands for at the end of the block is removed."""
        name = temporary_name()
        try:
            yield name
        finally:
            self._discard(name)

    def _room_like(self, st: os.stat_result, acl: bytes) -> bytes:
        """A directory in work that gives new files the group and the ACL of one with ``st`` and ``acl``."""
        work, name = self._union.stack.work_fd, temporary_name()
        os.mkdir(name, 0o700, dir_fd=work)
        try:
            if st.st_mode & stat.S_ISGID:
                os.chown(name, -1, st.st_gid, dir_fd=work)
                os.chmod(name, 0o700 | stat.S_ISGID, dir_fd=work)
            if acl:
                os.setxattr(b"/proc/self/fd/%d/%b" % (work, name), ACL_DEFAULT, acl)
        except BaseException:
            self._discard(name)
            raise
        return name

    # -- removing -------------------------------------------------------------------------------------

    def unlink(self, parent: Node, name: bytes) -> None:
        """Remove a name that is not a directory's."""
        union = self._union
        node = self._existing(parent, name)
        if node.is_dir:
            raise _error(errno.EISDIR)
        self._union.require_writable(parent)
        hides_another = node.is_upper and union.is_visible_below(parent, name)
        with union.outliving(node):
            dir_fd = union.gate.fd(self._writable(parent))
            if not node.is_upper:
                self._whiteout(dir_fd, name)
            elif hides_another:
                work = union.stack.work_fd
                with self._temporary() as temporary:
                    self._whiteout(work, temporary, dir_fd)
                    calls.renameat2(work, temporary, dir_fd, name)
            else:
                os.unlink(name, dir_fd=dir_fd)
            union.nodes.remove_name(node, parent, name)

    def rmdir(self, parent: Node, name: bytes) -> None:
        """Remove a directory that shows nothing."""
        union = self._union
        node = self._existing(parent, name)
        if not node.is_dir:
            raise _error(errno.ENOTDIR)
        self._union.require_writable(parent)
        if not is_empty(union, node):
            raise _error(errno.ENOTEMPTY)
        hides_another = node.is_upper and union.is_visible_below(parent, name)
        with union.outliving(node):
            dir_fd = union.gate.fd(self._writable(parent))
            if node.identity is not None:
                os.rmdir(name, dir_fd=dir_fd)
            else:
                self._remove_directory(dir_fd, name, upper=node.is_upper, hides_another=hides_another)
            for part in node.parts:
                union.gate.forget(part)
            union.nodes.remove_name(node, parent, name)

    def _remove_directory(self, dir_fd: int, name: bytes, *, upper: bool, hides_another: bool) -> None:
        work = self._union.stack.work_fd
        if not upper:
            self._whiteout(dir_fd, name)
            return
        with self._temporary() as temporary:
            if hides_another:
                self._whiteout(work, temporary, dir_fd)
                exchange(self._temporary, work, work, temporary, dir_fd, name)
                return
            try:
                os.rmdir(name, dir_fd=dir_fd)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                calls.renameat2(dir_fd, name, work, temporary)  # only whiteouts are in it

    def _existing(self, parent: Node, name: bytes) -> Node:
        """What has that name, and is to lose it. Raises ENOENT; EBUSY when storage is shown there."""
        node = self._union.nodes.child(parent, name)  # the attributes are of no interest
        if node is None or parent.identity is not None:
            found = self._union.lookup(parent, name)
            if found is None:
                raise _error(errno.ENOENT)
            node = found[0]
        if node.is_mountpoint:
            raise _error(errno.EBUSY)
        return node

    def _whiteout(self, dir_fd: int, name: bytes, for_dir: int | None = None) -> None:
        """Make a whiteout in ``dir_fd``, that will be moved to the directory ``for_dir`` if given."""
        markers = self._union.markers
        if markers.make_whiteout(dir_fd, name):
            # the kernel looks for xattr whiteouts only where the directory and the layer's root say so
            try:
                markers.allow_xattr_whiteouts(dir_fd if for_dir is None else for_dir)
                markers.allow_xattr_whiteouts(self._union.require_upper().root_fd)
            except OSError:
                os.unlink(name, dir_fd=dir_fd)
                raise

    # -- linking --------------------------------------------------------------------------------------

    def link(self, node: Node, parent: Node, name: bytes) -> tuple[Node, Attributes]:
        """Another name for a node that is in the upper already."""
        union = self._union
        if node.place is None:
            raise _error(errno.ENOENT)
        if not bound.same_storage(node, parent):
            raise _error(errno.EXDEV)
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
                work = union.stack.work_fd
                with self._temporary() as temporary:
                    _link(node, source, work, temporary)
                    calls.renameat2(work, temporary, dir_fd, name)
            st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        union.nodes.linked(node, st)
        union.nodes.add_name(node, parent, name, place)
        return node, union.attributes(node)

    @contextmanager
    def _directories(self, one: Place, other: Place) -> Iterator[tuple[int, int]]:
        """Fds of two directories that stay good whatever else the gate opens."""
        gate = self._union.gate
        with ExitStack() as fds:
            first = os.dup(gate.fd(one))
            fds.callback(os.close, first)
            second = os.dup(gate.fd(other))
            fds.callback(os.close, second)
            yield first, second

    # -- renaming -------------------------------------------------------------------------------------

    def rename(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int) -> None:
        """renameat2(2) with NOREPLACE or EXCHANGE. What :meth:`renamed` gives is in the upper already."""
        union = self._union
        node, target = self._accepted(parent, name, new_parent, new_name, flags)
        if parent.identity is not None:
            bound.rename(union, node, parent, name, new_parent, new_name, flags)
            return
        if target is node:
            return
        if flags == calls.RENAME_EXCHANGE:
            assert target is not None
            self._exchange(node, parent, name, target, new_parent, new_name)
            return
        with nullcontext() if target is None else union.outliving(target):
            self._replace(node, parent, name, target, new_parent, new_name)
            if target is not None:
                for part in target.parts:
                    union.gate.forget(part)
                union.nodes.remove_name(target, new_parent, new_name)
            union.nodes.move(node, parent, name, new_parent, new_name)

    def renamed(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> list[Node]:
        """What such a rename moves, and so has to be in the upper before, unless it is a directory.

        Raises what :meth:`rename` would: a rename that is refused copies nothing up.
        """
        node, target = self._accepted(parent, name, new_parent, new_name, flags)
        if flags == calls.RENAME_EXCHANGE:
            assert target is not None
            return [node, target]
        return [node]

    def _accepted(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int
    ) -> tuple[Node, Node | None]:
        """The nodes of both names, when nothing speaks against the rename.

        EXDEV for a directory that shows something of a lower, as overlayfs without ``redirect_dir``.
        """
        union = self._union
        if flags not in (0, calls.RENAME_NOREPLACE, calls.RENAME_EXCHANGE):
            raise _error(errno.EINVAL)
        node = self._existing(parent, name)
        if not bound.same_storage(parent, new_parent):
            raise _error(errno.EXDEV)
        if parent.identity is not None:
            union.require_writable(parent)
            there = union.lookup(new_parent, new_name)
            if there is not None and there[0].is_mountpoint:
                raise _error(errno.EBUSY)
            return node, node
        exchange = flags == calls.RENAME_EXCHANGE
        found = union.lookup(new_parent, new_name)
        target = None if found is None else found[0]
        if target is not None and target.is_mountpoint:
            raise _error(errno.EBUSY)
        if exchange and target is None:
            raise _error(errno.ENOENT)
        if flags == calls.RENAME_NOREPLACE and target is not None:
            raise _error(errno.EEXIST)
        moved = [node, target] if exchange and target is not None else [node]
        if any(one.is_dir and not one.is_pure_upper for one in moved):
            raise _error(errno.EXDEV)
        if target is not None and target is not node and not exchange:
            if target.is_dir and not node.is_dir:
                raise _error(errno.EISDIR)
            if node.is_dir and not target.is_dir:
                raise _error(errno.ENOTDIR)
            if target.is_dir and not is_empty(union, target):
                raise _error(errno.ENOTEMPTY)
        for one in moved:
            if not one.is_dir and target is not node:
                union.refuse_metacopy(one)
        return node, target

    def _exchange(
        self, node: Node, parent: Node, name: bytes, target: Node, new_parent: Node, new_name: bytes
    ) -> None:
        union = self._union
        if node.is_dir and union.is_visible_below(new_parent, new_name):
            union.markers.set_opaque(union.gate.fd(node.parts[0]))
        if target.is_dir and union.is_visible_below(parent, name):
            union.markers.set_opaque(union.gate.fd(target.parts[0]))
        places = self._both_writable(parent, new_parent)
        with self._directories(*places) as (old_fd, new_fd):
            calls.renameat2(old_fd, name, new_fd, new_name, calls.RENAME_EXCHANGE)
        union.nodes.move(node, parent, name, new_parent, new_name)
        union.nodes.move(target, new_parent, new_name, parent, name)

    def _replace(
        self, node: Node, parent: Node, name: bytes, target: Node | None, new_parent: Node, new_name: bytes
    ) -> None:
        """The step on disk of a rename without EXCHANGE."""
        union = self._union
        leaves_whiteout = union.is_visible_below(parent, name)
        if node.is_dir and union.is_visible_below(new_parent, new_name):
            union.markers.set_opaque(union.gate.fd(node.parts[0]))
        places = self._both_writable(parent, new_parent)
        with self._directories(*places) as (old_fd, new_fd):
            self._rename_over(node, name, target, new_name, old_fd, new_fd, leaves_whiteout=leaves_whiteout)

    def _rename_over(
        self,
        node: Node,
        name: bytes,
        target: Node | None,
        new_name: bytes,
        old_fd: int,
        new_fd: int,
        *,
        leaves_whiteout: bool,
    ) -> None:
        try:
            st = os.stat(new_name, dir_fd=new_fd, follow_symlinks=False)
        except FileNotFoundError:
            st = None
        if node.is_dir and st is not None and not stat.S_ISDIR(st.st_mode):
            # a whiteout: no directory can be renamed over it, but it can go where the directory was
            exchange(self._temporary, self._union.stack.work_fd, old_fd, name, new_fd, new_name)
            if not leaves_whiteout:
                os.unlink(name, dir_fd=old_fd)
            return
        if target is not None and target.is_dir and st is not None:
            self._clear_whiteouts(target, new_fd, new_name)
        if not leaves_whiteout:
            calls.renameat2(old_fd, name, new_fd, new_name)
            return
        try:
            calls.renameat2(old_fd, name, new_fd, new_name, calls.RENAME_WHITEOUT)
        except OSError as error:
            if error.errno not in (errno.EPERM, *NO_FLAGS):
                raise
            self._rename_and_whiteout(node, old_fd, name, new_fd, new_name, occupied=st is not None)

    def _rename_and_whiteout(
        self, node: Node, old_fd: int, name: bytes, new_fd: int, new_name: bytes, *, occupied: bool
    ) -> None:
        """RENAME_WHITEOUT for a filesystem without it."""
        work = self._union.stack.work_fd
        with self._temporary() as temporary:
            self._whiteout(work, temporary, old_fd)
            old, new = (old_fd, name), (new_fd, new_name)
            rename_leaving(
                self._temporary, work, temporary, old, new, directory=node.is_dir, occupied=occupied
            )

    def _clear_whiteouts(self, node: Node, dir_fd: int, name: bytes) -> None:
        """Put an opaque empty directory in the place of one that holds only whiteouts (overlayfs: dir.c,
        ovl_clear_empty): nothing changes to the eye, and a directory can be renamed over it."""
        union = self._union
        inner = union.gate.open_for_listing(node.parts[0])
        try:
            if not os.listdir(inner):
                return
            st = os.stat(inner)
            work = union.stack.work_fd
            with self._temporary() as temporary:
                os.mkdir(temporary, 0o700, dir_fd=work)
                fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=work)
                try:
                    union.markers.set_opaque(fd)
                    os.fchown(fd, st.st_uid, st.st_gid)
                    os.fchmod(fd, stat.S_IMODE(st.st_mode))
                finally:
                    os.close(fd)
                exchange(self._temporary, work, work, temporary, dir_fd, name)
        finally:
            os.close(inner)
        union.gate.forget(node.parts[0])


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
