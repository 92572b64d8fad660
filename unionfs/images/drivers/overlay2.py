"""The driver `overlay2`: the kernel's overlay mount, over the same layers as `union`.

Source: Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack

from unionfs.errors import UserError, quoted, reason
from unionfs.images.drivers import uppers
from unionfs.images.drivers.backing import kind_of
from unionfs.images.drivers.base import Wanted, Writable
from unionfs.images.drivers.private import PrivateMount
from unionfs.sys import detached
from unionfs.sys.calls import mount
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability, may_use_trusted_xattrs
from unionfs.sys.fds import Owned
from unionfs.union.images import is_image, open_image

_PATH = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_OTHER = "choose the storage driver union or vfs"


class Overlay2(uppers.UpperDriver):
    name = "overlay2"

    def check(self) -> None:
        if not has_capability(CAP_SYS_ADMIN):
            raise UserError(
                "storage driver overlay2 mounts, which needs root; run it as root or under `unshare -rm`, or "
                f"{_OTHER}."
            )
        if not detached.is_known("overlay"):
            raise UserError(
                f"storage driver overlay2: this kernel has no overlayfs; load the module overlay, or "
                f"{_OTHER}."
            )

    def mount(self, layer: Writable, wanted: Wanted) -> PrivateMount:
        uppers.hide_storage(layer)
        return PrivateMount(layer, wanted, lambda: self._attach(layer, volatile=wanted.volatile))

    def _attach(self, layer: Writable, *, volatile: bool) -> None:
        """Mount the layers by fds: their paths may be long, and have characters that need escapes."""
        with ExitStack() as fds:

            def opened(path: str) -> str:
                return f"/proc/self/fd/{fds.enter_context(Owned(os.open(path, _PATH)))}"

            lowers = [
                opened(_mounted(lower, layer.merged) if is_image(lower) else lower) for lower in layer.lowers
            ]
            upper, work = opened(uppers.upper_of(layer)), opened(uppers.work_of(layer))
            options = [f"lowerdir={':'.join(lowers)}", f"upperdir={upper}", f"workdir={work}"]
            options.append("redirect_dir=on" if may_use_trusted_xattrs() else "userxattr")
            options += ["volatile"] if volatile else []
            try:
                mount("overlay", layer.merged, "overlay", 0, ",".join(options))
            except OSError as error:
                raise _refusal(layer, error) from error


def _mounted(image: str, place: str) -> str:
    """Mount an image where the overlay will cover it: overlayfs takes no detached mounts."""
    with Owned(open_image(os.path.realpath(image))) as fd, Owned(os.open(place, _PATH)) as target:
        detached.attach(fd, target)
    return place


def _refusal(layer: Writable, error: OSError) -> UserError:
    kind = kind_of(os.path.realpath(layer.path))
    shown = f"storage driver overlay2: the kernel refused the overlay mount ({reason(error)})"
    if error.errno == errno.EINVAL:
        cause = f"an upper on {kind} is not supported"
        if kind in ("ext4", "xfs", "btrfs", "tmpfs"):
            cause = "its log (`dmesg`) has the cause"
        return UserError(f"{shown}: {cause}; give a --root on ext4, xfs or btrfs, or {_OTHER}.")
    if error.errno == errno.EPERM:
        return UserError(f"{shown}: a user namespace may mount overlayfs since Linux 5.11; {_OTHER}.")
    return UserError(f"{shown} at {quoted(layer.merged)}; {_OTHER}.")


DRIVER = Overlay2
