"""Mounting without libfuse: mount(2) where permitted, else libfuse's helper fusermount3.

Source: fs/fuse/inode.c (the options), util/fusermount.c and lib/mount.c of libfuse 3 (the helper sends the
device over the socket in the environment variable _FUSE_COMMFD).
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import stat
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from unionfs.fuse.errors import SessionError
from unionfs.settings.mount import NOT_FOR_LIBFUSE
from unionfs.sys import detached
from unionfs.sys.calls import AT_FDCWD
from unionfs.sys.capabilities import CAP_SYS_ADMIN, has_capability
from unionfs.sys.fds import close_quietly
from unionfs.sys.fusermount import find_fusermount
from unionfs.sys.mountinfo import MountEntry, mount_id_of_fd, mount_of_id, mounted_at
from unionfs.sys.openat2 import RESOLVE_NO_SYMLINKS, openat2

_SUPER: Final = ("dirsync", "lazytime", "sync")
"""Options of mount(8) for the filesystem, not the mount."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """The mount options of a union, without its layers."""

    source: str
    """The source in /proc/mounts."""
    subtype: str
    """The type is fuse.SUBTYPE; fuse if empty."""
    allow_other: bool
    read_only: bool
    flags: Sequence[str]
    """Options of mount(8); the defaults (rw, dev, suid, exec) are ignored."""
    security: Sequence[str]
    """context= and similar options."""


def mount(mountpoint: str, options: MountOptions) -> tuple[int, MountEntry | None]:
    """Mount; returns the non-blocking device, and the mount if it still exists. Raises SessionError."""
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
        # By fds, so that the owner of a parent directory cannot redirect root.
        with ExitStack() as fds:
            path = os.fsencode(mountpoint)
            target = openat2(AT_FDCWD, path, os.O_PATH | os.O_DIRECTORY, RESOLVE_NO_SYMLINKS)
            fds.callback(close_quietly, target)
            made = detached.new_filesystem("fuse", [(name, value) for name, value in parameters], attributes)
            fds.callback(close_quietly, made)
            detached.attach(made, target)
            mount_id = mount_id_of_fd(made)
    except OSError as error:
        os.close(fd)
        raise SessionError(f"the kernel says: {error.strerror}") from error
    return fd, mount_of_id(mount_id)


def _by_helper(mountpoint: str, options: MountOptions) -> int:
    helper = find_fusermount() or "fusermount3"
    words = [f"fsname={options.source}", *options.security]
    if options.subtype:
        words.append(f"subtype={options.subtype}")
    words = [word.replace("\\", "\\\\").replace(",", "\\,") for word in words]
    words.append("default_permissions")
    if options.allow_other:
        words.append("allow_other")
    if options.read_only:
        words.append("ro")
    words += (flag for flag in options.flags if flag not in NOT_FOR_LIBFUSE)
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
            raise SessionError(said or "fusermount3 failed without a message")
        fd = _received(ours)
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)
    return fd


def _received(channel: socket.socket) -> int:
    _, ancillary, _, _ = channel.recvmsg(1, socket.CMSG_SPACE(4))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return array.array("i", data[:4])[0]
    raise SessionError(f"fusermount3 sent no device ({os.strerror(errno.EPROTO)})")


def raise_readahead(device: str, size: int) -> None:
    """Set the readahead of the mount ``device`` (major:minor) to ``size`` bytes, where permitted.

    INIT can only lower it from the initial 128 KiB of a FUSE mount (fs/fuse/inode.c).
    """
    path = f"/sys/class/bdi/{device}/read_ahead_kb"
    # In a user's mount, or without /sys, reads stay smaller.
    with contextlib.suppress(OSError), open(path, "w", encoding="ascii") as setting:
        setting.write(str(size // 1024))
