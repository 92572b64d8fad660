"""The layers of a union: opened, locked, synchronized and closed.

As root, a daemon accesses layers through private detached bind mounts: a read-only one for each lower, so
that a bug ends in EROFS, and one for upper and work, as a rename needs both on one mount. The filesystems
under a union can be unmounted as soon as the union is. An ordinary user's daemon opens the directories.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, Final

from unionfs.core.places import BoundLayer, Layer
from unionfs.errors import LayerError, reason
from unionfs.settings.features import DEFAULTS, Features
from unionfs.settings.shown import AS_STORED, Shown
from unionfs.sys import calls, detached
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability
from unionfs.sys.fds import Files, Owned, open_for_listing
from unionfs.sys.filelocks import may_be_a_mounts
from unionfs.sys.mountinfo import mount_id_of_path, read_mountinfo
from unionfs.sys.trees import remove
from unionfs.union import leases, opening, permissions
from unionfs.union.leasekeeper import Keeper
from unionfs.union.leftovers import remove_leftovers
from unionfs.union.markers import Markers
from unionfs.union.owners import Owners
from unionfs.union.redirecting import mode, parameter

log = logging.getLogger(__name__)

_NO_LOCKS: Final = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class LayerStack:
    """All layers of one union, topmost first, and the work directory of the upper."""

    def __init__(
        self,
        layers: list[Layer],
        work_root: int,
        work_fd: int,
        markers: Markers,
        resources: Files,
        shown: Shown = AS_STORED,
        lease: Keeper | None = None,
    ) -> None:
        self.layers = layers
        self.upper = layers[0] if layers[0].is_upper else None
        self.work_fd = work_fd
        self._work_root = work_root
        self.markers = markers
        self.volatile = False
        self.features = DEFAULTS
        #: Storage shown at places of the union without merging.
        self.bound: list[BoundLayer] = []
        self.acl = all(layer.acl for layer in layers) and shown.acl and not shown.permissions
        #: How owners are shown; None: as they are stored.
        self.owners = None if replace(shown, acl=True, permissions=0) == AS_STORED else Owners(shown)
        #: Whether owner, mode and type of objects are in xattrs; see `permissions`.
        self.keeps_permissions = bool(shown.permissions)
        #: Keeps other hosts from mounting the upper, if they can reach it.
        self.lease = lease
        #: Devices whose files cannot share blocks with the upper's.
        self.never_clones: set[int] = set()
        self._resources = resources
        self._indexes: set[int] = set()

    @classmethod
    def open(
        cls,
        lowers: Sequence[str],
        upper: str | None,
        work: str | None,
        *,
        userxattr: bool = False,
        volatile: bool = False,
        features: Features = DEFAULTS,
        shown: Shown = AS_STORED,
        scratch: int | None = None,
        atime: Sequence[str] = (),
    ) -> LayerStack:
        """Open every layer, lock upper and work, and empty a crashed daemon's leftovers in work.

        The paths are resolved (realpath(3)); a symlink in one is refused. ``scratch``: an O_PATH fd of an
        empty private directory, in which upper and work are made; it is closed with the stack. ``atime``:
        words of mount(8) about the access times of the upper.

        Raises ``LayerError`` or ``OSError``, and then leaves nothing open.
        """
        privileged = has_capability(CAP_SYS_ADMIN)
        with Files() as resources:
            layers: list[Layer] = []
            lease, work_root, work_fd = None, -1, -1
            if upper is not None:
                if work is None:
                    raise LayerError(
                        f"upper {upper} needs a work directory on the same filesystem; give one with --work."
                    )
                upper_fd, work_root = opening.open_upper_and_work(upper, work, privileged, resources, atime)
                alone = lock(upper_fd, upper, "upper", resources)
                lock(work_root, work, "work", resources)
                lease = _lease(upper_fd, upper, resources, alone=alone)
                work_fd = opening.prepare_work(work_root, work, upper_fd, resources)
                if volatile:
                    opening.mark_volatile(work_fd)
                    resources.callback(_unmark, work_fd, lease)
                layers.append(Layer(0, upper, upper_fd, is_upper=True, quiet="noatime" in atime))
            elif scratch is not None:
                resources.own(scratch)
                opening.set_atime(scratch, atime)
                upper_fd, work_root, work_fd = opening.make_upper_and_work(scratch, lowers, resources)
                layers.append(Layer(0, "", upper_fd, is_upper=True))
            for path in lowers:
                fd = opening.open_lower(path, privileged)
                resources.own(fd)
                layers.append(Layer(len(layers), path, fd, is_upper=False, quiet=True))
            if not layers:
                raise LayerError("a union needs at least one layer; give one with --lower.")
            prefix = _prefix(trusted=privileged and not userxattr)
            markers, chosen = _choose(features, prefix, layers[0], work_fd)
            if shown.uids or shown.gids:
                _find_idmapped(layers)
            if shown.permissions:
                permissions.find(layers, shown.permissions)
            stack = cls(layers, work_root, work_fd, markers, resources.pop_all(), shown, lease)
            stack.volatile, stack.features = volatile, chosen
            return stack

    @classmethod
    def resume(
        cls,
        kept: Mapping[str, Any],
        lowers: Sequence[str],
        upper: str | None,
        *,
        userxattr: bool = False,
        volatile: bool = False,
        shown: Shown = AS_STORED,
        atime: Sequence[str] = (),
    ) -> LayerStack:
        """The same layers, by the fds that a former daemon of the mount had open; see :meth:`kept`.
        Removes its temporaries. Writes nothing else: the upper may have become read-only. Raises
        ``LayerError``, ``OSError``; then only the fds are closed."""
        privileged = has_capability(CAP_SYS_ADMIN)
        with Files() as resources:
            for fd in kept["files"]:
                resources.own(fd)
            work_root, work_fd = kept["work_root"], kept["work"]
            lease = None
            if kept["lease"] is not None:
                resumed = leases.Lease.resume(upper or "", **kept["lease"])
                resumed.renew()  # another host may be about to take it over
                lease = Keeper(resumed)
            if work_fd >= 0 and (lease is None or not lease.lost):
                remove_leftovers(kept["layers"][0], work_fd)
            layers: list[Layer] = []
            paths = [*([upper or ""] if work_fd >= 0 else []), *lowers]
            for path, fd, known in zip(paths, kept["layers"], kept["known"], strict=True):
                is_upper = work_fd >= 0 and not layers
                quiet = not is_upper or (upper is not None and "noatime" in atime)
                layers.append(Layer(len(layers), path, fd, is_upper=is_upper, quiet=quiet, known=known))
            chosen = Features.from_json(kept["features"])
            markers = _markers(_prefix(trusted=privileged and not userxattr), chosen.redirect_dir)
            if shown.permissions:
                permissions.find(layers, shown.permissions)
            for layer, mapped in zip(layers, kept["mapped"], strict=True):
                if mapped:
                    layer.has_mapped_ids()
            # Not before: after a failure the mount lives on, for another daemon.
            if lease is not None:
                resources.callback(lease.end)
            if volatile and work_fd >= 0:
                resources.callback(_unmark, work_fd, lease)
            stack = cls(layers, work_root, work_fd, markers, resources.pop_all(), shown, lease)
            stack.volatile, stack.features = volatile, chosen
            return stack

    def kept(self) -> dict[str, Any]:
        """What :meth:`resume` needs in another process with the same open files: JSON-able."""
        return {
            "files": [fd for fd in self._resources.fds() if fd not in self._indexes],
            "layers": [layer.root_fd for layer in self.layers],
            # Of a lower, which does not change; the upper's xattrs do.
            "known": [None if layer.is_upper else layer.known for layer in self.layers],
            "mapped": [layer.is_idmapped for layer in self.layers],
            "work_root": self._work_root,
            "work": self.work_fd,
            "lease": None if self.lease is None else self.lease.kept(),
            "features": asdict(self.features),
        }

    @property
    def durable(self) -> bool:
        """Whether copy-ups and fsync must reach a disk."""
        return self.upper is not None and not self.volatile and not self.upper.memory

    def has_layers(self, layers: Sequence[Layer]) -> None:
        """Set the layers, topmost first; each keeps its fd until the end."""
        self.layers[:] = layers
        self.upper = self.layers[0] if self.layers[0].is_upper else None

    def claim(self, fd: int, path: str) -> None:
        """Lock another upper, and close its fd with the stack. Raises ``LayerError``, ``OSError``."""
        self._resources.own(fd)
        lock(fd, path, "upper", self._resources)

    def own_lower(self, fd: int) -> int:
        """Take over the O_PATH fd of one more lower, read-only if possible: returns the fd to use."""
        self._resources.own(fd)
        self.protect(fd)
        return fd

    def protect(self, fd: int) -> None:
        """Make the O_PATH fd of a directory one of a read-only clone, as that of a lower, if possible."""
        with suppress(OSError), Owned(detached.clone(fd, read_only=True)) as clone:
            os.dup2(clone, fd, inheritable=False)

    def identities(self) -> tuple[tuple[int, int], ...]:
        """(st_dev, st_ino) of upper and work."""
        fds = [] if self.upper is None else [self.upper.root_fd, self._work_root]
        return tuple((st.st_dev, st.st_ino) for st in map(os.fstat, fds))

    def renew_index(self) -> None:
        """Replace WORKDIR/index, if there is one, by an empty directory. Raises ``OSError``."""
        try:
            os.stat(b"index", dir_fd=self._work_root, follow_symlinks=False)
        except FileNotFoundError:
            return
        remove(self._work_root, b"index")
        os.mkdir(b"index", 0o700, dir_fd=self._work_root)

    def exchange_index(self, at: int, name: bytes) -> None:
        """Exchange WORKDIR/index with another directory on its filesystem. Raises ``OSError``."""
        calls.renameat2(self._work_root, b"index", at, name, calls.RENAME_EXCHANGE)

    def index_directory(self, *, make: bool) -> int:
        """An O_PATH fd of WORKDIR/index, private like work; -1 if it is missing, and not made."""
        fd = opening.index_directory(self._work_root, self._resources, make=make)
        self._indexes.add(fd)
        return fd

    def bind(self, path: str, root_fd: int, *, read_only: bool) -> BoundLayer:
        """A layer for a directory or file shown at one place. The O_PATH fd is closed with the stack."""
        self._resources.own(root_fd)
        layer = BoundLayer(-1 - len(self.bound), path, root_fd, read_only=read_only)
        self.bound.append(layer)
        return layer

    def close_lowers(self) -> None:
        """Close the lowers, so that their filesystems can be unmounted."""
        for layer in self.layers:
            if not layer.is_upper:
                _replace_by_nothing(layer.root_fd)

    def sync_upper(self) -> None:
        """syncfs(2) of the upper's filesystem."""
        if self.upper is not None:
            _syncfs(self.upper.root_fd)

    def sync_bound(self) -> None:
        """syncfs(2) of the filesystems of bound storage."""
        for layer in self.bound:
            _syncfs(layer.root_fd)

    def close(self) -> None:
        """Close all fds, including the locks."""
        self._resources.close()


