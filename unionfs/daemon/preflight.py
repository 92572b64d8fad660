"""Checks a mount's settings against the host before anything changes.

Every foreseeable failure is refused here with one sentence. Whether one directory is or contains another is
checked twice: by (st_dev, st_ino) of all parent directories, and by the location within the filesystem from
the mount table, so that neither symlinks nor bind mounts hide it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn

from unionfs.core.places import SHARED
from unionfs.daemon import live, others
from unionfs.daemon.fuse import (
    FUSE_CONF,
    FUSE_DEVICE,
    fuse_device_problem,
    user_allow_other,
)
from unionfs.errors import DeadMountError, UserError, on_failure, quoted, reason
from unionfs.settings.mount import MountSettings
from unionfs.settings.options import unescape_option
from unionfs.sys.calls import filesystem_magic, may_access
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability
from unionfs.sys.fds import Owned
from unionfs.sys.fusermount import find_fusermount
from unionfs.sys.liveness import is_dead
from unionfs.sys.mountinfo import (
    Location,
    MountEntry,
    location_of,
    mount_id_of_path,
    mounted_at,
    read_mountinfo,
)
from unionfs.union.hiding import is_hidden, parts_below
from unionfs.union.leftovers import check_work

_MAKE: Final = "make it with mkdir"


@dataclass(slots=True)
class _Host:
    """A cache of facts about the host; 500 lowers share most of their parent directories."""

    table: Sequence[MountEntry]
    identities: dict[str, tuple[int, int]] = field(default_factory=dict)
    locations: dict[str, Location | None] = field(default_factory=dict)

    def identity(self, path: str) -> tuple[int, int]:
        if path not in self.identities:
            status = os.stat(path)
            self.identities[path] = (status.st_dev, status.st_ino)
        return self.identities[path]

    def location(self, path: str) -> Location | None:
        if path not in self.locations:
            self.locations[path] = location_of(path, self.table)
        return self.locations[path]

    def contains(self, outer: str, inner: str, *, through_mounts: bool) -> bool:
        """Return whether directory `inner` is `outer` or below it.

        With `through_mounts`, filesystems mounted below `outer` count as part of it.
        """
        there, here = self.location(outer), self.location(inner)
        if there is not None and here is not None:
            if there.contains(here):
                return True
            if not through_mounts:
                return False
        wanted, path = self.identity(outer), inner
        while True:
            if self.identity(path) == wanted:
                return True
            if path == "/":
                return False
            path = os.path.dirname(path)


def check(settings: MountSettings) -> None:
    """Raises UserError if these settings cannot be mounted. Changes nothing."""
    host = _Host(read_mountinfo())
    for lower in settings.lowers:
        check_lower(lower)
        if settings.watch_lower:
            _check_watched(lower)
    if settings.upper is not None and settings.work is not None:
        _check_writable_layers(settings, settings.upper, settings.work, host)
    _check_mountpoint(settings, host)
    _check_fuse(settings)
    if settings.storage:
        # For start-up time: most unions have no storage.
        from unionfs.storage import sources

        privileged = has_capability(CAP_SYS_ADMIN)
        for spec in settings.storage:
            sources.check(spec)
            if not privileged:
                sources.check_without_root(spec, read_only=settings.read_only)


def check_lower(path: str) -> None:
    """Raises UserError unless `path` is a readable directory, or an image that can be mounted."""
    if os.path.isfile(path):
        # For start-up time: few lowers are images.
        from unionfs.union.images import check_image

        check_image(path)
    else:
        check_directory("lower", path)


def _check_watched(path: str) -> None:
    """Raises UserError if others can change the lower without a report by the kernel."""
    with Owned(os.open(path, os.O_PATH | os.O_CLOEXEC)) as fd:
        kind = SHARED.get(filesystem_magic(fd))
    if kind is not None:
        raise UserError(
            f"lower {quoted(path)} is on {kind}, whose changes by other hosts or by its daemon the kernel "
            "does not report; leave --watch-lower out, and run `unionfs refresh` after changes."
        )


def check_directory(
    kind: str, path: str, access: int = os.R_OK | os.X_OK, *, cure: str = "check the path"
) -> None:
    """Raises UserError unless `path` is a directory with this `access`; `kind` is lower, upper or work.

    `cure` is for a missing one.
    """
    try:
        status = os.stat(path)
        # The kernel may cache a dead mount's attributes, but statfs always asks the daemon.
        os.statvfs(path)
        may = may_access(path, access)
    except OSError as error:
        _refuse_missing(kind, path, error, cure)
    if not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{kind} {quoted(path)} is not a directory; name a directory.")
    if not may:
        verb = "written" if access & os.W_OK else "read"
        if access & os.W_OK and os.statvfs(path).f_flag & os.ST_RDONLY:
            raise UserError(
                f"{kind} {quoted(path)} is on a filesystem that is mounted read-only; remount it rw, or "
                "choose another place."
            )
        raise UserError(
            f"{kind} {quoted(path)} cannot be {verb} by this user (uid {os.geteuid()}); change its owner "
            "or mode, or run as its owner."
        )


def _refuse_missing(kind: str, path: str, error: OSError, cure: str = _MAKE) -> NoReturn:
    shown = f"{kind} {quoted(path)}"
    if error.errno == errno.ENOENT:
        raise UserError(f"{shown} does not exist; {cure}.") from error
    if error.errno == errno.ENOTCONN:
        raise DeadMountError(
            f"{shown} is a mount whose daemon has died; run `unionfs umount {quoted(path)}` first."
        ) from error
    raise UserError(f"{shown} cannot be used: {reason(error)}; check the path.") from error


def _check_writable_layers(settings: MountSettings, upper: str, work: str, host: _Host) -> None:
    # A read-only mount also empties work, as in kernel overlayfs.
    check_directory("upper", upper, os.R_OK | os.W_OK | os.X_OK, cure=_MAKE)
    check_directory("work", work, os.R_OK | os.W_OK | os.X_OK, cure=_MAKE)
    _check_same_filesystem(upper, work, host)
    _check_apart(settings, upper, work, host)
    _check_work_content(work)
    _check_unused(upper, work, host)
    _check_xattrs(upper, settings.userxattr)


def _check_same_filesystem(upper: str, work: str, host: _Host) -> None:
    same_device = host.identity(upper)[0] == host.identity(work)[0]
    if same_device and mount_id_of_path(upper) == mount_id_of_path(work):
        return
    cause = "two mounts of one filesystem" if same_device else "different filesystems"
    raise UserError(
        f"work {quoted(work)} and upper {quoted(upper)} are on {cause}, but files are moved from work to "
        "upper by rename; put work beside upper."
    )


def _check_apart(settings: MountSettings, upper: str, work: str, host: _Host) -> None:
    if host.contains(upper, work, through_mounts=True):
        relation = "the same directory as" if host.contains(work, upper, through_mounts=True) else "inside"
        raise UserError(f"work {quoted(work)} is {relation} upper {quoted(upper)}; put work beside upper.")
    if host.contains(work, upper, through_mounts=True):
        raise UserError(f"upper {quoted(upper)} is inside work {quoted(work)}; put work beside upper.")
    for lower in settings.lowers:
        for kind, path in (("upper", upper), ("work", work)):
            for outer_kind, outer, inner_kind, inner in (
                ("lower", lower, kind, path),
                (kind, path, "lower", lower),
            ):
                if _reaches(host, outer, inner):
                    if outer == lower and _hides_itself(settings, lower, path):
                        continue
                    raise UserError(
                        f"{inner_kind} {quoted(inner)} and {outer_kind} {quoted(outer)} overlap (one holds "
                        "the other), so changes would reach a lower; choose directories apart from each "
                        "other."
                    )


def _hides_itself(settings: MountSettings, lower: str, path: str) -> bool:
    """Return whether the upper makes the union blind for what it has of `path` inside `lower`."""
    parts = parts_below(lower, path)
    if parts is None or settings.upper is None:
        return False
    return is_hidden(settings.upper, parts, userxattr=settings.userxattr)


def _reaches(host: _Host, outer: str, inner: str) -> bool:
    """Return whether the daemon reaches `inner` by descending from the layer `outer`.

    A privileged daemon opens a layer through a private bind mount, without the mounts below it.
    """
    if host.contains(outer, inner, through_mounts=False):
        return True
    return host.contains(outer, inner, through_mounts=True) and not _can_clone(outer)


def _can_clone(path: str) -> bool:
    """Return whether this process may make a private bind mount of a directory, by making one briefly."""
    # For start-up time: few mounts need to know.
    from unionfs.sys import detached

    try:
        os.close(detached.clone(path, read_only=True))
    except OSError:
        return False
    return True


def _check_work_content(work: str) -> None:
    complaint = f"work {quoted(work)}: its `work` cannot be read"
    with (
        Owned(os.open(work, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as fd,
        on_failure(complaint, "choose an empty directory"),
    ):
        check_work(fd, work)


def check_unused(upper: str, work: str | None = None) -> None:
    """Raises UserError if a mount of this host uses `upper` or `work`."""
    _check_unused(upper, upper if work is None else work, _Host(read_mountinfo()))


def _check_unused(upper: str, work: str, host: _Host) -> None:
    for entry in live.entries():
        for kind, path in (("upper", upper), ("work", work)):
            for taken in (entry.settings.upper, entry.settings.work):
                if taken is None or not _is_taken(host, path, taken, entry.claims):
                    continue
                if not live.has_ended_soon(entry):
                    how = _how_used(entry)
                    raise UserError(f"{kind} {quoted(path)} is {how}, or choose another directory.")
    for mount in host.table:
        if mount.fstype != "overlay":
            continue
        for option in ("upperdir", "workdir"):
            taken = mount.super_option(option)
            if taken is None:
                continue
            # The kernel shows the path as passed, so with backslashes from a mount option string.
            shown = (taken, unescape_option(taken))
            for kind, path in (("upper", upper), ("work", work)):
                if any(_is_taken(host, path, name, ()) for name in shown):
                    raise UserError(
                        f"{kind} {quoted(path)} is in use by the kernel's overlayfs at "
                        f"{quoted(mount.mountpoint)}; unmount that first, or choose another directory."
                    )


def _how_used(entry: live.LiveMount) -> str:
    """Describe, as a part of a sentence, how a daemon that has not ended uses its upper; with the cure."""
    if entry.mounts():
        return f"in use by {live.describe_owner(entry)}; unmount that first"
    mountpoint, pid = quoted(entry.settings.mountpoint), entry.pid
    if entry.waiting:
        return (
            f"in use by the union of {mountpoint}, whose daemon died and which is about to be mounted anew; "
            f"end that by `unionfs umount {mountpoint}`"
        )
    return (
        f"still in use: {mountpoint} is unmounted, but processes have files of it open, so its daemon (pid "
        f"{pid}) goes on; stop them, cut them off by `unionfs umount --force {mountpoint}`"
    )


def _is_taken(host: _Host, path: str, taken: str, claims: Sequence[tuple[int, int]]) -> bool:
    """Return whether `path` is, contains or lies inside a directory that a mount uses."""
    if host.identity(path) in claims:
        return True
    try:
        return host.contains(taken, path, through_mounts=True) or host.contains(
            path, taken, through_mounts=True
        )
    except OSError:
        # The directory is not visible here (covered, removed, another mount namespace).
        return False


def _check_xattrs(upper: str, userxattr: bool) -> None:
    name = "user.overlay.opaque" if userxattr else "trusted.overlay.opaque"
    try:
        os.getxattr(upper, name)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            kind = name.split(".")[0]
            others = "" if userxattr else " (-o userxattr may work there)"
            raise UserError(
                f"upper {quoted(upper)} is on a filesystem without {kind}.* xattrs, so opaque directories "
                f"could not be stored; use ext4, xfs, btrfs or tmpfs{others}."
            ) from error
        if error.errno != errno.ENODATA:
            raise UserError(
                f"upper {quoted(upper)}: its xattrs cannot be read: {reason(error)}; use another directory."
            ) from error


def _check_mountpoint(settings: MountSettings, host: _Host) -> None:
    path = settings.mountpoint
    shown = f"mountpoint {quoted(path)}"
    if path == "/":
        raise UserError(
            "mountpoint / is the root directory, and nothing mounted on it could be reached; choose "
            "another directory."
        )
    # Before any request to the mountpoint, where a dead or hanging daemon may be mounted.
    mount = mounted_at(path, host.table)
    while mount is not None and mount.is_fuse:
        entry = live.find_by_device(mount.device)
        # Another user's daemon may not answer; send no request to such a mount.
        may_ask = others.owner_of(mount) is None
        if (may_ask and is_dead(path)) if entry is None else not entry.is_alive():
            _refuse_missing("mountpoint", path, OSError(errno.ENOTCONN, "dead"))
        if entry is not None and live.has_ended_soon(entry):
            mount = mounted_at(path)
            continue
        what = live.describe_owner(entry) if entry else f"a {mount.fstype} mount of {quoted(mount.source)}"
        cure = f"`unionfs umount {quoted(path)}`" if entry else f"`umount {quoted(path)}`"
        raise UserError(f"{shown} is busy: {what} is there already; run {cure} first.")
    try:
        status = os.stat(path)
    except OSError as error:
        _refuse_missing("mountpoint", path, error)
    if not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{shown} is not a directory; name a directory.")
    for kind, layer in (("upper", settings.upper), ("work", settings.work)):
        if layer is not None and host.contains(layer, path, through_mounts=True):
            raise UserError(
                f"{shown} is inside the {kind} {quoted(layer)}, which the mount itself changes; choose a "
                "directory outside it."
            )
    for lower in settings.lowers:
        # A mount over the lower itself is harmless: the daemon has opened the lower before.
        inside = host.identity(lower) != host.identity(path) and host.contains(
            lower, path, through_mounts=True
        )
        if inside and not _hides_itself(settings, lower, path) and not _can_clone(lower):
            raise UserError(
                f"mountpoint {quoted(path)} is inside the lower {quoted(lower)}, so the union would hold "
                "itself and hang; choose a directory outside it, or mount as root."
            )
    if os.geteuid() != 0 and not os.access(path, os.W_OK, effective_ids=True):
        raise UserError(
            f"mountpoint {quoted(path)} cannot be written by this user (uid {os.geteuid()}), as "
            "fusermount3 wants it; choose a directory of your own."
        )


def _check_fuse(settings: MountSettings) -> None:
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise UserError(fuse_device_problem(error)) from error
    if os.geteuid() == 0:
        return
    if find_fusermount() is None:
        raise UserError(
            "fusermount3 is missing, and an ordinary user cannot mount without it; install the package fuse3."
        )
    if (settings.allow_other or settings.allow_root) and not user_allow_other():
        word = "allow_other" if settings.allow_other else "allow_root"
        raise UserError(
            f"option {word}: an ordinary user may give it only when {FUSE_CONF} has a line "
            "user_allow_other; add the line as root, or leave the option out."
        )
