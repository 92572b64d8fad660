"""New names in the merged layers: hard links, and what takes the place of a whiteout."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Final

from unionfs.union.attributes import Attributes
from unionfs.union.changing import Changing, T
from unionfs.union.node import Node
from unionfs.union.objects import link_object
from unionfs.union.places import Place
from unionfs.union.work import rename
from unionfs.union.xattrs import ACL_DEFAULT, default_acl

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Making(Changing):
    """Makes new names."""

    def link(self, node: Node, parent: Node, name: bytes) -> tuple[Node, Attributes]:
        """Another name for a node that is in the upper already."""
        union = self._union
        assert node.place is not None
        path, follow = union.path(node)
        union.markers.refuse_metacopy(path, follow=follow)
        place = self.writable(parent)
        with self._directories(node.place, place) as (source, dir_fd):
            try:
                link_object(node, source, dir_fd, name)
            except FileExistsError:
                st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
                if not union.markers.is_whiteout(st, dir_fd, name):
                    raise
                with self._work.temporary() as temporary:
                    link_object(node, source, *temporary.at)
                    temporary.put(dir_fd, name)
            st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        union.nodes.linked(node, st)
        union.nodes.add_name(node, parent, name, place)
        return node, union.attributes(node)

    def make_over(self, place: Place, name: bytes, make: Callable[[int, bytes], T], *, directory: bool) -> T:
        """Make it in work, and put it into the place of the whiteout: a directory as an opaque one."""
        union, work = self._union, self._work
        dir_fd = union.gate.fd(place)
        st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        if not union.markers.is_whiteout(st, dir_fd, name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        st, acl = os.stat(dir_fd), default_acl(place, dir_fd)
        with work.temporary() as temporary, ExitStack() as fds:
            made = temporary.at
            room = -1
            if directory or acl or st.st_mode & stat.S_ISGID:
                room = temporary.mkdir()  # in work itself nothing is inherited
                fds.callback(os.close, room)
                _inherit(room, st, acl)
                made = room, name
            result = make(*made)
            try:
                if directory:
                    fd = os.open(name, _DIRECTORY, dir_fd=room)
                    fds.callback(os.close, fd)
                    union.markers.set_opaque(fd)
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


def _inherit(fd: int, st: os.stat_result, acl: bytes) -> None:
    """Have files in the directory ``fd``, which is empty, inherit as in one with ``st`` and ``acl``."""
    if st.st_mode & stat.S_ISGID:
        os.fchown(fd, -1, st.st_gid)
        os.fchmod(fd, 0o700 | stat.S_ISGID)
    if acl:
        os.setxattr(fd, ACL_DEFAULT, acl)
