"""A whole tree as a comparable value: every entry's attributes, xattrs and content."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from tests.support import syscalls


@dataclass(frozen=True)
class Entry:
    """One name of a tree. Times are nanoseconds; ``content`` is a digest, or a symlink's target."""

    mode: int
    uid: int
    gid: int
    size: int
    rdev: int
    nlink: int
    mtime: int
    ctime: int
    ino: int
    dev: int
    content: bytes
    xattrs: dict[str, bytes] = field(default_factory=dict)
    d_ino: int = 0
    d_type: int = 0
    names: tuple[bytes, ...] = ()  # of a directory, as it lists them, sorted

    @property
    def kind(self) -> int:
        """The file type bits of the mode."""
        return stat.S_IFMT(self.mode)


Tree = dict[bytes, Entry]
"""Entries by path relative to the root; the root itself is ``b"."``."""


def read_xattrs(path: str | bytes, *, follow: bool = False) -> dict[str, bytes]:
    """All xattrs that the caller may list; one that vanishes meanwhile is left out."""
    found = {}
    for name in os.listxattr(path, follow_symlinks=follow):
        found[name] = os.getxattr(path, name, follow_symlinks=follow)
    return found


def _digest(fd: int) -> bytes:
    total = hashlib.blake2b(digest_size=12)
    while chunk := os.read(fd, 1 << 20):
        total.update(chunk)
    return total.digest()


def _entry(dir_fd: int, name: bytes, *, contents: bool, xattrs: bool, **extra: object) -> Entry:
    path = b"/proc/self/fd/%d/%s" % (dir_fd, name)
    found = os.lstat(name, dir_fd=dir_fd)
    content = b""
    if stat.S_ISLNK(found.st_mode):
        content = os.fsencode(os.readlink(name, dir_fd=dir_fd))
    elif stat.S_ISREG(found.st_mode) and contents:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NOATIME, dir_fd=dir_fd)
        try:
            content = _digest(fd)
        finally:
            os.close(fd)
    return Entry(
        mode=found.st_mode,
        uid=found.st_uid,
        gid=found.st_gid,
        size=found.st_size,
        rdev=found.st_rdev,
        nlink=found.st_nlink,
        mtime=found.st_mtime_ns,
        ctime=found.st_ctime_ns,
        ino=found.st_ino,
        dev=found.st_dev,
        content=content,
        xattrs=read_xattrs(path) if xattrs else {},
        **extra,  # type: ignore[arg-type]
    )


def _walk(fd: int, prefix: bytes, tree: Tree, *, contents: bool, xattrs: bool, record: Entry | None) -> None:
    """List ``fd`` into the tree; ``record`` is the directory's own entry, stored with its names."""
    listed = syscalls.list_directory(fd)
    names = sorted(item.name for item in listed)
    here = prefix[:-1] or b"."
    base = record if record is not None else _entry(fd, b".", contents=contents, xattrs=xattrs)
    tree[here] = Entry(**{**base.__dict__, "names": tuple(names)})
    for item in sorted(listed):
        if item.name in (b".", b".."):
            continue
        entry = _entry(fd, item.name, contents=contents, xattrs=xattrs, d_ino=item.ino, d_type=item.type)
        path = prefix + item.name
        tree[path] = entry
        if stat.S_ISDIR(entry.mode):
            child = os.open(item.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            try:
                _walk(child, path + b"/", tree, contents=contents, xattrs=xattrs, record=entry)
            finally:
                os.close(child)


def take(root: str | bytes | os.PathLike[str], *, contents: bool = True, xattrs: bool = True) -> Tree:
    """The tree under ``root``, walked by directory descriptors (any depth, any name)."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        tree: Tree = {}
        _walk(fd, b"", tree, contents=contents, xattrs=xattrs, record=None)
        return tree
    finally:
        os.close(fd)


@contextmanager
def held(root: str | bytes | os.PathLike[str]) -> Iterator[None]:
    """The kernel forgets no object of the tree meanwhile, nor does the daemon what is only in its memory."""
    with ExitStack() as stack:
        for path, _, names in os.walk(os.fsencode(root)):
            for name in (b".", *names):
                fd = os.open(os.path.join(path, name), os.O_PATH | os.O_NOFOLLOW)
                stack.callback(os.close, fd)
        yield


def dot_inodes(root: str | bytes | os.PathLike[str]) -> dict[bytes, int]:
    """The d_ino of "." and ".." in one directory."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return {item.name: item.ino for item in syscalls.list_directory(fd) if item.name in (b".", b"..")}
    finally:
        os.close(fd)


def manifest(root: str | bytes | os.PathLike[str]) -> dict[bytes, tuple[object, ...]]:
    """What must never change in a lower: everything but atime. Equal manifests mean an unchanged tree."""
    return {
        path: (
            e.mode, e.uid, e.gid, e.size, e.rdev, e.nlink, e.mtime, e.ctime, e.ino, e.content,
            tuple(sorted(e.xattrs.items())),
        )
        for path, e in take(root).items()
    }  # fmt: skip
