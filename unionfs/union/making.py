"""New names in the merged layers: hard links, and new objects in place of a whiteout."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Final

from unionfs.core.memo import Wanted
from unionfs.core.node import Attributes, Node
from unionfs.core.places import Place
from unionfs.sys.attributes import ACL_DEFAULT
from unionfs.sys.fds import Owned, close_quietly
from unionfs.union.changing import Changing, T
from unionfs.union.objects import link_object
from unionfs.union.permissions import open_mode
from unionfs.union.work import At, rename
from unionfs.union.xattrs import default_acl

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Making(Changing):
    """Makes new names."""

    def link(self, node: Node, parent: Node, name: bytes) -> tuple[Node, Attributes]:
        """Create a hard link to a node in the upper."""
        union = self._union
        assert node.place is not None
        place = self.writable(parent)
        # The directory of an object without a known name may be gone.
        with self._directories(place if node.held >= 0 else node.place, place) as (source, dir_fd):
            self.replace_named(place, dir_fd, name)
            union.origins.moves(node, place, dir_fd)
            try:
                link_object(node, source, dir_fd, name)
            except FileExistsError:
                st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
                if not union.markers.is_whiteout(st, dir_fd, name):
                    raise
                with self._work.temporary() as temporary:
                    link_object(node, source, *temporary.at)
                    temporary.put(dir_fd, name)
            try:
                st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
                attributes = union.attributes(node)
            except OSError:
                self.unmake(parent, name, directory=False)
                raise
        union.nodes.linked(node, st)
        union.nodes.add_name(node, parent, name, place)
        return node, attributes

    def unmake(self, parent: Node, name: bytes, *, directory: bool) -> None:
        """Remove a new object, since its attributes cannot be read. Ignores errors."""
        with suppress(OSError):
            dir_fd = self._union.gate.fd(parent.parts[0])
            at = dir_fd, name
            try:
                hides = self._union.merge.is_visible_below(parent.parts, name)
            except (OSError, Wanted):
                # A whiteout of nothing does no harm. A request that is answered anew would find the object.
                hides = True
            if not hides:
                (os.rmdir if directory else os.unlink)(name, dir_fd=dir_fd)
                return
            with self._work.temporary() as temporary:
                self._whiteout(temporary.at, dir_fd)
                if directory:
                    self._work.exchange(temporary.at, at)
                else:
                    temporary.put(*at)

    def make_over(self, place: Place, name: bytes, make: Callable[[int, bytes], T], *, directory: bool) -> T:
        """Make the object in work, and replace the whiteout with it; a directory becomes opaque."""
        union, work = self._union, self._work
        dir_fd = union.gate.fd(place)
        st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        if not union.markers.is_whiteout(st, dir_fd, name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        st, acl = os.stat(dir_fd), default_acl(place, dir_fd)
        with work.temporary() as temporary:
            if directory or acl or st.st_mode & stat.S_ISGID:
                with Owned(temporary.mkdir()) as room:  # in work itself nothing is inherited
                    _inherit(room, st, acl)
                    put = self._put_opaque if directory else rename
                    return _make_and_put((room, name), make, partial(put, (room, name), (dir_fd, name)))
            return _make_and_put(temporary.at, make, partial(temporary.put, dir_fd, name))

    def make_kept(
        self, place: Place, name: bytes, make: Callable[[int, bytes, int], T], new: os.stat_result
    ) -> T:
        """Make an object with the attributes ``new`` in work, and put it into a directory of an upper that
        keeps them in an xattr; in place of a whiteout, a directory becomes opaque.

        Raises FileExistsError. ``make`` takes a directory fd, a name and a mode.
        """
        union, work = self._union, self._work
        dir_fd = union.gate.fd(place)
        try:
            st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            hides = False
        else:
            if not union.markers.is_whiteout(st, dir_fd, name):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            hides = stat.S_ISDIR(new.st_mode)
        with work.temporary() as temporary:
            put = partial(temporary.put, dir_fd, name)
            if hides:
                put = partial(self._exchange_opaque, temporary.at, (dir_fd, name))
            return _make_and_put(temporary.at, partial(self._make_with, place, make, new), put)

    def _make_with(
        self,
        place: Place,
        make: Callable[[int, bytes, int], T],
        new: os.stat_result,
        dir_fd: int,
        name: bytes,
    ) -> T:
        """Make an object with these attributes, in its xattr if it is a file or directory, or a device that
        the daemon may not make."""
        permissions, identity, kind = place.layer.permissions, self._union.identity, stat.S_IFMT(new.st_mode)
        assert permissions is not None
        result: T
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            owner = new.st_uid, new.st_gid
            try:
                with identity.acting_as(*owner) if identity.can_switch else nullcontext():
                    return make(dir_fd, name, new.st_mode)
            except PermissionError:
                if kind not in (stat.S_IFCHR, stat.S_IFBLK):
                    raise
            os.mknod(name, stat.S_IFREG | open_mode(0), dir_fd=dir_fd)
            result = None  # type: ignore[assignment]  # of mknod(2)
        else:
            result = make(dir_fd, name, kind | open_mode(new.st_mode))
        try:
            permissions.write(b"/proc/self/fd/%d/%b" % (dir_fd, name), new, follow=False)
        except OSError:
            if isinstance(result, int):
                close_quietly(result)
            raise
        return result

    def _exchange_opaque(self, made: At, whiteout: At) -> None:
        """Exchange a whiteout for a new directory, which becomes opaque."""
        room, name = made
        with Owned(os.open(name, _DIRECTORY, dir_fd=room)) as fd:
            self._set_opaque(fd)
        self._work.exchange(made, whiteout)

    def _put_opaque(self, made: At, whiteout: At) -> None:
        """Replace a whiteout with a new directory, which becomes opaque."""
        self._exchange_opaque(made, whiteout)
        room, name = made
        with suppress(OSError):
            os.unlink(name, dir_fd=room)


def _make_and_put(at: At, make: Callable[[int, bytes], T], put: Callable[[], None]) -> T:
    """Returns the result of ``make``, after ``put``; closes an fd if ``put`` fails."""
    result = make(*at)
    try:
        put()
    except BaseException:
        if isinstance(result, int):
            close_quietly(result)
        raise
    return result


def _inherit(fd: int, st: os.stat_result, acl: bytes) -> None:
    """Let new files in the directory ``fd`` inherit group and ACL as from one with ``st`` and ``acl``."""
    if st.st_mode & stat.S_ISGID:
        os.fchown(fd, -1, st.st_gid)
        os.fchmod(fd, 0o700 | stat.S_ISGID)
    if acl:
        os.setxattr(fd, ACL_DEFAULT, acl)
