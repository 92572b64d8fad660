"""Opens the sources of mounts: a directory or file of the host, of a volume, or the root of a new tmpfs."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial

from unionfs.errors import UserError, on_failure, quoted, reason
from unionfs.settings.specs import BindSpec, Spec, TmpfsSpec, VolumeSpec
from unionfs.storage import tmpfs
from unionfs.storage.archive.progress import Shown, unseen
from unionfs.storage.volumes import Volume, Volumes
from unionfs.sys import detached
from unionfs.sys.fds import Owned, Returned
from unionfs.sys.openat2 import open_in_root
from unionfs.sys.walking import follow


@dataclass(frozen=True, slots=True)
class Source:
    """An opened source. `Sources.close` closes the fds."""

    spec: Spec
    """Includes the generated name of an anonymous volume."""
    fd: int
    """An O_PATH fd of the source directory or file; for a tmpfs, of its detached mount."""
    directory: bool
    volume: Volume | None = None
    mount: int = -1
    """The root of its detached mount, with the mount attributes set; -1 where the daemon serves it."""


class Sources:
    """All sources of a union's storage, opened before the union is mounted (which may cover their paths).

    `undo` runs if the union is not mounted. `user` is the user of the volumes. `shown` shows how far their
    filling is.
    """

    def __init__(
        self, volumes: Volumes, user: str, *, kernel_mounts: bool, shown: Shown = unseen
    ) -> None:
        self.opened: list[Source] = []
        self.undo = ExitStack()
        self._volumes = volumes
        self._user = user
        self.shown = shown
        self._kernel_mounts = kernel_mounts

    def open(self, specs: Sequence[Spec]) -> None:
        """Open all sources, creating missing ones on request. Raises UserError, after undoing all of it."""
        try:
            for spec in specs:
                self.opened.append(self._open(spec))
        except BaseException:
            self.give_up()
            raise

    def give_up(self) -> None:
        """Undo all changes and close the fds."""
        self.close()
        self.undo.close()

    def close(self) -> None:
        """Close the fds: mounts stay, and served sources have their own fds."""
        while self.opened:
            source = self.opened.pop()
            os.close(source.fd)
            if source.mount not in (-1, source.fd):
                os.close(source.mount)

    def _open(self, spec: Spec) -> Source:
        match spec:
            case BindSpec():
                volume, fd = None, _open_bind(spec, self.undo)
            case VolumeSpec():
                spec, volume, fd = self._open_volume(spec)
            case TmpfsSpec():
                flags = (*spec.flags, *(["ro"] if spec.read_only else []))
                fd = tmpfs.make(spec.options, flags, owner=f"the tmpfs at {quoted(spec.target)}")
                return Source(spec, fd, True, mount=fd)
        with Returned(fd):
            directory = stat.S_ISDIR(os.stat(fd).st_mode)
            try:
                return Source(spec, fd, directory, volume, _detached(spec, fd) if self._kernel_mounts else -1)
            except OSError as error:
                raise UserError(
                    f"{spec.source} cannot be mounted at {quoted(spec.target)}: {reason(error)}"
                    f"{_cure(spec, error)}."
                ) from error

    def _open_volume(self, spec: VolumeSpec) -> tuple[VolumeSpec, Volume, int]:
        options = dict(spec.options)
        # As in Docker, a name alone stands for an existing volume of any driver and options.
        driver = None if spec.driver == "local" and not options else spec.driver
        made = self._volumes.create(spec.name, driver=driver, options=options, anonymous=spec.anonymous)
        if spec.anonymous:
            self.undo.callback(_quietly, lambda: self._volumes.remove(made.name, missing_ok=True))
        path = self._volumes.attach(made.name, self._user)
        self.undo.callback(_quietly, lambda: self._volumes.detach(made.name, self._user))
        with on_failure(
            f"volume {quoted(made.name)} cannot be opened at {quoted(path)}", "check the storage root"
        ):
            fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if spec.subpath:
            what = f"volume-subpath {quoted(spec.subpath)} of volume {quoted(made.name)} cannot be used"
            with on_failure(what, "make it in the volume first"), Owned(fd) as whole:
                fd = open_in_root(whole, os.fsencode(spec.subpath))
        return replace(spec, name=made.name), made, fd


def _quietly(action: Callable[[], object]) -> None:
    """Run one step of undoing; its errors do not stop the others."""
    with suppress(UserError, OSError):
        action()


def _detached(spec: VolumeSpec | BindSpec, fd: int) -> int:
    """A detached bind mount, set up before it is visible: a read-only one is never writable."""
    bind = spec if isinstance(spec, BindSpec) else BindSpec(spec.target, "", spec.read_only)
    with Returned(detached.clone(fd, recursive=bind.recursive)) as clone:
        detached.change(
            clone,
            propagation=detached.PROPAGATION[bind.propagation.removeprefix("r")],
            recursive=bind.propagation.startswith("r"),
        )
        if bind.read_only:
            detached.change(clone, add=detached.READ_ONLY, recursive=bind.read_only_below)
    return clone


def _cure(spec: Spec, error: OSError) -> str:
    if error.errno == errno.EPERM:
        return "; run as root"
    if error.errno == errno.EINVAL and isinstance(spec, BindSpec):
        return "; its mount cannot be bound (it is unbindable, or of another mount namespace)"
    return "; check the source and the target"


def check(spec: Spec) -> None:
    """Check a source before anything is mounted or created. Raises UserError."""
    if isinstance(spec, BindSpec) and not spec.create:
        try:
            os.stat(spec.path)
        except OSError as error:
            raise UserError(_unusable(spec, error)) from error


def check_without_root(spec: Spec, *, read_only: bool) -> None:
    """Refuse storage that needs a kernel mount; `read_only` describes the union. Raises UserError."""
    if not spec.read_only and read_only:
        raise UserError(
            f"{spec.source} at {quoted(spec.target)} would be read-only like the union, for without root the "
            "union's daemon serves it; give the union an upper, add ro, or run as root."
        )
    if not isinstance(spec, BindSpec):
        return
    if spec.propagation not in ("private", "rprivate"):
        raise UserError(
            f"bind propagation {spec.propagation} at {quoted(spec.target)} needs a kernel mount, which only "
            "root can make; leave it out, or run as root."
        )
    if not spec.recursive or (spec.read_only and not spec.read_only_below):
        raise UserError(
            f"bind-recursive at {quoted(spec.target)} needs a kernel mount, which only root can make; leave "
            "it out, or run as root."
        )


def _unusable(spec: BindSpec, error: OSError) -> str:
    shown = f"bind source {quoted(spec.path)}"
    if error.errno == errno.ENOENT:
        return f"{shown} does not exist; make it, or have it made by -v or bind-create-src."
    return f"{shown} cannot be used: {reason(error)}; check the path and the permissions."


def _open_bind(spec: BindSpec, undo: ExitStack) -> int:
    try:
        if spec.create:
            _make_directories(spec.path, undo)
        return follow(spec.path)
    except OSError as error:
        raise UserError(_unusable(spec, error)) from error


def _make_directories(path: str, undo: ExitStack) -> None:
    """Create a missing directory and its parents, mode 0755."""
    missing: list[str] = []
    while not os.path.exists(path) and path not in missing[-1:]:
        missing.append(path)
        path = os.path.dirname(path)
    for new in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(new, 0o755)
            undo.callback(_quietly, partial(os.rmdir, new))