def slow_devices(known: Iterable[Mapping[str, Any] | None]) -> set[int]:
    """The devices of the layers whose calls wait for a server, by `LayerStack.kept`'s ``known``."""
    return {one["root"][0] for one in known if one is not None and one.get("bare") is not None}


def _choose(features: Features, prefix: bytes, top: Layer, work_fd: int) -> tuple[Markers, Features]:
    """The markers, and the features with their defaults; ``top``: the topmost layer. Raises LayerError."""
    upper = top if top.is_upper else None
    wanted = features.redirect_dir or ("on" if features.metacopy == "on" else None)
    redirects = mode(wanted, prefix, upper)
    markers = _markers(prefix, redirects)
    metacopy = "off" if upper is None else _metacopy(features.metacopy, redirects, upper, markers, work_fd)
    return markers, replace(features, redirect_dir=redirects, metacopy=metacopy)


def _prefix(*, trusted: bool) -> bytes:
    return b"trusted.overlay." if trusted else b"user.overlay."


def _markers(prefix: bytes, redirects: str | None) -> Markers:
    return Markers(prefix, follows_redirects=redirects != "nofollow")


def _metacopy(wanted: str | None, redirects: str, upper: Layer, markers: Markers, work_fd: int) -> str:
    """Whether a change of metadata copies up metadata alone, ``on`` or ``off``: as wanted, else overlayfs's
    default (super.c, ovl_metacopy_def) if redirects are written, which it needs.

    Raises LayerError if it is wanted but not possible.
    """
    if wanted is None and (redirects != "on" or parameter("metacopy", "N") == "N"):
        return "off"
    if wanted == "off":
        return "off"
    path, name = b"/proc/self/fd/%d" % work_fd, markers.metacopy
    cure = "leave metacopy=on out"
    try:
        if not markers.follows_metacopy:
            cure += ", or mount as root without userxattr"
            raise OSError(errno.EPERM, "every user could make such a file for the data of others")
        os.setxattr(path, name, b"")
        os.removexattr(path, name)
    except OSError as error:
        if wanted is None:
            return "off"
        raise LayerError(
            f"metacopy=on is not possible with upper {upper.path or 'on the tmpfs'}: {error.strerror}; "
            f"{cure}."
        ) from error
    return "on"


