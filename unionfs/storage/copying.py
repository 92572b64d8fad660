"""Copies the content of a merged directory into a real one.

The copy preserves owners, modes, times, xattrs (including ACLs), hard links, symlinks, devices and holes, and
shares blocks where the filesystem can (reflinks). It reads the layers directly, by a merge, and not through a
mount: this detects hard links within a lower, and needs no daemon. Names that cannot be looked up and xattrs
that cannot be read are skipped and logged: one broken name in a layer does not stop the copy.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

from unionfs.core.places import Place
from unionfs.errors import quoted, reason
from unionfs.storage import symlinks
from unionfs.storage.archive.progress import UNSEEN, Progress
from unionfs.sys import attributes
from unionfs.sys.fds import Owned
from unionfs.union.filedata import clone, copy_data
from unionfs.union.files import open_held
from unionfs.union.merge import Found, Merge
from unionfs.union.permissions import shown_names

log = logging.getLogger(__name__)

_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Contained(NamedTuple):
    """The parts of the directory that contains an object, and the one of them that does."""

    parts: list[Place]
    place: Place


class Copier:
    """Copies a merged directory into a real one, without recursion: trees may be deep."""

    def __init__(self, merge: Merge, root: int, what: str, progress: Progress = UNSEEN) -> None:
        """`root`: an fd of the empty directory; `what`: its name in messages, such as "the volume"."""
        self._progress = progress
        self._entries = self._size = 0
        self._merge = merge
        self._root = root
        self._what = what
        self._changes_symlinks = not symlinks.are_sshfs(root)
        #: For a file with several names, the path of the first copy from the root.
        self._links: dict[tuple[int, int], bytes] = {}
        #: Devices whose files cannot share blocks with the volume.
        self._never_clones: set[int] = set()

    def tree(self, top: list[Place]) -> None:
        """Copy the content and attributes of the directory merged from ``top`` to the root."""
        # Each step: a directory's parts, the fd and the path of its copy, and the remaining names.
        steps: list[tuple[list[Place], int, bytes, Iterator[bytes]]] = [
            (top, os.dup(self._root), b"", iter(self._merge.listing(top).names()))
        ]
        try:
            while steps:
                parts, fd, path, names = steps[-1]
                name = next(names, None)
                if name is None:
                    self._keep(parts[0], self._merge.gate.fd(parts[0]), path, fd)
                    steps.pop()
                    os.close(fd)
                    continue
                here = b"%b/%b" % (path, name) if path else name
                found = self._search(parts, name, here)
                if found is None:
                    continue
                self._count(found[0])
                if stat.S_ISDIR(found[0].st_mode):
                    os.mkdir(name, 0o700, dir_fd=fd)
                    inner = os.open(name, _DIRECTORY, dir_fd=fd)
                    steps.append((found[1], inner, here, iter(self._merge.listing(found[1]).names())))
                else:
                    with Owned(self._merge.open_object(found, name)) as source:
                        self._leaf(source, fd, name, here, _Contained(parts, found[1][0]))
        finally:
            for _, fd, _, _ in steps:
                os.close(fd)

    def _count(self, st: os.stat_result) -> None:
        """Show what was copied before an object."""
        self._progress(self._entries, self._size)
        self._entries += 1
        self._size += st.st_size if stat.S_ISREG(st.st_mode) else 0

    def _search(self, parts: list[Place], name: bytes, path: bytes) -> Found | None:
        try:
            return self._merge.search(parts, name)
        except OSError as error:
            self._leave_out(f"{quoted(path)} cannot be looked up", error)
            return None

    def _leaf(self, source: int, dir_fd: int, name: bytes, path: bytes, where: _Contained) -> None:
        """Copy a non-directory; ``source`` is its O_PATH fd."""
        st = os.fstat(source)
        if st.st_nlink > 1:
            first = self._links.setdefault((st.st_dev, st.st_ino), path)
            if first is not path:
                os.link(first, name, src_dir_fd=self._root, dst_dir_fd=dir_fd, follow_symlinks=False)
                return
        if stat.S_ISREG(st.st_mode):
            self._file(source, dir_fd, name, path, where)
            return
        if stat.S_ISLNK(st.st_mode):
            os.symlink(os.readlink(b"", dir_fd=source), name, dir_fd=dir_fd)
        else:
            os.mknod(name, stat.S_IFMT(st.st_mode) | 0o600, st.st_rdev, dir_fd=dir_fd)
        self._keep(where.place, source, path, dir_fd, name)

    def _file(self, source: int, dir_fd: int, name: bytes, path: bytes, where: _Contained) -> None:
        with Owned(open_held(source, write=False, waits=False).fd) as opened:
            lower = self._merge.lower_data(where.parts, where.place, name, opened)
            with (
                nullcontext(opened) if lower is None else Owned(self._merge.open_data(lower)) as data,
                Owned(os.open(name, _NEW, 0o600, dir_fd=dir_fd)) as fd,
            ):
                st = os.fstat(data)
                if not clone(data, fd, st.st_dev, self._never_clones):
                    copy_data(data, fd, st.st_size, self._progress.within())
                self._keep(where.place, opened, path, fd)

    def _keep(self, place: Place, source: int, path: bytes, at: int, name: bytes | None = None) -> None:
        """Copy the attributes of an fd of an object in ``place`` to ``name`` in ``at``, or to the fd ``at``
        without a name."""
        markers, permissions = self._merge.markers, place.layer.permissions

        def unreadable(xattr: bytes, error: OSError) -> None:
            what = "the xattrs"
            if xattr != attributes.ALL:
                what = f"the xattr {quoted(markers.shown_names([xattr])[0])}"
            self._leave_out(f"{what} of {quoted(path)} cannot be read", error)

        st = os.fstat(source)
        if permissions is not None:
            st = permissions.show_fd(st, source)
        stored = attributes.read_xattrs(
            b"/proc/self/fd/%d" % source, lambda xattr: not markers.is_private(xattr), unreadable
        )
        shown = {
            found: value
            for xattr, value in stored.items()
            for found in shown_names(markers, permissions, [xattr])
        }
        changeable = not stat.S_ISLNK(st.st_mode) or self._changes_symlinks
        new = attributes.attributes(st, shown)
        attributes.write(at, name, new, _refused, owner=changeable, times=changeable)


    def _leave_out(self, what: str, error: OSError) -> None:
        """Log a skipped entry or xattr. Re-raises an error about a lack of memory or fds."""
        if error.errno in _SHORT:
            raise error
        log.warning("%s: %s; it is left out of %s", what, reason(error), self._what)


def size_of(merge: Merge, top: list[Place]) -> int:
    """Return the bytes of the files in a merged directory and below."""
    total, waiting = 0, [top]
    while waiting:
        parts = waiting.pop()
        for name in merge.listing(parts).names():
            found = merge.search(parts, name)
            if found is not None and stat.S_ISDIR(found[0].st_mode):
                waiting.append(found[1])
            elif found is not None and stat.S_ISREG(found[0].st_mode):
                total += found[0].st_size
    return total


def _refused(name: bytes, error: OSError) -> None:
    """An ordinary user gets the attributes that are permitted; sshfs refuses an owner by EACCES."""
    permitted = (errno.EPERM, errno.EACCES) if name == attributes.OWNER else (errno.EPERM,)
    if error.errno not in permitted or os.geteuid() == 0:
        attributes.unsupported(name, error)
