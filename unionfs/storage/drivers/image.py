"""A volume with a size: a sparse file `image` beside its data, whose filesystem uses a loop device."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from unionfs.errors import UserError, on_failure, quoted
from unionfs.settings.sizes import shown_size, volume_size
from unionfs.storage.drivers.base import Prepared, Replacement
from unionfs.storage.model import Volume
from unionfs.storage.mounts import mount_at, need_program, run_program, run_umount
from unionfs.sys import detached, fds, loop
from unionfs.sys.capabilities import CAP_SYS_ADMIN, CAP_SYS_RESOURCE, has_capability
from unionfs.sys.fds import Owned, sync_directory
from unionfs.sys.images import mount_image

_DETACH_SECONDS = 5.0

# The smallest sizes that mkfs accepts: xfsprogs refuses less than 300 MB; ext4 needs room for its journal.
_SMALLEST = {"ext4": 8 << 20, "xfs": 300 << 20}
# No blocks are reserved for root: the volume gets the whole size.
_EXT4 = ("mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096", "-E")
# The commands, of which the first one that works is taken. e2fsprogs before 1.47 cannot be told that a new
# image is all zeroes, and writes 2 % of it.
_MAKE = {
    "ext4": (
        (*_EXT4, "assume_storage_prezeroed=1,nodiscard,root_owner=0:0"),
        (*_EXT4, "lazy_itable_init=0,nodiscard,root_owner=0:0"),
    ),
    "xfs": (("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),),
}


def check(options: Mapping[str, str]) -> None:
    """Raise UserError for unsupported sizes and filesystems."""
    kind, size = options.get("fs", "ext4"), volume_size(options["size"])
    if kind not in _SMALLEST:
        raise UserError(f"invalid fs={quoted(kind)} for a volume with a size; use ext4 or xfs.")
    if size < _SMALLEST[kind]:
        raise UserError(
            f"size={options['size']} is too small for {kind}, which takes at least "
            f"{shown_size(_SMALLEST[kind])}."
        )
    if not has_capability(CAP_SYS_ADMIN):
        raise UserError("a volume with a size needs root to be mounted; run as root, or leave the size out.")


def path_of(volume: Volume) -> str:
    return f"{volume.directory}/image"


def exists(volume: Volume) -> bool:
    """Raises UserError if that is not known."""
    with on_failure(f"volume {quoted(volume.name)} cannot be used", f"check {quoted(volume.directory)}"):
        return fds.exists(path_of(volume))


def create(volume: Volume, size: int) -> None:
    """Create the image with an empty filesystem. Raises UserError."""
    _make(path_of(volume), size, volume)


def _kind(volume: Volume) -> str:
    return volume.options.get("fs", "ext4")


def _make(path: str, size: int, volume: Volume) -> None:
    kind = _kind(volume)
    program = _MAKE[kind][0][0]
    need_program(program, {"ext4": "e2fsprogs", "xfs": "xfsprogs"}[kind], "a volume with a size")
    with on_failure(
        f"the image of volume {quoted(volume.name)} cannot be made", "free space, or give a smaller size"
    ):
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with Owned(os.open(path, flags, 0o600)) as fd:
            os.ftruncate(fd, size)
    try:
        _make_filesystem(path, volume)
        with _mounted(path, volume) as root:
            _empty(root)
            os.chmod(root, 0o755)
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise


def _make_filesystem(path: str, volume: Volume) -> None:
    *others, last = _MAKE[_kind(volume)]
    complaint = f"volume {quoted(volume.name)} cannot be made"
    for command in others:
        with suppress(UserError):
            run_program((*command, path), complaint)
            return
    run_program((*last, path), complaint)


def _empty(root: str) -> None:
    """Remove lost+found, which e2fsck recreates when needed: a new volume is empty, as in Docker."""
    with suppress(OSError):
        os.rmdir(f"{root}/lost+found")


def mount(volume: Volume, target: str) -> None:
    """Mount the image at `target`. Raises UserError."""
    _mount(path_of(volume), target, volume)


def _mount(path: str, target: str, volume: Volume) -> None:
    what, kind = f"volume {quoted(volume.name)}", _kind(volume)
    if not has_capability(CAP_SYS_ADMIN):
        raise UserError(
            f"{what} cannot be mounted: that needs root; run as root, or use a volume without a size."
        )
    cure = f"check the image, and that this host has loop devices and {kind}"
    with (
        on_failure(f"{what} cannot be mounted: {quoted(path)}", cure),
        Owned(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)) as image,
        Owned(os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as place,
        Owned(mount_image(image, kind, read_only=False)) as root,
    ):
        detached.attach(root, place)


@contextmanager
def _mounted(path: str, volume: Volume) -> Iterator[str]:
    target = tempfile.mkdtemp(prefix=".image-", dir=volume.directory)
    what = f"volume {quoted(volume.name)}"
    try:
        _mount(path, target, volume)
        try:
            yield target
        finally:
            run_umount(target, what)
    finally:
        if mount_at(target) is None:
            with suppress(OSError):
                os.rmdir(target)


@contextmanager
def replacement(volume: Volume) -> Iterator[Replacement]:
    """New content in a second image, which replaces the first one after its filesystem is unmounted."""
    sweep(volume)
    new = f"{volume.directory}/.image-new"
    _make(new, volume_size(volume.options["size"]), volume)
    try:
        with _mounted(new, volume) as root:

            def commit() -> None:
                """Unmount the new filesystem to complete it, and rename its image over the old one."""
                what, data = f"volume {quoted(volume.name)}", f"{volume.directory}/_data"
                run_umount(root, what)
                with Owned(os.open(new, os.O_RDONLY | os.O_CLOEXEC)) as fd:
                    os.fsync(fd)
                run_umount(data, what)
                os.rename(new, path_of(volume))
                sync_directory(volume.directory)

            yield Prepared(root, commit)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(new)


def sweep(volume: Volume) -> None:
    for name in os.listdir(volume.directory):
        if not name.startswith(".image-"):
            continue
        path = f"{volume.directory}/{name}"
        if os.path.isdir(path):
            run_umount(path, f"volume {quoted(volume.name)}")
            with suppress(OSError):
                os.rmdir(path)
        else:
            os.unlink(path)


def resize(volume: Volume, size: int, *, mounted: bool) -> None:
    """Grow the image and its filesystem, mounted or not; shrink an unmounted ext4. Raises UserError."""
    kind, path, data = _kind(volume), path_of(volume), f"{volume.directory}/_data"
    what = f"volume {quoted(volume.name)} cannot be resized"
    before = os.stat(path).st_size
    if size < _SMALLEST[kind]:
        raise UserError(f"{what}: {kind} takes at least {shown_size(_SMALLEST[kind])}; give a larger size.")
    if size < before and kind == "xfs":
        raise UserError(f"{what}: an xfs cannot shrink (xfs_growfs(8)); restore a backup into a smaller one.")
    if size < before and mounted:
        raise UserError(f"{what}: an ext4 cannot shrink while it is in use; stop whatever uses it first.")
    if kind == "ext4" and not mounted:
        if mount_at(data) is not None:
            run_umount(data, what)
        _resize_ext4(path, size // 1024 * 1024, before, what)
        with _mounted(path, volume) as root:
            _empty(root)
        return
    if kind == "ext4" and not has_capability(CAP_SYS_RESOURCE):
        # The kernel requires it (fs/ext4/ioctl.c); an xfs requires CAP_SYS_ADMIN.
        raise UserError(
            f"{what}: an ext4 grows in use only for a process with CAP_SYS_RESOURCE, which this one lacks; "
            "stop whatever uses it first."
        )
    _lengthen(path, size, what)
    with _in_use(volume, data) as device:
        # After a failure the image keeps its length: the filesystem may have grown in part.
        run_program(("losetup", "-c", device), what)
        run_program(("xfs_growfs", data) if kind == "xfs" else ("resize2fs", device), what)


def _refuse_attached(path: str, what: str) -> None:
    """Raise UserError while a loop device uses the image: e2fsck(8) would destroy a mounted filesystem.

    The kernel releases a loop device shortly after the unmount.
    """
    deadline = time.monotonic() + _DETACH_SECONDS
    while True:
        devices = loop.devices_of(path)
        if not devices:
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"{what}: its image is still mounted in another mount namespace "
                f"({os.path.basename(devices[0].path)}); stop whatever uses it there."
            )
        time.sleep(0.05)


def _lengthen(path: str, size: int, what: str) -> None:
    with on_failure(what, "give a size that the filesystem of the image takes"):
        os.truncate(path, size)


def _resize_ext4(path: str, size: int, before: int, what: str) -> None:
    _refuse_attached(os.path.realpath(path), what)
    # 1: errors corrected (e2fsck(8)); it recreates the missing lost+found.
    run_program(("e2fsck", "-f", "-p", path), what, good=(0, 1))
    if size > before:
        _lengthen(path, size, what)
    try:
        run_program(("resize2fs", path, f"{size // 1024}K"), what)
    except UserError as error:
        # The image keeps its length: the filesystem may have grown in part.
        if "smaller than minimum" in str(error):
            raise UserError(
                f"{what}: what it holds does not fit into {shown_size(size)}; give a larger size, or remove "
                "files."
            ) from error
        raise
    os.truncate(path, size)


@contextmanager
def _in_use(volume: Volume, data: str) -> Iterator[str]:
    """The loop device of the volume; mounts the volume if necessary."""
    was = mount_at(data)
    if was is None:
        mount(volume, data)
    try:
        found = mount_at(data)
        assert found is not None
        yield found.source
    finally:
        if was is None:
            run_umount(data, f"volume {quoted(volume.name)}")