def _syncfs(root_fd: int) -> None:
    with Owned(os.open(b"/proc/self/fd/%d" % root_fd, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as fd:
        calls.syncfs(fd)


def _find_idmapped(layers: Sequence[Layer]) -> None:
    """Find the layers whose mounts map ids (mountinfo's option `idmapped`, fs/proc_namespace.c)."""
    mounts = {entry.mount_id for entry in read_mountinfo() if "idmapped" in entry.options.split(",")}
    for layer in layers:
        if mounts and layer.path and mount_id_of_path(layer.path) in mounts:
            layer.has_mapped_ids()


def _replace_by_nothing(fd: int) -> None:
    """Release the directory but keep the fd number, which :meth:`LayerStack.close` closes."""
    null = os.open("/dev/null", os.O_PATH | os.O_CLOEXEC)
    os.dup2(null, fd, inheritable=False)
    os.close(null)


def _lease(upper_fd: int, upper: str, resources: Files, *, alone: bool) -> Keeper | None:
    """A lease on an upper that other hosts may see; see `leases.claim`. It ends with `resources`."""
    if leases.filesystem(upper_fd) is None:
        return None
    # By the upper's own mount: the filesystem can be unmounted elsewhere.
    parent = os.open(b"..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=upper_fd)
    resources.own(parent)
    return leased(upper_fd, upper, parent, resources, alone=alone)


def _unmark(work_fd: int, lease: Keeper | None) -> None:
    """Remove the mark of a volatile mount, unless it may be another host's by now. An error is logged."""
    try:
        if lease is None or lease.is_sure():
            remove(work_fd, b"incompat")
    except OSError as error:
        log.error("the mark of a volatile mount cannot be removed: %s", reason(error))


def leased(upper_fd: int, upper: str, parent: int, resources: Files, *, alone: bool) -> Keeper:
    """The same by the O_PATH fd of the directory above it."""
    found = os.stat(os.path.basename(upper), dir_fd=parent, follow_symlinks=False)
    if not os.path.samestat(found, os.fstat(upper_fd)):
        raise LayerError(f"upper {upper} was replaced while it was mounted; try again.")
    lease = leases.claim(upper_fd, upper, parent, alone=alone)
    resources.own(lease.fd)
    keeper = Keeper(lease)
    resources.callback(keeper.end)
    return keeper


def lock(fd: int, path: str, role: str, resources: Files) -> bool:
    """Hold flock(2) on the directory for the life of the mount, so that other mounts refuse it. Returns
    whether it is held.

    Any user who can read a directory can lock it; a lock of a user who may not write it is not a mount's.
    """
    lock = open_for_listing(fd)
    resources.own(lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError as error:
        if not may_be_a_mounts(lock):
            return False
        raise LayerError(
            f"{role} {path} is already in use by another mount; unmount that first or give another {role}."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
