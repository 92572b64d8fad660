"""The driver `local`: a directory, a filesystem in an image file, or a mount by mount(8)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from unionfs.errors import UserError, on_failure, quoted, reason
from unionfs.settings.sizes import shown_size, volume_size
from unionfs.settings.tmpfs import parse_tmpfs_words
from unionfs.storage.drivers import image, replacing
from unionfs.storage.drivers.base import Driver, Replacement
from unionfs.storage.model import Volume
from unionfs.storage.mounts import mount_at, mount_call, run_mount, run_umount
from unionfs.sys import quota
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability
from unionfs.sys.fds import is_directory
from unionfs.sys.walking import follow


class Local(Driver):
    """Volumes on this host.

    Without options: a directory. With `size`: a directory with a project quota where kernel and filesystem
    support it, else a sparse image with ext4 or xfs on a loop device. With `type`, `o` and `device`, as in
    Docker: any mount of mount(8).
    """

    name = "local"
    known_options: Mapping[str, str] = {
        "type": "the filesystem for mount(8): nfs, cifs, tmpfs, ext4, none with o=bind ...",
        "device": "what to mount",
        "o": "mount options, separated by commas",
        "tmpfs": "short for type=tmpfs device=tmpfs; its value, or size, are the mount options",
        "size": "the maximum size of the volume, as 100m or 20g",
        "fs": "the filesystem of an image for size: ext4 (default) or xfs",
    }

    def spelled_out(self, options: Mapping[str, str]) -> Mapping[str, str]:
        if "tmpfs" not in options:
            return options
        for key in ("type", "device", "o", "fs"):
            if key in options:
                raise UserError(
                    f"the volume options tmpfs and {key} exclude each other; tmpfs stands for type=tmpfs and "
                    "device=tmpfs, and its value for the mount options."
                )
        words = [word for word in options["tmpfs"].split(",") if word]
        parse_tmpfs_words("the volume option tmpfs", words)
        if "size" in options:
            words.append(f"size={volume_size(options['size'])}")
        rest = {key: value for key, value in options.items() if key not in ("tmpfs", "size")}
        return {**rest, "type": "tmpfs", "device": "tmpfs", **({"o": ",".join(words)} if words else {})}

    def check(self, options: Mapping[str, str]) -> None:
        super().check(options)
        if "size" in options:
            volume_size(options["size"])
            for key in ("type", "device", "o"):
                if key in options:
                    raise UserError(
                        f"the volume options size and {key} exclude each other: a mounted filesystem has a "
                        "size of its own (for a tmpfs write -o o=size=100m)."
                    )
            image.check(options)
        elif "fs" in options:
            raise UserError("the volume option fs is the filesystem of an image; it needs the option size.")
        if "type" in options or "device" in options or "o" in options:
            self._check_mount(options)

    def _check_mount(self, options: Mapping[str, str]) -> None:
        kind, device = options.get("type", ""), options.get("device", "")
        if not kind:
            raise UserError(
                "the volume option type is missing; device and o are for mount(8), which needs it."
            )
        if not device:
            # Docker: "missing device in volume options"
            raise UserError(
                "the volume option device is missing; name what is to be mounted"
                + (" (for a tmpfs: device=tmpfs)." if kind == "tmpfs" else ".")
            )
        if any(char in kind + device + options.get("o", "") for char in "\0\n"):
            raise UserError(
                "the volume options type, device and o must not contain line breaks or zero bytes."
            )
        if kind.startswith("-") or "," in kind:
            raise UserError(
                f"type={quoted(kind)} is not a filesystem type; /proc/filesystems lists the kernel's."
            )
        if kind == "none":
            words = options.get("o", "").split(",")
            if "bind" not in words and "rbind" not in words:
                raise UserError("a volume of type none needs the option o=bind.")
            if not device.startswith("/"):
                raise UserError(f"device={quoted(device)} is relative; a bind needs an absolute path.")
        if kind not in ("none", "tmpfs") and not has_capability(CAP_SYS_ADMIN):
            raise UserError(
                f"a volume of type {kind} needs root to be mounted; run as root, or use a volume without "
                "options."
            )

    def create(self, volume: Volume) -> None:
        data = f"{volume.directory}/_data"
        with on_failure(
            f"volume {quoted(volume.name)} cannot be made in {quoted(os.path.dirname(volume.directory))}",
            "free space, or give another storage root",
        ):
            os.mkdir(data, 0o755)
            os.chmod(data, 0o755)
        if "size" in volume.options:
            size = volume_size(volume.options["size"])
            if not quota.limit_directory(data, size):
                image.create(volume, size)

    def remove(self, volume: Volume) -> None:
        self.unmount(volume, "")
        if image.exists(volume):
            image.sweep(volume)
        if "size" in volume.options and not image.exists(volume):
            quota.unlimit_directory(f"{volume.directory}/_data")

    def mount(self, volume: Volume, user: str) -> str:
        data = f"{volume.directory}/_data"
        what = f"volume {quoted(volume.name)}"
        if image.exists(volume):
            if mount_at(data) is None:
                image.mount(volume, data)
        elif "type" in volume.options:
            kind, device = volume.options["type"], volume.options["device"]
            if kind == "none" and not has_capability(CAP_SYS_ADMIN):
                data = device  # the same as a bind mount would show
            elif mount_at(data) is None:
                if kind == "none":
                    _check_way(device, what)
                run_mount(mount_call(kind, device, volume.options.get("o", ""), data), what)
            if kind == "none" and not os.path.isdir(data):
                raise UserError(
                    f"{what} is bound to {quoted(device)}, which is not a directory; create it first."
                )
        else:
            with on_failure(f"{what} cannot be used", f"check {quoted(volume.directory)}"):
                if not is_directory(data) and not replacing.recover_sibling(data):
                    raise UserError(
                        f"{what} has lost its directory {quoted(data)}; restore it from a backup."
                    )
        return data

    def unmount(self, volume: Volume, user: str) -> None:
        if image.exists(volume) or "type" in volume.options:
            run_umount(f"{volume.directory}/_data", f"volume {quoted(volume.name)}")

    @contextmanager
    def replacement(self, volume: Volume) -> Iterator[Replacement]:
        if image.exists(volume):
            with image.replacement(volume) as place:
                yield place
        elif "type" in volume.options:
            with replacing.in_place(volume, self.mount(volume, "")) as inner:
                yield inner
        else:
            with replacing.sibling(f"{volume.directory}/_data") as beside:
                if "size" not in volume.options:
                    yield beside
                    return
                quota.limit_directory(beside.path, volume_size(volume.options["size"]))
                try:
                    yield beside
                finally:
                    quota.unlimit_directory(beside.path)  # the old content by now, or the refused new one

    def restores_mounted(self, volume: Volume) -> bool:
        if volume.options.get("type") == "tmpfs":
            raise UserError(
                f"volume {quoted(volume.name)} is a tmpfs, whose content is lost when its last user ends: "
                "nothing can be restored into it; use a volume of another type."
            )
        return "type" in volume.options

    def check_clone(self, volume: Volume) -> None:
        if "type" in volume.options:
            raise UserError(
                f"volume {quoted(volume.name)} cannot be cloned: a volume with the same device would be the "
                "same data; make a new volume, and restore a backup into it."
            )

    def may_share(self, volume: Volume) -> str | None:
        return None if image.exists(volume) or "type" in volume.options else volume.directory

    def resize(self, volume: Volume, size: str, *, mounted: bool) -> Mapping[str, str]:
        if "size" not in volume.options:
            raise UserError(
                f"volume {quoted(volume.name)} has no size to change; make a new one with -o size={size} and "
                "restore a backup into it."
            )
        wanted = volume_size(size)
        if image.exists(volume):
            image.resize(volume, wanted, mounted=mounted)
        else:
            self._change_limit(volume, wanted)
        return {**volume.options, "size": size}

    def _change_limit(self, volume: Volume, wanted: int) -> None:
        data, what = f"{volume.directory}/_data", f"volume {quoted(volume.name)} cannot be resized"
        with on_failure(what, "check its filesystem's quotas"):
            if quota.space_used(data) > wanted:
                raise UserError(
                    f"{what}: what it holds does not fit into {shown_size(wanted)}; give a larger size, or "
                    "remove files."
                )
            if not quota.change_limit(data, wanted):
                raise UserError(
                    f"{what}: its filesystem no longer enforces project quotas; mount it with prjquota, as "
                    "when the volume was made."
                )

    def status(self, volume: Volume) -> Mapping[str, object]:
        return {"mounted": mount_at(volume.mountpoint) is not None} if "type" in volume.options else {}


def _check_way(device: str, what: str) -> None:
    """Raise UserError if another user's symlink leads to the directory."""
    try:
        os.close(follow(device))
    except FileNotFoundError:
        return  # mount(8) reports it
    except OSError as error:
        raise UserError(
            f"{what} is bound to {quoted(device)}, which cannot be used: {reason(error)}; check the path."
        ) from error
