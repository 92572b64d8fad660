"""Mounting without libfuse: mount(2) where that is allowed, else libfuse's helper fusermount3.

Source: fs/fuse/inode.c (the options), util/fusermount.c and lib/mount.c of libfuse 3 (the helper: the device
comes back over the socket that the environment variable _FUSE_COMMFD names).
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from unionfs.fuse.errors import SessionError
from unionfs.sys import detached
from unionfs.sys import mount as sys_mount
from unionfs.sys.calls import AT_FDCWD
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability
from unionfs.sys.mountinfo import MountEntry, mount_id_of_fd, mount_of_id, mounted_at
from unionfs.sys.openat2 import RESOLVE_NO_SYMLINKS, openat2

_SUPER: Final = ("dirsync", "lazytime", "sync")
"""What is a property of the filesystem, and not of the mount, of mount(8)'s names."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How a union is mounted, apart from what it shows."""

    source: str
    """What /proc/mounts shows as the source."""
    subtype: str
    """The type is shown as fuse.SUBTYPE; empty: fuse."""
    allow_other: bool
    read_only: bool
    flags: Sequence[str]
    """mount(8)'s names; those that ask for nothing special (rw, dev, suid, exec) count for nothing."""
    security: Sequence[str]
    """context= and its like."""


def mount(mountpoint: str, options: MountOptions) -> tuple[int, MountEntry | None]:
    """Mount; returns the device, non-blocking, and the mount, if it is still there. Raises SessionError."""
    if has_capability(CAP_SYS_ADMIN):
        return _by_call(mountpoint, options)
    return _by_helper(mountpoint, options), mounted_at(mountpoint)


def _by_call(mountpoint: str, options: MountOptions) -> tuple[int, MountEntry | None]:
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SessionError(f"/dev/fuse cannot be opened: {error.strerror}") from error
    words = [*options.flags, *(["ro"] if options.read_only else [])]
    attributes = 0
    for word in words:
        attributes |= detached.ATTRIBUTES.get(word, 0)
    parameters = [
        ("source", options.source),
        *([("subtype", options.subtype)] if options.subtype else []),
        ("fd", str(fd)),
        ("rootmode", f"{stat.S_IFDIR:o}"),
        ("user_id", str(os.getuid())),
        ("group_id", str(os.getgid())),
        ("default_permissions", ""),
        *([("allow_other", "")] if options.allow_other else []),
        *((word, "") for word in words if word in (*_SUPER, "ro")),
        *(label.split("=", 1) for label in options.security),
    ]
    try:
        # By fds, so that the owner of a directory above cannot lead root to another place meanwhile.
        with ExitStack() as fds:
            path = os.fsencode(mountpoint)
            target = openat2(AT_FDCWD, path, os.O_PATH | os.O_DIRECTORY, RESOLVE_NO_SYMLINKS)
            fds.callback(os.close, target)
            made = detached.new_filesystem("fuse", [(name, value) for name, value in parameters], attributes)
            fds.callback(os.close, made)
            detached.attach(made, target)
            mount_id = mount_id_of_fd(made)
    except OSError as error:
        os.close(fd)
        raise SessionError(f"the kernel says: {error.strerror}") from error
    return fd, mount_of_id(mount_id)


def _by_helper(mountpoint: str, options: MountOptions) -> int:
    helper = shutil.which("fusermount3") or "/usr/bin/fusermount3"
    words = [f"fsname={options.source}", *options.security]
    if options.subtype:
        words.append(f"subtype={options.subtype}")
    words = [word.replace("\\", "\\\\").replace(",", "\\,") for word in words]
    words.append("default_permissions")
    if options.allow_other:
        words.append("allow_other")
    if options.read_only:
        words.append("ro")
    words += options.flags
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            done = subprocess.run(
                [helper, "-o", ",".join(words), "--", mountpoint],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
            )
        except FileNotFoundError as error:
            raise SessionError("fusermount3 is missing, so install the package fuse3") from error
        theirs.close()
        if done.returncode != 0:
            said = " ".join(os.fsdecode(done.stderr).split())
            raise SessionError(said or "fusermount3 does not say why")
        fd = _received(ours)
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)
    return fd


def unmount(found: MountEntry) -> None:
    """Take a mount away that never could be used, whatever it takes."""
    try:
        sys_mount.unmount_id(found.mountpoint, found.mount_id, sys_mount.MNT_DETACH)
    except OSError:
        if has_capability(CAP_SYS_ADMIN):
            return  # fusermount3 works by the path alone, which may lead root elsewhere
        helper = shutil.which("fusermount3") or "/usr/bin/fusermount3"
        with contextlib.suppress(OSError):
            subprocess.run([helper, "-u", "-z", "--", found.mountpoint], capture_output=True, check=False)


def _received(channel: socket.socket) -> int:
    _, ancillary, _, _ = channel.recvmsg(1, socket.CMSG_SPACE(4))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return array.array("i", data[:4])[0]
    raise SessionError(f"fusermount3 sent no device ({os.strerror(errno.EPROTO)})")


def raise_readahead(device: str, size: int) -> None:
    """Let the kernel read ``size`` bytes ahead on the mount ``device`` (major:minor), where we may say so.

    INIT can only lower it from the 128 KiB that every FUSE mount begins with (fs/fuse/inode.c).
    """
    path = f"/sys/class/bdi/{device}/read_ahead_kb"
    # A user's mount, or no /sys here: smaller reads, nothing worse.
    with contextlib.suppress(OSError), open(path, "w", encoding="ascii") as setting:
        setting.write(str(size // 1024))
