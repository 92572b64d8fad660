"""What this kernel offers for mounts and storage drivers, without loading a module."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from unionfs.sys.fuseprobe import init_flags

_FILESYSTEMS: Final = ("fuse", "overlay", "btrfs", "zfs", "ext4", "xfs", "squashfs", "erofs")
# include/uapi/linux/fuse.h
_FLAGS: Final = {"FUSE passthrough": 1 << 37, "FUSE idmapped mounts": 1 << 40, "FUSE over io_uring": 1 << 41}


def kernel_features() -> list[str]:
    """Return the names of filesystems, device-mapper, and what FUSE offers (as root)."""
    found: list[str] = []
    known = misc = ""
    with suppress(OSError), open("/proc/filesystems", encoding="ascii") as table:
        known = table.read()
    with suppress(OSError), open("/proc/misc", encoding="ascii") as table:
        misc = table.read()
    found += [name for name in _FILESYSTEMS if name in known.split()]
    found += ["device-mapper"] if "device-mapper" in misc.split() else []
    flags = init_flags() or 0
    return found + [name for name, flag in _FLAGS.items() if flags & flag]
