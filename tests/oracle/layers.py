"""The initial lowers of the oracle: one small tree with every case that a union treats specially.

``build`` makes it identically each time (modes, owners, times, xattrs), so two copies differ only in inode
numbers. Topmost lower first, as everywhere.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import Any

from tests.support import acl

EPOCH = 1_000_000_000
"""Modification times in the lowers start here (seconds), long before any test runs."""

LONG_NAME = b"n" * 255
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
"""security.capability with cap_net_bind_service=ep (struct vfs_cap_data, revision 2)."""

USER, GROUP, TEAM = 1000, 1000, 1001


class Layer:
    """Builds one lower."""

    def __init__(self, root: Path) -> None:
        self.root = os.fsencode(root)
        os.mkdir(root)
        self._times: list[bytes] = [self.root]

    def _at(self, name: str | bytes) -> bytes:
        path = os.path.join(self.root, os.fsencode(name))
        self._times.append(path)
        return path

    def attributes(self, path: bytes, mode: int, uid: int, gid: int, xattrs: dict[str, bytes]) -> None:
        """Set owner, then mode, then xattrs (a chown would clear suid bits and capabilities)."""
        os.chown(path, uid, gid, follow_symlinks=False)
        if not stat.S_ISLNK(os.lstat(path).st_mode):
            os.chmod(path, mode)
        for name, value in xattrs.items():
            os.setxattr(path, name, value, follow_symlinks=False)

    def file(
        self, name: str | bytes, data: bytes, mode: int = 0o644, uid: int = 0, gid: int = 0, **xattrs: bytes
    ) -> None:
        """A regular file; keyword arguments are xattrs with "_" for the first "."."""
        path = self._at(name)
        with open(path, "wb") as file:
            file.write(data)
        self.attributes(path, mode, uid, gid, _names(xattrs))

    def directory(
        self, name: str | bytes, mode: int = 0o755, uid: int = 0, gid: int = 0, **xattrs: bytes
    ) -> None:
        """A directory."""
        path = self._at(name)
        os.mkdir(path)
        self.attributes(path, mode, uid, gid, _names(xattrs))

    def symlink(self, name: str, target: str | bytes, uid: int = 0) -> None:
        """A symbolic link."""
        path = self._at(name)
        os.symlink(os.fsencode(target), path)
        self.attributes(path, 0, uid, uid, {})

    def link(self, name: str, existing: str) -> None:
        """A hard link."""
        os.link(os.path.join(self.root, os.fsencode(existing)), self._at(name))

    def node(self, name: str, mode: int, device: tuple[int, int] = (0, 0), uid: int = 0) -> None:
        """A fifo, socket or device."""
        path = self._at(name)
        os.mknod(path, mode, os.makedev(*device))
        self.attributes(path, stat.S_IMODE(mode), uid, uid, {})

    def whiteout(self, name: str) -> None:
        """A whiteout: character device 0/0 (Documentation/filesystems/overlayfs.rst)."""
        self.node(name, stat.S_IFCHR | 0o000)

    def sparse(self, name: str, size: int, tail: bytes) -> None:
        """A file with data only at its end."""
        path = self._at(name)
        with open(path, "wb") as file:
            file.seek(size)
            file.write(tail)

    def finish(self) -> None:
        """Set the old time of every object, children before parents."""
        for index, path in enumerate(reversed(self._times)):
            when = (EPOCH + len(self._times) - index) * 10**9 + 123456789
            os.utime(path, ns=(when + 5, when), follow_symlinks=False)


def _names(xattrs: dict[str, bytes]) -> dict[str, bytes]:
    special = {"acl": acl.ACCESS, "default_acl": acl.DEFAULT, "opaque": "trusted.overlay.opaque"}
    return {special.get(key, key.replace("_", ".", 1)): value for key, value in xattrs.items()}


def build(roots: list[Path]) -> None:
    """Fill two or three new directories, topmost first."""
    old = os.umask(0)
    try:
        layers = [Layer(root) for root in roots]
        for layer in layers:
            os.chmod(layer.root, 0o777)
        _bottom(layers[-1])
        _above(layers[-2])
        if len(layers) > 2:
            _top(layers[0])
        for layer in layers:
            layer.finish()
    finally:
        os.umask(old)


def _bottom(low: Layer) -> None:
    low.file("file", b"bottom " * 40)
    low.file("empty", b"")
    low.file("script", b"#!/bin/sh\n", 0o4755)
    low.file("suid-user", b"s" * 9, 0o6777, USER, GROUP)
    low.file("cap", b"c" * 7, 0o777, USER, GROUP, security_capability=CAPABILITY)
    low.file("acl", b"a" * 5, 0o640, acl=acl.simple(6, 4, 0, users={USER: 6}, mask=6))
    low.file("xattrs", b"x" * 30, 0o666, user_one=b"1", trusted_two=b"22", user_empty=b"")
    escaped: dict[str, Any] = {"trusted_overlay.overlay.opaque": b"y", "trusted_overlay.origin": b""}
    low.file("escaped", b"e", 0o666, **escaped)
    low.file(b"caf\xe9-\xff\n", b"not utf-8")
    low.file(LONG_NAME, b"long")
    low.sparse("sparse", 300_000, b"end")
    low.file("hard1", b"linked", 0o666)
    low.link("hard2", "hard1")
    low.symlink("sl-file", "file")
    low.symlink("sl-dir", "m")
    low.symlink("sl-lost", "nowhere/at all", USER)
    low.node("fifo", stat.S_IFIFO | 0o666)
    low.node("null", stat.S_IFCHR | 0o666, (1, 3))
    low.node("sock", stat.S_IFSOCK | 0o755, uid=USER)
    low.directory("m", 0o777, user_dir=b"bottom")
    low.file("m/low", b"m/low")
    low.file("m/both", b"hidden by the layer above")
    low.file("m/gone", b"whited out above")
    low.link("m/hard3", "hard1")
    low.directory("m/sub", 0o777)
    low.file("m/sub/deep", b"deep", 0o600, USER, GROUP)
    low.directory("opaque")
    low.file("opaque/hidden", b"hidden")
    low.directory("white", 0o777)
    low.file("white/a", b"a")
    low.directory("white/b")
    # overlayfs filters whiteouts out of merged directories only, so the marked one must be merged
    low.directory("marked")
    low.file("marked/gone", b"whited out by an xattr above")
    low.directory("gone-dir")
    low.file("gone-dir/x", b"x")
    low.directory("dir-now-file")
    low.file("dir-now-file/x", b"x")
    low.file("file-now-dir", b"file")
    low.directory("setgid", 0o2777, gid=TEAM)
    low.file("setgid/f", b"f", 0o2775, gid=TEAM)
    low.directory("inherit", 0o777, default_acl=acl.simple(7, 5, 1, users={USER: 7}, mask=7))
    low.file("inherit/f", b"f")
    low.directory("sticky", 0o1777)
    low.file("sticky/root", b"r", 0o666)
    low.file("sticky/user", b"u", 0o644, USER, GROUP)
    low.directory("home", 0o700, USER, GROUP)
    low.file("home/f", b"mine", 0o600, USER, GROUP)
    low.directory("home/d", 0o755, USER, GROUP)


def _above(mid: Layer) -> None:
    mid.directory("m", 0o775, gid=TEAM, user_dir=b"middle")
    mid.file("m/both", b"seen", 0o664, gid=TEAM)
    mid.whiteout("m/gone")
    mid.file("m/mid", b"m/mid" * 100)
    mid.directory("opaque", 0o777, opaque=b"y")
    mid.file("opaque/seen", b"seen")
    mid.directory("white", 0o777)
    mid.whiteout("white/a")
    mid.whiteout("white/b")
    mid.whiteout("gone-dir")
    mid.whiteout("never-was")
    mid.file("dir-now-file", b"now a file", 0o666)
    mid.directory("file-now-dir", 0o777)
    mid.file("file-now-dir/inside", b"i")
    mid.directory("marked", 0o777, opaque=b"x")
    whiteout: dict[str, Any] = {"trusted_overlay.whiteout": b""}
    mid.file("marked/gone", b"", **whiteout)
    mid.file("marked/stays", b"stays")


def _top(top: Layer) -> None:
    top.directory("m", 0o777)
    top.directory("m/sub", 0o1777, USER, GROUP)
    top.file("m/sub/top", b"top")
    top.file("m/top", b"m/top", 0o666, USER, GROUP)
    top.whiteout("m/low")
    top.directory("opaque", 0o777)
    top.file("opaque/top", b"t")
    top.directory("gone-dir", 0o777)
    top.file("gone-dir/again", b"again", 0o666)
    top.file("file", b"top " * 25, 0o666)
    top.directory("only-top", 0o777)
    top.file("only-top/f", b"f", 0o666)
