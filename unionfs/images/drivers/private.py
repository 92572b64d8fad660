"""Root filesystems that are mounted where only one process and its container see them.

The process enters a mount namespace of its own, so that the kernel unmounts everything with the last process
of the container, however the first one ends, and so that no other namespace gets a copy of the mounts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from unionfs.core.places import Layer
from unionfs.daemon.settle import settle
from unionfs.daemon.storage import Storage
from unionfs.errors import UserError, on_failure
from unionfs.images.drivers.base import Wanted, Writable
from unionfs.images.drivers.uppers import prefix
from unionfs.settings.specs import Spec
from unionfs.storage import sources
from unionfs.sys import detached
from unionfs.sys.fds import Owned
from unionfs.sys.namespaces import CLONE_NEWNS, enter, unshare
from unionfs.sys.unmount import MNT_DETACH, umount2
from unionfs.union.markers import Markers

_PATH = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class _Tree:
    """A mounted tree, from which new volumes are filled."""

    layers: list[Layer]
    markers: Markers


class PrivateMount:
    """A root filesystem at `merged`, and its storage on top."""

    def __init__(
        self,
        layer: Writable,
        wanted: Wanted,
        attach: Callable[[], None],
        detach: Callable[[], None] = lambda: None,
    ) -> None:
        """Mount it. Raises UserError, with everything undone.

        `attach` mounts the root at `merged`; `detach` releases what that has taken besides the mount.
        """
        self.path = layer.merged
        self._detach = detach
        for spec in wanted.storage:
            sources.check(spec)
        settings = settle(layer.merged, lowers=layer.lowers, storage=wanted.storage, storage_root=layer.root)
        self._files = ExitStack()
        # The namespace, root and working directory outside.
        self._outside = [self._open("/proc/self/ns/mnt", os.O_RDONLY), self._open("/"), self._open(".")]
        self._storage: Storage | None = None
        try:
            # Before this process leaves the namespace in which volumes are mounted.
            self._storage = Storage(settings) if settings.storage else None
            with on_failure("a mount namespace cannot be created", "raise user.max_mnt_namespaces"):
                unshare(CLONE_NEWNS)
            self._mount(attach)
        except BaseException:
            self.unmount()
            raise

    def _open(self, path: str, flags: int = _PATH) -> int:
        return self._files.enter_context(Owned(os.open(path, flags | os.O_CLOEXEC)))

    def _mount(self, attach: Callable[[], None]) -> None:
        with Owned(os.open("/", _PATH)) as root:
            detached.change(root, propagation=detached.PROPAGATION["slave"], recursive=True)
        attach()
        if self._storage is None:
            return
        with Owned(os.open(self.path, _PATH)) as root, Owned(os.open(self.path, _PATH)) as tree:
            layer = Layer(0, self.path, tree, is_upper=False)
            self._storage.mount_below(root, _Tree([layer], Markers(prefix())))
        self._storage.keep()

    @property
    def storage(self) -> Sequence[Spec]:
        return () if self._storage is None else self._storage.settings.storage

    def is_alive(self) -> bool:
        return True

    def unmount(self) -> None:
        self._take_down()
        left = self._leave()
        if left and self._storage is not None:
            self._storage.let_go()
            self._storage = None
        self._files.close()

    def abandon(self) -> None:
        """The guardian of the storage, which is outside of the namespace, releases the volumes."""
        with suppress(UserError, OSError):
            self._take_down()

    def _take_down(self) -> None:
        with suppress(OSError):  # EINVAL: nothing is mounted there any more
            while True:  # images of lowers are below the overlay
                umount2(self.path, MNT_DETACH)
        self._detach()

    def _leave(self) -> bool:
        """Go back to the namespace outside. Returns False where that is not possible: it belongs to another
        user namespace, or this process has another thread. The guardian then releases the storage.
        """
        namespace, root, directory = self._outside
        try:
            enter(namespace)
        except OSError:
            return False
        os.fchdir(root)
        os.chroot(".")
        os.fchdir(directory)
        return True


class PlainTree:
    """A directory that needs no mount: without root there can be none."""

    storage: Sequence[Spec] = ()

    def __init__(self, path: str) -> None:
        self.path = path

    def is_alive(self) -> bool:
        return True

    def unmount(self) -> None:
        pass

    def abandon(self) -> None:
        pass


def attach_device(fstype: str, source: str, target: str) -> None:
    """Mount the filesystem on a device at a directory. Raises OSError."""
    with (
        Owned(detached.new_filesystem(fstype, [("source", source)])) as mount,
        Owned(os.open(target, _PATH)) as place,
    ):
        detached.attach(mount, place)


@contextmanager
def mounted_device(fstype: str, source: str, *, read_only: bool = False) -> Iterator[str]:
    """The path of a filesystem on a device, which is mounted nowhere. Raises OSError."""
    options = [("source", source), *([("ro", "")] if read_only else [])]
    with Owned(detached.new_filesystem(fstype, options)) as fd:
        yield f"/proc/self/fd/{fd}"


def bind(source: str, target: str) -> None:
    """Mount a directory at another one. Raises OSError."""
    with Owned(detached.clone(source)) as mount, Owned(os.open(target, _PATH)) as place:
        detached.attach(mount, place)
