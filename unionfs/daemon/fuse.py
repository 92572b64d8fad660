"""The host's FUSE device and configuration."""

from __future__ import annotations

import errno
import os

from unionfs.errors import reason

FUSE_DEVICE = "/dev/fuse"
FUSE_CONF = "/etc/fuse.conf"


def fuse_device_problem(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return (
            f"{FUSE_DEVICE} is missing; load the kernel module by `modprobe fuse`, or give the container "
            "the device by `--device /dev/fuse`."
        )
    if error.errno == errno.EACCES:
        return (
            f"{FUSE_DEVICE} cannot be opened by this user (uid {os.geteuid()}); run `chmod 666 "
            f"{FUSE_DEVICE}` as root."
        )
    if error.errno == errno.EPERM:
        return (
            f"{FUSE_DEVICE} is not allowed to this container; start it with `--device {FUSE_DEVICE}`, or "
            "allow char device 10:229."
        )
    return f"{FUSE_DEVICE} cannot be opened: {reason(error)}; check that the kernel has FUSE."


def user_allow_other(conf: str = FUSE_CONF) -> bool:
    """Return whether ordinary users may use allow_other; fusermount3(1)."""
    try:
        with open(conf, encoding="utf-8", errors="replace") as lines:
            return any(line.strip() == "user_allow_other" for line in lines)
    except OSError:
        return False
