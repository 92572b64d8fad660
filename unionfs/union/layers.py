"""Opening the layers of a union, and letting go of them.

As root every layer is reached through a private detached bind mount: read-only for lowers, so that a bug
is EROFS and not damage, and one for upper and work together (a rename needs both on one mount), so that the
filesystems under a union can be unmounted the moment the union is gone. An ordinary user's daemon opens the
directories themselves.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

from unionfs.sys import calls
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability
from unionfs.sys.filelocks import may_be_a_mounts
from unionfs.union import opening
from unionfs.union.errors import LayerError
from unionfs.union.places import Place, open_for_listing

_NO_LOCKS: Final = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
#: include/uapi/linux/magic.h: ext2 to 4, xfs, btrfs, tmpfs, ramfs, f2fs, squashfs, erofs, NFS, bcachefs; and
#: zfs. On others (FUSE, FAT, overlayfs of several filesystems) a number may go with the kernel's cache.
_KEEP_NUMBERS: Final = frozenset({
    0xEF53, 0x58465342, 0x9123683E, calls.TMPFS_MAGIC, calls.RAMFS_MAGIC, 0xF2F52010, 0x73717368, 0xE0F5E1E2,
    calls.NFS_MAGIC, 0xCA451A4E, 0x2FC12FC1,
})  # fmt: skip


class Layer:
    """One directory tree of the stack; ``root`` is its place, whose fd stays open.

    ``bound``: it is no layer of the merge but storage that is shown at one place of the union; see `bound`.
    """

    __slots__ = (
        "acl", "atime_stays", "bound", "dev", "index", "is_upper", "keeps_numbers", "links_of_removed",
        "memory", "path", "read_only", "root",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        path: str,
        root_fd: int,
        *,
        is_upper: bool,
        bound: bool = False,
        read_only: bool = False,
    ) -> None:
        self.index = index
        self.path = path
        #: Its objects are changed where they are.
        self.is_upper = is_upper
        self.bound = bound
        #: Of storage that may not be changed (a lower never is).
        self.read_only = read_only
        self.root = Place(self, None, b"", root_fd)
        self.dev = os.stat(root_fd).st_dev
        self.acl = _has_acls(root_fd)
        #: Whether reading leaves the times of access alone, as with a lower's read-only clone.
        self.atime_stays = bool(os.fstatvfs(root_fd).f_flag & (os.ST_RDONLY | os.ST_NOATIME))
        #: In memory: nothing to make durable, and reads never wait for a disk.
        magic = calls.filesystem_magic(root_fd)
        self.memory = magic in (calls.TMPFS_MAGIC, calls.RAMFS_MAGIC)
        #: How many links a file has that was removed while an fd of it is held: on NFS it gets another name
        #: (`.nfs` and a number, fs/nfs/unlink.c) until it is let go of.
        self.links_of_removed = 1 if magic == calls.NFS_MAGIC else 0
        #: Whether an object has the same inode number for as long as it lives.
        self.keeps_numbers = magic in _KEEP_NUMBERS

    @property
    def root_fd(self) -> int:
        return self.root.fd

    def key(self, st: os.stat_result) -> int:
        """What tells an object with these attributes from another one that gets its name; 0: nothing.

        The kernel checks permissions by the attributes that it was told. Whoever may rename in a layer can
        put another user's object in the place of an own one, so an object that is found again by its name
        must be the same one; in a lower, whose attributes do not change, also as accessible as it was.
        """
        if self.bound:
            return 0
        number = st.st_ino if self.keeps_numbers else 0
        return number if self.is_upper else hash((number, st.st_uid, st.st_gid, st.st_mode))


def _has_acls(fd: int) -> bool:
    """Whether the filesystem keeps POSIX ACLs: asking for one that is not there says ENODATA then."""
    try:
        os.getxattr(b"/proc/self/fd/%d" % fd, b"system.posix_acl_access")
    except OSError as error:
        return error.errno == errno.ENODATA
    return True


class LayerStack:
    """All layers of one union, topmost first, and the work directory of the upper."""

    def __init__(self, layers: list[Layer], work_fd: int, xattr_prefix: bytes, resources: ExitStack) -> None:
        self.layers = layers
        self.upper = layers[0] if layers[0].is_upper else None
        self.work_fd = work_fd
        self.xattr_prefix = xattr_prefix
        #: A redirect shows what is anywhere in a layer without the permission checks on the way. Any user can
        #: set a `user.*` one, so these are refused, as overlayfs does with `userxattr` (params.c).
        self.follows_redirects = not xattr_prefix.startswith(b"user.")
        self.volatile = False
        #: What is shown at places of the union without being merged.
        self.bound: list[Layer] = []
        self.acl = all(layer.acl for layer in layers)
        #: Devices whose files can't share blocks with the upper's.
        self.never_clones: set[int] = set()
        self._resources = resources

    @classmethod
    def open(
        cls,
        lowers: Sequence[str],
        upper: str | None,
        work: str | None,
        *,
        userxattr: bool = False,
        volatile: bool = False,
        scratch: int | None = None,
    ) -> LayerStack:
        """Open every layer, lock upper and work, and empty what a crashed daemon left in work.

        The paths have no symlinks (realpath(3)), and one that is on the way all the same is refused.
        ``scratch``: an O_PATH fd of an empty directory that nobody else reaches; upper and work are made in
        it, and no path is given for them. It stays open as long as the stack, and is closed with it.

        Raises ``LayerError`` or ``OSError``; nothing stays open then.
        """
        privileged = has_capability(CAP_SYS_ADMIN)
        with ExitStack() as resources:
            layers: list[Layer] = []
            work_fd = -1
            if upper is not None:
                if work is None:
                    raise LayerError(
                        f"upper {upper} needs a work directory on the same filesystem; give one with --work"
                    )
                upper_fd, work_root = opening.open_upper_and_work(upper, work, privileged, resources)
                _lock(upper_fd, upper, "upper", resources)
                _lock(work_root, work, "work", resources)
                work_fd = opening.prepare_work(work_root, work, os.fstat(upper_fd).st_uid, resources)
                layers.append(Layer(0, upper, upper_fd, is_upper=True))
            elif scratch is not None:
                resources.callback(os.close, scratch)
                upper_fd, work_fd = opening.make_upper_and_work(scratch, lowers, resources)
                layers.append(Layer(0, "", upper_fd, is_upper=True))
            for path in lowers:
                fd = opening.open_lower(path, privileged)
                resources.callback(os.close, fd)
                layers.append(Layer(len(layers), path, fd, is_upper=False))
            if not layers:
                raise LayerError("a union needs at least one layer; give one with --lower")
            prefix = b"trusted.overlay." if privileged and not userxattr else b"user.overlay."
            stack = cls(layers, work_fd, prefix, resources.pop_all())
            stack.volatile = volatile
            return stack

    @property
    def durable(self) -> bool:
        """Whether copy-ups and fsync must reach a disk."""
        return self.upper is not None and not self.volatile and not self.upper.memory

    def bind(self, path: str, root_fd: int, *, read_only: bool) -> Layer:
        """A tree, or a single file, to be shown at one place. The fd (O_PATH) is closed with the stack."""
        self._resources.callback(os.close, root_fd)
        layer = Layer(-1 - len(self.bound), path, root_fd, is_upper=True, bound=True, read_only=read_only)
        self.bound.append(layer)
        return layer

    def close_lowers(self) -> None:
        """Let go of the lowers, so that their filesystems can be unmounted."""
        for layer in self.layers:
            if not layer.is_upper:
                _replace_by_nothing(layer.root_fd)

    def sync_upper(self) -> None:
        """Wait until all of the upper's filesystem is on disk."""
        if self.upper is not None:
            fd = open_for_listing(self.upper.root_fd)
            try:
                calls.syncfs(fd)
            finally:
                os.close(fd)

    def sync_bound(self) -> None:
        """Wait until the filesystems of what is bound are on disk."""
        for layer in self.bound:
            fd = os.open(b"/proc/self/fd/%d" % layer.root_fd, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                calls.syncfs(fd)
            finally:
                os.close(fd)

    def close(self) -> None:
        """Close everything, the locks too."""
        self._resources.close()


def _replace_by_nothing(fd: int) -> None:
    """Let go of what ``fd`` stands for but keep its number, which :meth:`LayerStack.close` closes."""
    null = os.open("/dev/null", os.O_PATH | os.O_CLOEXEC)
    os.dup2(null, fd, inheritable=False)
    os.close(null)


def _lock(fd: int, path: str, role: str, resources: ExitStack) -> None:
    """Hold flock(2) on the directory for the life of the mount: another mount of it sees that.

    Whoever can read a directory can lock it, so the lock of a user who may not write it is not a mount's.
    """
    lock = open_for_listing(fd)
    resources.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if not may_be_a_mounts(lock):
            return
        raise LayerError(
            f"{role} {path} is already in use by another mount; unmount that first or give another {role}"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
