"""First use of an empty volume: copies the union's content at the target into it, as Docker does.

The copy preserves owners, modes, times, xattrs (including ACLs), hard links, symlinks, devices and holes. It
reads the layers directly, by a merge of its own, and not through the mount: this detects hard links within a
lower, and does not wait for the daemon. Names that cannot be looked up and xattrs that cannot be read are
skipped and logged: one broken name in a layer does not stop the copy.

The copy is made in a workspace in the volume and moved out of it at the end. After a crash the next use
discards or finishes it, so a half-filled volume never counts as filled.
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
from unionfs.errors import UserError, quoted, reason
from unionfs.storage import locks, symlinks, workspace
from unionfs.storage.model import Volume
from unionfs.storage.targets import Names
from unionfs.sys import attributes, calls
from unionfs.sys.fds import Owned, open_for_listing
from unionfs.union.filedata import clone, copy_data
from unionfs.union.files import open_held
from unionfs.union.layers import LayerStack
from unionfs.union.listing import real_names
from unionfs.union.merge import Found, Merge
from unionfs.union.permissions import shown_names

log = logging.getLogger(__name__)

# Entries that mkfs creates in an empty filesystem.
_NOTHING = frozenset({b"lost+found"})
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def populate(stack: LayerStack, names: Names, data: int, volume: Volume) -> bool:
    """Copy the union's directory at `names` into the volume's directory `data` (an fd), if that is empty.

    Returns whether it copied. Raises UserError, and then leaves the volume empty.
    """
    storage_root = os.path.dirname(os.path.dirname(volume.directory))
    try:
        # Two unions may use a new volume for the first time concurrently.
        with locks.filling(storage_root, volume.name):
            return _is_empty(data, volume) and _fill(stack, names, data, volume)
    except OSError as error:
        path = b"/" + b"/".join(names)
        raise UserError(
            f"volume {quoted(volume.name)} cannot be filled with what the union has at "
            f"{quoted(os.fsdecode(path))}: {reason(error)}; make room there, or use nocopy."
        ) from error


def _is_empty(data: int, volume: Volume) -> bool:
    with Owned(open_for_listing(data)) as listing:
        held = set(real_names(listing))
    return not held - _NOTHING - workspace.names(volume.directory)


def _fill(stack: LayerStack, names: Names, data: int, volume: Volume) -> bool:
    merge = Merge(stack.layers, stack.markers)
    try:
        parts = _find(merge, names)
        if parts is None:
            return False
        with (
            Owned(open_for_listing(data)) as root,
            workspace.workspace(volume.directory, root, "population") as place,
        ):
            _Copier(merge, place.new).tree(parts)
            calls.syncfs(place.new)
            place.commit(keep=True)
        return True
    finally:
        merge.close()


def _find(merge: Merge, names: Names) -> list[Place] | None:
    """The parts of the directory at a path, or None if it does not exist."""
    parts = merge.roots
    for name in names:
        found = merge.search(parts, name)
        if found is None or not stat.S_ISDIR(found[0].st_mode):
            return None
        parts = found[1]
    return parts


class _Contained(NamedTuple):
    """The parts of the directory that contains an object, and the one of them that does."""

    parts: list[Place]
    place: Place


class _Copier:
    """Copies a merged directory into a real one, without recursion: trees may be deep."""

    def __init__(self, merge: Merge, root: int) -> None:
        self._merge = merge
        self._root = root
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

    def _search(self, parts: list[Place], name: bytes, path: bytes) -> Found | None:
        try:
            return self._merge.search(parts, name)
        except OSError as error:
            _leave_out(f"{_shown(path)} cannot be looked up", error)
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
                    copy_data(data, fd, st.st_size)
                self._keep(where.place, opened, path, fd)

    def _keep(self, place: Place, source: int, path: bytes, at: int, name: bytes | None = None) -> None:
        """Copy the attributes of an fd of an object in ``place`` to ``name`` in ``at``, or to the fd ``at``
        without a name."""
        markers, permissions = self._merge.markers, place.layer.permissions

        def unreadable(xattr: bytes, error: OSError) -> None:
            what = "the xattrs"
            if xattr != attributes.ALL:
                what = f"the xattr {_shown(markers.shown_names([xattr])[0])}"
            _leave_out(f"{what} of {_shown(path)} cannot be read", error)

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


def _refused(name: bytes, error: OSError) -> None:
    """An ordinary user gets the attributes that are permitted; sshfs refuses an owner by EACCES."""
    permitted = (errno.EPERM, errno.EACCES) if name == attributes.OWNER else (errno.EPERM,)
    if error.errno not in permitted or os.geteuid() == 0:
        attributes.unsupported(name, error)


def _leave_out(what: str, error: OSError) -> None:
    """Log a skipped entry or xattr. Re-raises an error about a lack of memory or fds."""
    if error.errno in _SHORT:
        raise error
    log.warning("%s: %s; it is left out of the volume", what, reason(error))


def _shown(name: bytes) -> str:
    return quoted(os.fsdecode(name or b"."))
