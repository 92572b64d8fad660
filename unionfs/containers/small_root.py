"""A small tree for bubblewrap to start in, instead of the host's.

bubblewrap opens /proc before it creates its mount namespace, and still has it open when it changes to the
working directory. If that is a symlink to /proc/self/fd/3 (from an image, or raced into a volume), /proc
becomes the command's working directory, and `..` leads to the root of the tree in which bubblewrap was
started (as in CVE-2024-21626). The small tree contains only read-only programs and libraries, and the union.
Its /proc belongs to a pid namespace around the container's, so it shows PID/root and PID/fd of no process of
the host or of other containers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from unionfs.containers.call import Bundle
from unionfs.sys import detached
from unionfs.sys.calls import syscall
from unionfs.sys.fds import Owned
from unionfs.sys.namespaces import CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER, unshare
from unionfs.sys.unmount import MNT_DETACH, umount2

# arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h
_SYS_PIVOT_ROOT = {"x86_64": 155}.get(os.uname().machine, 41)

_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
"""The devices that bubblewrap's --dev binds from the host's /dev."""
_PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix", "/gnu")
"""Where bubblewrap's libraries are, besides /etc/ld.so.cache; ld.so(8)."""
_PROC_ATTRIBUTES = sum(detached.ATTRIBUTES[name] for name in ("nosuid", "nodev", "noexec"))
_FILES = ("/etc/ld.so.cache", "/etc/resolv.conf", "/etc/hosts")
NO_DEVICES = detached.ATTRIBUTES["nodev"] | detached.ATTRIBUTES["nosuid"]
_UNIFIED = "/sys/fs/cgroup/unified"
"""The second hierarchy of control groups on a host with both versions, which crun 1 refuses."""
_MAPPERS = ("/usr/bin/newuidmap", "/usr/bin/newgidmap")
"""Set-id programs, for a map of more than one id: crun calls them first, and they complain."""


def enter_small_root(
    merged: str, terminal: str | None, *, as_root: bool, bundle: Bundle | None = None
) -> None:
    """Enter the small tree, as pid 1 after `new_namespaces`. Raises OSError; needs Linux 5.12.

    Later mounts of the host appear only below the union, for storage with such a propagation.

    `merged` is the union, `terminal` the container's in the host's /dev/pts. The device files are the host's
    inodes, mounted read-only because uid 0 of the container could change their owner and mode (a device on a
    read-only mount remains writable). With `as_root`, /proc is also read-only.
    """
    # From the host's /proc, which the new root hides.
    files = {} if bundle is None else bundle.files(terminal)
    with _opened("/") as old:
        detached.change(old, propagation=detached.PROPAGATION["slave"], recursive=True)
    links = [path for path in _PROGRAMS if os.path.islink(path)]
    whole = ("/dev", "/sys") if bundle is not None and bundle.privileged else ()
    parts = [path for path in (*_PROGRAMS, *_FILES, *_DEVICES, "/sys") if os.path.exists(path)]
    parts = [path for path in parts if path not in links and not path.startswith(whole)]
    mounts = [(path, _private(path, detached.READ_ONLY)) for path in parts]
    mounts += [(path, _private(path)) for path in whole]
    unions = [merged] if bundle is None else [merged, bundle.root]
    mounts += [(path, detached.clone(merged, recursive=True)) for path in unions]
    if bundle is not None:
        if not bundle.privileged:
            for _, fd in mounts[-2:]:
                detached.change(fd, add=NO_DEVICES, recursive=True)
        mounts += _for_runtime(bundle)
    if terminal is not None and not whole:
        mounts.append((terminal, _private(terminal)))
    # An ordinary user's read-only /proc would prevent mounting the container's own; mount_too_revealing(),
    # fs/namespace.c.
    attributes = detached.READ_ONLY if as_root else 0
    mounts.append(("/proc", detached.new_filesystem("proc", (), attributes | _PROC_ATTRIBUTES)))
    root = detached.new_filesystem("tmpfs", [("mode", "0755"), ("size", "1m")])
    with _opened("/proc") as place:
        detached.attach(root, place)
    os.fchdir(root)
    os.mkdir("tmp")
    for path in links:
        os.symlink(os.readlink(path), path[1:])
    for path, fd in mounts:
        _attach(path[1:], fd)
    if bundle is not None:
        _fill(bundle, files)
    detached.change(root, add=detached.READ_ONLY)
    os.close(root)
    syscall(_SYS_PIVOT_ROOT, b".", b".")
    umount2(".", MNT_DETACH)
    os.chdir("/")


def _for_runtime(bundle: Bundle) -> list[tuple[str, int]]:
    """Return the mounts for an OCI runtime."""
    uid, gid = map(str, bundle.owner)
    parameters = [("mode", "0700"), ("size", "8m"), ("uid", uid), ("gid", gid)]
    mounts = [(bundle.path, detached.new_filesystem("tmpfs", parameters, NO_DEVICES))]
    if os.path.isdir(_UNIFIED):
        attributes = NO_DEVICES | detached.READ_ONLY
        mounts.append((_UNIFIED, detached.new_filesystem("tmpfs", [("size", "4k")], attributes)))
    mounts += [(path, _private(os.devnull)) for path in _MAPPERS if os.path.exists(path)]
    return mounts


def _fill(bundle: Bundle, files: Mapping[str, bytes]) -> None:
    """Write its files below the working directory."""
    for name, content in files.items():
        path = f"{bundle.path[1:]}/{name}"
        with open(path, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(content)
        os.chown(path, *bundle.owner)


def new_namespaces() -> None:
    """Enter a new mount namespace; the next child is pid 1 of a new pid namespace. Raises OSError.

    For an ordinary user also enter a new user namespace.
    """
    unshare(CLONE_NEWNS | CLONE_NEWPID | (CLONE_NEWUSER if os.geteuid() != 0 else 0))


def _private(path: str, attributes: int = 0) -> int:
    """Return a detached clone of the mount at a path that receives no later mounts of the host."""
    fd = detached.clone(path, recursive=True)
    detached.change(fd, add=attributes, propagation=detached.PROPAGATION["private"], recursive=True)
    return fd


def _attach(path: str, fd: int) -> None:
    """Create a path below the working directory, and attach a mount there."""
    if os.path.isdir(fd):
        os.makedirs(path, exist_ok=True)
    elif not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    with _opened(path) as target, Owned(fd):
        detached.attach(fd, target)


def _opened(path: str) -> Owned:
    return Owned(os.open(path, os.O_PATH | os.O_CLOEXEC))
