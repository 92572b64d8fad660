"""Real directories in layers, and the one gate from a directory to an fd.

A :class:`Place` identifies a real directory: its layer, its parent place, its name. No other code builds
paths: :meth:`Gate.fd` walks down from the nearest open ancestor, one ``openat`` per component, never through
a symlink. So trees deeper than PATH_MAX work, and renaming a directory changes one object for everything
below it.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple

from unionfs.sys import calls
from unionfs.sys.fds import open_for_listing
from unionfs.union.rights import Rights

if TYPE_CHECKING:
    from unionfs.union.permissions import Permissions

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NOT_THERE: Final = (errno.ENOENT, errno.ENAMETOOLONG)
_LISTED: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: include/uapi/linux/magic.h: ext2 to 4, xfs, btrfs, tmpfs, ramfs, f2fs, squashfs, erofs, NFS, bcachefs; and
#: zfs. On others (FUSE, FAT, overlayfs of several filesystems) a number may change after cache eviction.
_KEEP_NUMBERS: Final = frozenset({
    0xEF53, 0x58465342, 0x9123683E, calls.TMPFS_MAGIC, calls.RAMFS_MAGIC, 0xF2F52010, 0x73717368, 0xE0F5E1E2,
    calls.NFS_MAGIC, 0xCA451A4E, 0x2FC12FC1,
})  # fmt: skip


#: A `Layer.key` that matches no object.
NO_KEY: Final = -1
#: More lookups than any directory without whiteouts by name has.
_MANY: Final = 1 << 30


class Layer:
    """One directory tree of the stack; ``root`` is its place, whose fd stays open."""

    __slots__ = (
        "acl", "atime_stays", "dev", "in_place", "index", "is_idmapped", "is_upper", "keeps_numbers",
        "links_of_removed", "memory", "path", "permissions", "quiet", "root",
    )  # fmt: skip

    def __init__(
        self, index: int, path: str, root_fd: int, *, is_upper: bool, quiet: bool = False
    ) -> None:
        """``quiet``: reading must not change access times."""
        self.index = index
        self.path = path
        self.is_upper = is_upper
        #: Whether its objects are changed in place, without a copy-up.
        self.in_place = is_upper
        self.root = Place(self, None, b"", root_fd)
        self.dev = os.stat(root_fd).st_dev
        self.acl = _has_acls(root_fd)
        #: Whether reading does not change access times, as in a lower's read-only clone.
        self.atime_stays = bool(os.fstatvfs(root_fd).f_flag & (os.ST_RDONLY | os.ST_NOATIME))
        #: Whether to open files with O_NOATIME, which fails for files of other users.
        self.quiet = quiet and not self.atime_stays and os.stat(root_fd).st_uid == os.geteuid()
        #: In memory: no need to sync, and reads never wait for a disk.
        magic = calls.filesystem_magic(root_fd)
        self.memory = magic in (calls.TMPFS_MAGIC, calls.RAMFS_MAGIC)
        #: The link count of a removed file that is still open: on NFS it has another name (`.nfs` and a
        #: number, fs/nfs/unlink.c) until it is closed.
        self.links_of_removed = 1 if magic == calls.NFS_MAGIC else 0
        #: Whether objects keep their inode numbers.
        self.keeps_numbers = magic in _KEEP_NUMBERS
        #: Whether its mount maps ids (known only to a union that does so, too).
        self.is_idmapped = False
        #: How its objects have owner, mode and type in an xattr; None: as they are.
        self.permissions: Permissions | None = None

    def has_mapped_ids(self) -> None:
        """Record that its mount maps ids."""
        self.is_idmapped = True

    def keeps_permissions(self, permissions: Permissions) -> None:
        """Record that its objects have owner, mode and type in an xattr."""
        self.permissions = permissions

    @property
    def root_fd(self) -> int:
        return self.root.fd

    def key(self, st: os.stat_result) -> int:
        """Identifies the object with these attributes against a replacement under its name; 0: not possible.

        The kernel checks permissions with the attributes it received. A user who may rename in a layer can
        replace one of their own objects with another user's, so an object found again by its name must be the
        same one; in a lower, whose attributes do not change, with the same owner and mode.
        """
        number = st.st_ino if self.keeps_numbers else 0
        if self.permissions is not None:
            return number  # the attributes shown are others
        return number if self.is_upper else hash((number, st.st_uid, st.st_gid, st.st_mode))


class BoundLayer(Layer):
    """Storage shown at one place of the union without merging. Other processes change it too."""

    __slots__ = ("read_only",)

    def __init__(self, index: int, path: str, root_fd: int, *, read_only: bool) -> None:
        super().__init__(index, path, root_fd, is_upper=False)
        self.in_place = True
        self.read_only = read_only

    def key(self, st: os.stat_result) -> int:
        return 0


def _has_acls(fd: int) -> bool:
    """Whether the filesystem has POSIX ACLs: then ENODATA reports a missing one."""
    try:
        os.getxattr(b"/proc/self/fd/%d" % fd, b"system.posix_acl_access")
    except OSError as error:
        return error.errno == errno.ENODATA
    return True


class Place:
    """A directory of one layer. ``fd`` is -1 unless the gate has it open."""

    __slots__ = (
        "asked_named", "copied", "default_acl", "empty", "fd", "identity", "impure", "key", "layer",
        "mtime_ns", "name", "parent",
    )  # fmt: skip

    def __init__(
        self, layer: Layer, parent: Place | None, name: bytes, fd: int = -1, *, key: int = 0
    ) -> None:
        self.layer = layer
        #: The directory's `Layer.key`; 0: unknown.
        self.key = key
        self.parent = parent
        self.name = name
        self.fd = fd
        #: In the upper: the default ACL, b"" if there is none; None: unknown.
        self.default_acl: bytes | None = None
        #: In the upper: a copied-up directory into which nothing has been put since.
        self.empty = False
        #: In the upper: its time of modification after a copy-up; valid while `Node.ctime` is `UNSEEN`.
        self.mtime_ns = 0
        #: The number of lookups of whiteouts by name in it; -1: it is known to have none.
        self.asked_named = 0
        #: Whether it may contain copies, and whether it is one itself; see `origin`.
        self.impure = False
        self.copied = False
        #: Device and inode number, for all but the topmost part of a directory.
        self.identity = (0, 0)

    def move(self, parent: Place, name: bytes) -> None:
        """Record a rename."""
        self.parent, self.name = parent, name

    def found_as(self, place: Place) -> None:
        """Record that its directory was found as another place of the same layer."""
        assert place.parent is not None
        self.parent, self.name, self.key = place.parent, place.name, place.key

    def lost(self) -> None:
        """Record that another object has its name."""
        self.key = NO_KEY

    def stands_for(self, st: os.stat_result) -> None:
        """Set its directory to the one with these attributes."""
        self.key = self.layer.key(st)

    def marked(self, *, impure: bool, copied: bool) -> None:
        """Record whether it may contain copies, and whether it is one itself."""
        self.impure, self.copied = impure, copied

    def is_object(self, st: os.stat_result) -> None:
        """Record its device and inode number."""
        self.identity = st.st_dev, st.st_ino

    def copied_up(self, *, empty: bool) -> None:
        """Record its copy-up; ``empty``: it stays known as empty until :meth:`fills`."""
        self.empty = empty
        self.knows_named(some=False)

    def fills(self) -> None:
        """An entry is about to be added to it."""
        self.empty = False

    def keep_mtime(self, mtime_ns: int) -> None:
        """Record its time of modification before a copy-up added an entry."""
        self.mtime_ns = mtime_ns

    def ask_named(self) -> None:
        """Count a lookup of a whiteout by name."""
        self.asked_named += 1

    def knows_named(self, *, some: bool) -> None:
        """Record whether it has whiteouts by name; see `named`."""
        self.asked_named = _MANY if some else -1

    def forget_named(self) -> None:
        """Forget whether it has whiteouts by name, which others may have changed in a lower."""
        if not self.layer.is_upper:
            self.asked_named = 0

    def know_default_acl(self, acl: bytes | None) -> None:
        """Record its default ACL; None: it has changed."""
        self.default_acl = acl


class LowerData(NamedTuple):
    """Where the data of a metacopy file lies."""

    place: Place
    """The real directory that contains it as ``name``."""
    name: bytes
    key: int
    """Its `Layer.key`."""
    blocks: int
    """Its ``st_blocks``, which the file shows."""


class Gate:
    """Directory fds (O_PATH), opened on demand; the least recently used are closed.

    An fd from :meth:`fd` is valid until ``capacity`` other directories were requested: use it at once, and
    duplicate it for another thread.
    """

    def __init__(self, capacity: int = 1024, rights: Rights | None = None) -> None:
        self.capacity = max(capacity, 64)
        #: For accesses that permission bits deny to their owner.
        self.rights = rights or Rights()
        self._recent: OrderedDict[Place, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._recent)

    def fd(self, place: Place) -> int:
        """The directory's fd. Raises ``OSError`` (ENOENT, EACCES ...) if it cannot be opened, ESTALE if
        another directory now has its name."""
        fd = place.fd
        if fd >= 0:
            if place.parent is not None:
                self._recent.move_to_end(place)
            return fd
        chain: list[Place] = []
        above: Place | None = place
        while above is not None and above.fd < 0:
            chain.append(above)
            above = above.parent
        assert above is not None, "the root of a layer is always open"
        fd = above.fd
        for step in reversed(chain):
            try:
                fd = os.open(step.name, _DIRECTORY, dir_fd=fd)
            except PermissionError as error:
                fd = self.rights.open(fd, step.name, _DIRECTORY, error, upper=step.layer.is_upper)
            if step.key and step.layer.key(os.fstat(fd)) != step.key:
                os.close(fd)
                raise OSError(errno.ESTALE, "a layer holds another directory there")
            step.fd = fd
            self._recent[step] = None
            if len(self._recent) > self.capacity:
                oldest, _ = self._recent.popitem(last=False)
                os.close(oldest.fd)
                oldest.fd = -1
        return fd

    def open_for_listing(self, place: Place) -> int:
        """A new readable fd of the directory. Raises ``OSError``."""
        fd = self.fd(place)
        try:
            return open_for_listing(fd, quiet=place.layer.quiet)
        except PermissionError as error:
            return self.rights.open(fd, b".", _LISTED, error, upper=place.layer.is_upper)

    def reopen(self, layer: Layer, path_fd: int, flags: int) -> int:
        """Open the object of an O_PATH fd. Raises ``OSError``."""
        try:
            return os.open(b"/proc/self/fd/%d" % path_fd, flags)
        except PermissionError as error:
            return self.rights.reopen(path_fd, flags, error, upper=layer.is_upper)

    def stat_refused(self, place: Place, name: bytes, refused: OSError) -> os.stat_result | None:
        """fstatat(2) of a name in the directory, after it was ``refused``; None if missing.

        A layer's filesystem may have a shorter name limit: such a name is missing, as in namei.c,
        ovl_lookup_single. Raises ``OSError``.
        """
        if refused.errno not in NOT_THERE:
            try:
                return self.rights.stat(self.fd(place), name, refused, upper=place.layer.is_upper)
            except FileNotFoundError:
                pass
        return None

    def forget(self, place: Place) -> None:
        """Close the fd of a directory that no longer exists."""
        if place.fd >= 0 and self._recent.pop(place, place) is None:
            os.close(place.fd)
            place.fd = -1

    def close(self) -> None:
        """Close every fd."""
        self.rights.close()
        for place in self._recent:
            os.close(place.fd)
            place.fd = -1
        self._recent.clear()
