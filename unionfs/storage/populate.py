"""First use of an empty volume: what the union has at the target is copied into it, as Docker does.

Owners, modes, times in nanoseconds, xattrs (ACLs among them), hard links, symlinks, devices and holes are
kept. The layers are read directly, by a view of their own, and not through the mount: so hard links within
a lower are seen as such, and nothing has to wait for the daemon. A name that cannot be looked up is left out,
and so is an xattr that cannot be read; the log says so. One broken name of a layer must not stop the rest.

The copy is made in a workspace in the volume and moved out of it at the end. What a crash leaves of it is
either thrown away or moved out by the next use, so a volume is never taken for filled when it is half filled.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator

from unionfs.errors import UserError, quoted, reason
from unionfs.storage import locks, symlinks, workspace
from unionfs.storage.model import Volume
from unionfs.storage.targets import Names
from unionfs.sys import calls
from unionfs.union.filedata import clone, copy_data
from unionfs.union.layers import LayerStack
from unionfs.union.listing import Listing
from unionfs.union.nodes import Node
from unionfs.union.places import open_for_listing
from unionfs.union.tree import Union

log = logging.getLogger(__name__)

# mkfs makes it in a filesystem that is empty all the same.
_NOTHING = frozenset({b"lost+found"})
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def populate(stack: LayerStack, names: Names, data: int, volume: Volume) -> bool:
    """Fill the volume's directory `data` (an fd), if it is empty, with what the union has at `names`.

    Returns whether anything was copied. Raises UserError; then the volume is as empty as before.
    """
    storage_root = os.path.dirname(os.path.dirname(volume.directory))
    try:
        # Two unions may use a new volume at the same time.
        with locks.filling(storage_root, volume.name):
            return _is_empty(data, volume) and _fill(stack, names, data, volume)
    except OSError as error:
        path = b"/" + b"/".join(names)
        raise UserError(
            f"volume {quoted(volume.name)} cannot be filled with what the union has at "
            f"{quoted(os.fsdecode(path))}: {reason(error)}; make room there, or use nocopy."
        ) from error


def _is_empty(data: int, volume: Volume) -> bool:
    listing = open_for_listing(data)
    try:
        held = {os.fsencode(name) for name in os.listdir(listing)}
    finally:
        os.close(listing)
    return not held - _NOTHING - workspace.names(volume.directory)


def _fill(stack: LayerStack, names: Names, data: int, volume: Volume) -> bool:
    union = Union(stack)
    try:
        node = _find(union, names)
        if node is None or not node.is_dir:
            return False
        root = open_for_listing(data)
        try:
            with workspace.workspace(volume.directory, root, "population") as place:
                copier = _Copier(union, os.dup(place.new))
                try:
                    copier.tree(node)
                finally:
                    copier.close()
                calls.syncfs(place.new)
                place.commit(keep=True)
        finally:
            os.close(root)
        return True
    finally:
        union.close()


def _find(union: Union, names: Names) -> Node | None:
    node = union.nodes.root
    for name in names:
        found = union.lookup(node, name) if node.is_dir else None
        if found is None:
            return None
        node = found[0]
    return node


class _Copier:
    """Copies a merged directory into a real one, without recursion: trees may be deep."""

    def __init__(self, union: Union, root: int) -> None:
        self._union = union
        self._root = root
        self._changes_symlinks = not symlinks.are_sshfs(root)
        #: Where the first name of a file with several went, relative to the root.
        self._links: dict[tuple[int, int], bytes] = {}
        #: Devices whose files cannot share blocks with the volume's.
        self._never_clones: set[int] = set()

    def close(self) -> None:
        os.close(self._root)

    def tree(self, top: Node) -> None:
        """Copy the content and attributes of a directory to the root."""
        # Each step: a directory, where its copy is, the path of that, and the names that are still to come.
        steps: list[tuple[Node, int, bytes, Iterator[bytes]]] = [
            (top, os.dup(self._root), b"", iter(Listing(self._union, top).names()))
        ]
        try:
            while steps:
                node, fd, path, names = steps[-1]
                name = next(names, None)
                if name is None:
                    self._keep(node, fd)
                    steps.pop()
                    os.close(fd)
                    self._union.nodes.forget(node, 0)
                    continue
                here = b"%b/%b" % (path, name) if path else name
                found = self._lookup(node, name, here)
                if found is None:
                    continue
                child = found[0]
                if child.is_dir:
                    os.mkdir(name, 0o700, dir_fd=fd)
                    inner = os.open(name, _DIRECTORY, dir_fd=fd)
                    steps.append((child, inner, here, iter(Listing(self._union, child).names())))
                else:
                    self._leaf(child, fd, name, here)
                    self._union.nodes.forget(child, 0)
        finally:
            for _, fd, _, _ in steps:
                os.close(fd)

    def _lookup(self, node: Node, name: bytes, path: bytes) -> tuple[Node, object] | None:
        try:
            return self._union.lookup(node, name)
        except OSError as error:
            _leave_out(f"{_shown(path)} cannot be looked up", error)
            return None

    def _leaf(self, node: Node, dir_fd: int, name: bytes, path: bytes) -> None:
        st = self._union.stat(node)
        if st.st_nlink > 1:
            first = self._links.setdefault((st.st_dev, st.st_ino), path)
            if first is not path:
                os.link(first, name, src_dir_fd=self._root, dst_dir_fd=dir_fd, follow_symlinks=False)
                return
        if stat.S_ISREG(st.st_mode):
            self._file(node, dir_fd, name)
            return
        if stat.S_ISLNK(st.st_mode):
            os.symlink(self._union.readlink(node), name, dir_fd=dir_fd)
        else:
            os.mknod(name, stat.S_IFMT(st.st_mode) | 0o600, st.st_rdev, dir_fd=dir_fd)
        changeable = not stat.S_ISLNK(st.st_mode) or self._changes_symlinks
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            if changeable:
                _keep_owner(fd, st)
            self._keep_xattrs(node, b"/proc/self/fd/%d/%b" % (dir_fd, name), follow=False)
            if not stat.S_ISLNK(st.st_mode):
                os.chmod(b"/proc/self/fd/%d" % fd, stat.S_IMODE(st.st_mode))
        finally:
            os.close(fd)
        if changeable:
            calls.utimensat(dir_fd, name, st.st_atime_ns, st.st_mtime_ns)

    def _file(self, node: Node, dir_fd: int, name: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        source = self._union.files.lend(node, write=False)
        try:
            fd = os.open(name, flags, 0o600, dir_fd=dir_fd)
            try:
                st = os.fstat(source.fd)
                if not clone(source.fd, fd, st.st_dev, self._never_clones):
                    copy_data(source.fd, fd, st.st_size)
                self._keep(node, fd)
            finally:
                os.close(fd)
        finally:
            self._union.files.take_back(node, source)

    def _keep(self, node: Node, fd: int) -> None:
        """Owner, xattrs, mode, times: in the order in which none undoes another."""
        st = self._union.stat(node)
        _keep_owner(fd, st)
        self._keep_xattrs(node, b"/proc/self/fd/%d" % fd, follow=True)
        os.fchmod(fd, stat.S_IMODE(st.st_mode))
        os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))

    def _keep_xattrs(self, node: Node, target: bytes, *, follow: bool) -> None:
        markers = self._union.markers
        path, follow_source = self._union.path(node)
        try:
            stored = [os.fsencode(name) for name in os.listxattr(path, follow_symlinks=follow_source)]
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                _leave_out(f"the xattrs of {_shown(node.name)} cannot be read", error)
            return
        for name in markers.shown_names(stored):
            try:
                value = os.getxattr(path, markers.stored_name(name), follow_symlinks=follow_source)
            except OSError as error:
                if error.errno != errno.ENODATA:
                    _leave_out(f"the xattr {_shown(name)} of {_shown(node.name)} cannot be read", error)
                continue
            _set_xattr(target, name, value, follow=follow)


def _keep_owner(fd: int, st: os.stat_result) -> None:
    """As an ordinary user only what is the user's own can be kept."""
    try:
        calls.chown_fd(fd, st.st_uid, st.st_gid)
    except PermissionError:
        if os.geteuid() == 0:
            raise


def _leave_out(what: str, error: OSError) -> None:
    """Log that something of the layers is not copied; raise what is a lack of memory or fds instead."""
    if error.errno in _SHORT:
        raise error
    log.warning("%s: %s; it is left out of the volume", what, reason(error))


def _shown(name: bytes) -> str:
    return quoted(os.fsdecode(name))


def _set_xattr(target: bytes, name: bytes, value: bytes, *, follow: bool) -> None:
    try:
        os.setxattr(target, name, value, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.EPERM and os.geteuid() != 0:
            return
        # What the volume's filesystem cannot keep is left out, but not what grants or takes rights.
        if error.errno != errno.EOPNOTSUPP or name.startswith((b"security.", b"system.posix_acl_")):
            raise
