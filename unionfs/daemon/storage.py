"""The storage of one union: opened before its layers, mounted or served, and released at its end."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from unionfs.daemon import live
from unionfs.daemon.caller import CALLER
from unionfs.daemon.clearing import clear_dead_mounts
from unionfs.errors import UserError, on_failure
from unionfs.settings.mount import MountSettings
from unionfs.settings.specs import Spec
from unionfs.storage import served
from unionfs.storage.attach import attach, attach_below
from unionfs.storage.populate import Layered
from unionfs.storage.sources import Sources
from unionfs.storage.users import release, user_of, with_names
from unionfs.storage.volumes import Volumes
from unionfs.sys import guardian
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability
from unionfs.sys.guardian import Guardian
from unionfs.sys.mountinfo import MountEntry, mounted_at
from unionfs.sys.process import pid_and_start
from unionfs.union.layers import LayerStack
from unionfs.union.tree import Union

if TYPE_CHECKING:
    from unionfs.core.state import State


class Storage:
    """With CAP_SYS_ADMIN, storage is mounted inside the mounted union; otherwise the union serves it."""

    def __init__(
        self, settings: MountSettings, former: Guardian | None = None, state: State | None = None
    ) -> None:
        """Start the guardian and open all sources. Call it before there are threads or a mount.

        `former`: the guardian of a daemon whose storage is mounted, and stays. `state`: of a mount that
        outlives its daemon. Raises UserError, with everything undone.
        """
        self._state = state
        self.settings = replace(settings, storage=with_names(settings.storage))
        self._user = user_of(settings, *pid_and_start(os.getpid()))
        self._kernel_mounts = has_capability(CAP_SYS_ADMIN)
        self._kept = former is not None
        self._sources: Sources | None = None
        if former is None:
            with on_failure("no process can be started", "end some others"):
                self._guardian = guardian.start(self._clear)
        else:
            self._guardian = former
        if settings.outlive:  # the daemon may be replaced, but not the guardian
            self._user = user_of(settings, *pid_and_start(self._guardian.pid))
        if former is None:
            self._open()

    def _open(self) -> None:
        volumes = Volumes(self.settings.storage_root)
        self._sources = Sources(
            volumes, self._user, kernel_mounts=self._kernel_mounts, shown=CALLER.shown
        )
        try:
            self._sources.open(self.settings.storage)
        except BaseException:
            self._guardian.dismiss()
            raise

    def _clear(self, device: str) -> None:
        """Clean up after this process; the guardian calls this if the process is killed."""
        if device:  # its `major:minor`, once it was mounted
            mount = mounted_at(self.settings.mountpoint)
            if self._state is not None and mount is not None and mount.device == device:
                self._state.takes_off(mount.all_options)
            clear_dead_mounts(device)
        user = self._user
        if self.settings.outlive:
            user = user_of(self.settings, *pid_and_start(os.getpid()))
        release(self.settings, user)
        with suppress(UserError):  # who reads it next removes the entry
            live.entries()

    @property
    def guardian(self) -> Guardian:
        """The process that cleans up after a killed daemon."""
        return self._guardian

    @property
    def lasting_user(self) -> int | None:
        """The pid of the user of the volumes, if it is not this process."""
        return self._guardian.pid if self.settings.outlive else None

    def serve(self, union: Union, stack: LayerStack) -> None:
        """Serve the storage if it is not mounted. Call it before the union is mounted. Raises UserError.

        Afterwards `settings` has the real targets.
        """
        if not self._kernel_mounts and self._sources is not None:
            self._found(served.serve(self._sources, union, stack))

    def mount(self, mount: MountEntry, stack: Layered) -> None:
        """Mount the storage if it is not served. Call it in a thread: all its paths are in the union."""
        self._guardian.tell(mount.device)
        if self._kernel_mounts and self._sources is not None:
            self._found(attach(mount, self._sources, stack))

    def mount_below(self, root: int, stack: Layered) -> None:
        """Mount the storage below an O_PATH fd of the root of an ordinary tree. Raises UserError."""
        if self._sources is not None:
            self._found(attach_below(root, self.settings.mountpoint, self._sources, stack))

    def _found(self, specs: tuple[Spec, ...]) -> None:
        self.settings = replace(self.settings, storage=specs)
        if self._sources is not None:
            self._sources.close()

    def keep(self) -> None:
        """Keep newly created storage: the mount is usable."""
        self._kept = True

    def give_back(self) -> None:
        """Release the volumes, or undo everything if `keep` was never called."""
        if self._kept:
            release(self.settings, self._user)
        elif self._sources is not None:
            self._sources.give_up()
        self._kept, self._sources = False, None

    def let_go(self) -> None:
        """Release the volumes and dismiss the guardian; the last step, however the mount ends."""
        self.give_back()
        self._guardian.dismiss()
