"""What is to be mounted, opened: a directory or file of the host, of a volume, or the root of a new tmpfs."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

from unionfs.daemon.errors import UserError, quoted, reason
from unionfs.storage import tmpfs
from unionfs.storage.specs import BindSpec, Spec, TmpfsSpec, VolumeSpec
from unionfs.storage.volumes import Volumes
from unionfs.sys.openat2 import open_in_root


@dataclass(frozen=True, slots=True)
class Source:
    """An opened source: `fd` is an O_PATH fd; of a tmpfs the root of a detached mount."""

    spec: Spec
    """With the name that an anonymous volume has been given."""
    fd: int
    directory: bool


def check(spec: Spec) -> None:
    """Look at a source before anything is mounted or made. Raises UserError."""
    if isinstance(spec, BindSpec) and not spec.create:
        try:
            os.stat(spec.path)
        except OSError as error:
            raise UserError(_unusable(spec, error)) from error


def check_without_root(spec: Spec, *, read_only: bool) -> None:
    """Refuse what only a kernel mount can be, of a union that is `read_only` or not. Raises UserError."""
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


def open_source(spec: Spec, volumes: Volumes, user: str, undo: ExitStack) -> Source:
    """Open a source, made if that is wanted. `undo` gets what to do when the union does not come about.

    `user` is who uses a volume. The caller closes the fd. Raises UserError.
    """
    match spec:
        case BindSpec():
            fd = _open_bind(spec, undo)
        case VolumeSpec():
            spec, fd = _open_volume(spec, volumes, user, undo)
        case TmpfsSpec():
            flags = (*spec.flags, *(["ro"] if spec.read_only else []))
            fd = tmpfs.make(spec.options, flags, owner=f"the tmpfs at {quoted(spec.target)}")
    return Source(spec, fd, stat.S_ISDIR(os.stat(fd).st_mode))


def _open_bind(spec: BindSpec, undo: ExitStack) -> int:
    try:
        if spec.create:
            _make_directories(spec.path, undo)
        return os.open(spec.path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(_unusable(spec, error)) from error


def _make_directories(path: str, undo: ExitStack) -> None:
    """Make a missing directory with those above it, mode 0755."""
    if os.path.exists(path):
        return
    above = os.path.dirname(path)
    if above != path:
        _make_directories(above, undo)
    with suppress(FileExistsError):
        os.mkdir(path, 0o755)
        undo.callback(_remove_directory, path)


def _remove_directory(path: str) -> None:
    with suppress(OSError):
        os.rmdir(path)


def _open_volume(
    spec: VolumeSpec, volumes: Volumes, user: str, undo: ExitStack
) -> tuple[VolumeSpec, int]:
    made = volumes.ensure(
        spec.name, driver=spec.driver, options=dict(spec.options), anonymous=spec.anonymous
    )
    path = volumes.attach(made.name, user)
    undo.callback(volumes.detach, made.name, user)
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(
            f"volume {quoted(made.name)} cannot be opened at {quoted(path)}: {reason(error)}; check the "
            "storage root."
        ) from error
    return replace(spec, name=made.name), fd


def within_volume(spec: VolumeSpec, fd: int) -> int:
    """What `volume-subpath` names in the volume `fd`: an O_PATH fd. Raises UserError."""
    try:
        return open_in_root(fd, os.fsencode(spec.subpath))
    except OSError as error:
        raise UserError(
            f"volume-subpath {quoted(spec.subpath)} of volume {quoted(spec.name or '')} cannot be used: "
            f"{reason(error)}; make it in the volume first."
        ) from error
