"""Hypothesis' stateful machine: draws operations that fit the present tree and plays them on a ``Pair``."""

from __future__ import annotations

import os
import stat
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from hypothesis.strategies import SearchStrategy

from tests.oracle.layers import CAPABILITY, LONG_NAME, TEAM
from tests.oracle.operations import Op
from tests.oracle.pair import Pair
from tests.support import acl, syscalls

# Names of the lowers come again, so that something is created over a whiteout or in an opaque directory.
NAMES = [
    b"new", b"n2", b"gone", b"low", b"hidden", b"a", b"b", b"x", b"both", b"f", b"top", b"never-was", b"d",
    b"sp ace\n", b"\xfe\xff", b"N" * 255, b"\xc3\xa9" * 127 + b"x",
]  # fmt: skip
ODD_PATHS = [
    b"", b".", b"file/x", b"nowhere/x", b"m/", b"file/", b"sl-dir/both", b"sl-dir/new", b"sl-file/",
    b"sl-dir/",     b"home/f", b"home/new", b"new/", b"m/sub/../low", b"L" * 256, b"m/" + b"L" * 256,
    LONG_NAME + b"/x",
    b"m/.",     b"sl-lost", b"sl-lost/x", b"white", b"gone-dir", b"only-top",
]  # fmt: skip
MODES = [0o644, 0o600, 0o755, 0o666, 0o777, 0o4755, 0o2755, 0o6777, 0o2644, 0o1777, 0o000, 0o7777]
IDS = [(-1, -1), (0, 0), (1000, 1000), (1000, TEAM), (-1, TEAM), (1002, -1), (-1, 1000)]
XATTRS = [
    "user.one", "user.dir", "user.new", "user.empty", "trusted.two", "trusted.overlay.opaque",
    "trusted.overlay.origin", "trusted.overlay.overlay.opaque", "trusted.overlay.whiteout",
    "trusted.overlay.",     "trusted.overlayx", "user.overlay.opaque", "security.capability",
    "security.other", "bogus.name", "user.",
    "user." + "n" * 250, "user." + "n" * 251, "trusted.overlay." + "n" * 235, acl.ACCESS, acl.DEFAULT,
]  # fmt: skip
ACLS = [
    acl.simple(6, 4, 4), acl.simple(7, 7, 0, users={1002: 5}, mask=5),
    acl.simple(7, 0, 0, users={1000: 6}, mask=2),
    acl.encode([]), b"junk", acl.encode([(acl.USER_OBJ, 7, 0)]),
]  # fmt: skip
VALUES = [b"", b"v", b"y", b"x", b"v" * 300, b"\0\xff", b"v" * 70000]
TIMES = [
    (1_100_000_000, 123_456_789), (0, 0), (0, 1), (-2, 7), (5_000_000_000, 1), (1, 999_999_999),
    (0, syscalls.UTIME_NOW), (0, syscalls.UTIME_OMIT), (0, 1_000_000_000),
]  # fmt: skip
SIZES = [0, 1, 5, 300, 4096, 4097, 100_000, 300_003]
OFFSETS = [0, 1, 100, 4095, 8192, 200_000]
OPEN_FLAGS = [
    os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_CREAT | os.O_EXCL,
    os.O_RDWR | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND, os.O_RDONLY | os.O_DIRECTORY,
    os.O_RDONLY | os.O_NOFOLLOW, os.O_PATH, os.O_RDONLY | os.O_CREAT, os.O_CREAT | os.O_DIRECTORY,
]  # fmt: skip
DEVICES = [
    (stat.S_IFIFO | 0o666, (0, 0)), (stat.S_IFCHR | 0o644, (1, 3)), (stat.S_IFCHR | 0o644, (0, 0)),
    (stat.S_IFCHR | 0o600, (0, 1)), (stat.S_IFBLK | 0o660, (7, 200)), (stat.S_IFBLK | 0o660, (0, 0)),
    (stat.S_IFSOCK | 0o777, (0, 0)), (stat.S_IFREG | 0o664, (0, 0)), (stat.S_IFIFO | 0o4711, (0, 0)),
    (stat.S_IFCHR | 0o644, (259, 300_000)),
]  # fmt: skip
TARGETS = [b"file", b"m", b"nowhere", b"/absolute/lost", b"sl-file", b"t" * 4095, b"t" * 300, b"", b"caf\xe9"]

who = st.sampled_from(["root", "user", "user", "root", "other"])
umask = st.sampled_from([0o022, 0o022, 0, 0o077, 0o027])
handle = st.integers(0, 3)
content = st.sampled_from([b"", b"z", b"hello\n" * 30, b"\0" * 5000, b"w" * 70_000])
some = st.data()


class Machine(RuleBasedStateMachine):
    """Each rule is one operation on both sides; ``Pair.step`` compares. ``pair`` is set by a subclass."""

    pair: ClassVar[Pair]
    played: ClassVar[list[Op]] = []

    @initialize()
    def begin(self) -> None:
        """A fresh arena."""
        type(self).played = []
        self.finished = False
        self.failed = False
        self.pair.begin()

    def teardown(self) -> None:
        """The checks at the end of an example, unless it failed before."""
        if not getattr(self, "failed", True) and self.pair.arena:
            self.pair.finish()

    def do(self, name: str, identity: str, *args: object, mask: int = 0o022) -> None:
        """Play one operation."""
        op = Op(name, identity, mask, args)
        type(self).played = [*self.played, op]
        self.failed = True
        self.pair.step(op)
        self.failed = False

    # -- choosing names

    def _existing(self, *kinds: int) -> SearchStrategy[bytes]:
        paths = sorted(p for p, e in self.pair.tree.items() if p != b"." and (not kinds or e.kind in kinds))
        return st.sampled_from(paths or [b"file"])

    def _fresh(self) -> SearchStrategy[bytes]:
        folders = sorted(p for p, e in self.pair.tree.items() if e.kind == stat.S_IFDIR)
        return st.builds(
            lambda folder, name: name if folder == b"." else folder + b"/" + name,
            st.sampled_from(folders),
            st.sampled_from(NAMES),
        )

    def _path(self, data: st.DataObject, *kinds: int) -> bytes:
        """Mostly an existing name (of the given types), sometimes a free or an odd one."""
        way = data.draw(st.integers(0, 9))
        if way < 7:
            return data.draw(self._existing(*kinds))
        return data.draw(self._fresh() if way < 9 else st.sampled_from(ODD_PATHS))

    def _place(self, data: st.DataObject) -> bytes:
        """Mostly a free name, sometimes an existing or an odd one."""
        way = data.draw(st.integers(0, 9))
        if way < 7:
            return data.draw(self._fresh())
        return data.draw(self._existing() if way < 9 else st.sampled_from(ODD_PATHS))

    # -- operations by path

    @rule(data=some, who=who, umask=umask, content=content)
    def create(self, data: st.DataObject, who: str, umask: int, content: bytes) -> None:
        flags = data.draw(st.sampled_from([os.O_WRONLY, os.O_WRONLY | os.O_EXCL, os.O_RDWR | os.O_TRUNC]))
        self.do(
            "create", who, self._place(data), flags, data.draw(st.sampled_from(MODES)), content, mask=umask
        )

    @rule(data=some, who=who, content=content)
    def write(self, data: st.DataObject, who: str, content: bytes) -> None:
        flags = data.draw(
            st.sampled_from([os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_TRUNC])
        )
        self.do(
            "write", who, self._path(data, stat.S_IFREG), flags, data.draw(st.sampled_from(OFFSETS)), content
        )

    @rule(data=some, who=who)
    def read(self, data: st.DataObject, who: str) -> None:
        path = self._path(data, stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR)
        if self._is_plain(path):
            self.do("read", who, path, data.draw(st.sampled_from(OFFSETS)), 5000)

    def _is_plain(self, path: bytes) -> bool:
        """Device nodes are not opened: what is behind them is the host's."""
        entry = self.pair.tree.get(os.path.normpath(path))
        return entry is None or entry.kind not in (stat.S_IFCHR, stat.S_IFBLK)

    @rule(data=some, who=who)
    def truncate(self, data: st.DataObject, who: str) -> None:
        self.do("truncate", who, self._path(data, stat.S_IFREG), data.draw(st.sampled_from([*SIZES, -1])))

    @rule(data=some, who=who)
    def chmod(self, data: st.DataObject, who: str) -> None:
        self.do("chmod", who, self._path(data), data.draw(st.sampled_from(MODES)))

    @rule(data=some, who=who)
    def chown(self, data: st.DataObject, who: str) -> None:
        self.do("chown", who, self._path(data), *data.draw(st.sampled_from(IDS)))

    @rule(data=some, who=who)
    def link(self, data: st.DataObject, who: str) -> None:
        self.do("link", who, self._path(data), self._place(data))

    @rule(data=some, who=who)
    def symlink(self, data: st.DataObject, who: str) -> None:
        self.do("symlink", who, data.draw(st.sampled_from(TARGETS)), self._place(data))

    @rule(data=some, who=who, flags=st.sampled_from([0, 0, 0, 1, 2, 2, 4, 3, 5, 8]))
    def rename(self, data: st.DataObject, who: str, flags: int) -> None:
        target = self._path(data) if flags & 2 or data.draw(st.booleans()) else self._place(data)
        self.do("rename", who, self._path(data), target, flags)

    @rule(data=some, who=who)
    def rename_over(self, data: st.DataObject, who: str) -> None:
        kind = data.draw(st.sampled_from([stat.S_IFREG, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK]))
        self.do("rename", who, data.draw(self._existing(kind)), data.draw(self._existing(kind)), 0)

    @rule(data=some, who=who)
    def unlink(self, data: st.DataObject, who: str) -> None:
        kinds = [stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK]
        self.do("unlink", who, self._path(data, *(kinds if data.draw(st.integers(0, 7)) else [stat.S_IFDIR])))

    @rule(data=some, who=who, umask=umask)
    def mkdir(self, data: st.DataObject, who: str, umask: int) -> None:
        self.do("mkdir", who, self._place(data), data.draw(st.sampled_from(MODES)), mask=umask)

    @rule(data=some, who=who)
    def rmdir(self, data: st.DataObject, who: str) -> None:
        self.do("rmdir", who, self._path(data, *([stat.S_IFDIR] if data.draw(st.integers(0, 7)) else [])))

    @rule(data=some)
    def remove_all(self, data: st.DataObject) -> None:
        """rm -rf of a directory by root, step by step; one time in two it is made again."""
        root = data.draw(self._existing(stat.S_IFDIR))
        below = [p for p in self.pair.tree if p == root or p.startswith(root + b"/")]
        if len(below) > 12:
            return
        for path in sorted(below, key=lambda p: (p.count(b"/"), p), reverse=True):
            kind = self.pair.tree[path].kind
            self.do("rmdir" if kind == stat.S_IFDIR else "unlink", "root", path)
        if data.draw(st.booleans()):
            self.do("mkdir", "root", root, 0o777, mask=0)

    @rule(data=some, who=who, umask=umask, what=st.sampled_from(DEVICES))
    def mknod(self, data: st.DataObject, who: str, umask: int, what: tuple[int, tuple[int, int]]) -> None:
        self.do("mknod", who, self._place(data), *what, mask=umask)

    @rule(data=some, who=who, name=st.sampled_from(XATTRS))
    def setxattr(self, data: st.DataObject, who: str, name: str) -> None:
        pool = (
            ACLS
            if name.startswith("system.")
            else [CAPABILITY, b"j"]
            if name.endswith("capability")
            else VALUES
        )
        flags = data.draw(st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]))
        self.do("setxattr", who, self._path(data), name, data.draw(st.sampled_from(pool)), flags)

    @rule(data=some, who=who, name=st.sampled_from(XATTRS))
    def getxattr(self, data: st.DataObject, who: str, name: str) -> None:
        self.do("getxattr", who, self._path(data), name)

    @rule(data=some, who=who, name=st.sampled_from(XATTRS))
    def removexattr(self, data: st.DataObject, who: str, name: str) -> None:
        path = self._path(data)
        entry = self.pair.tree.get(path)
        if entry is not None and entry.xattrs and data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(entry.xattrs)))
        self.do("removexattr", who, path, name)

    @rule(
        data=some, who=who, atime=st.sampled_from(TIMES), mtime=st.sampled_from(TIMES), follow=st.booleans()
    )
    def utimens(
        self, data: st.DataObject, who: str, atime: tuple[int, int], mtime: tuple[int, int], follow: bool
    ) -> None:
        self.do("utimens", who, self._path(data), atime, mtime, follow)

    @rule(
        data=some,
        who=who,
        name=st.sampled_from(["listxattr", "readdir", "readlink", "stat", "lstat", "namemax"]),
    )
    def look_at(self, data: st.DataObject, who: str, name: str) -> None:
        kinds = {"readdir": [stat.S_IFDIR], "readlink": [stat.S_IFLNK]}.get(name, [])
        self.do(name, who, self._path(data, *kinds))

    @rule(data=some, who=who, mode=st.sampled_from([os.R_OK, os.W_OK, os.X_OK, os.F_OK]))
    def access(self, data: st.DataObject, who: str, mode: int) -> None:
        self.do("access", who, self._path(data), mode)

    @rule(data=some)
    def fsync(self, data: st.DataObject) -> None:
        path = self._path(data, stat.S_IFREG, stat.S_IFDIR)
        if self._is_plain(path):
            self.do("fsync", "root", path)

    @rule()
    def drop_caches(self) -> None:
        self.do("drop_caches", "root")

    # -- operations by open file

    @rule(data=some, who=who, number=handle, flags=st.sampled_from(OPEN_FLAGS), umask=umask)
    def open(self, data: st.DataObject, who: str, number: int, flags: int, umask: int) -> None:
        path = self._place(data) if flags & os.O_CREAT else self._path(data, stat.S_IFREG, stat.S_IFDIR)
        if self._is_plain(path):
            self.do("open", who, number, path, flags, data.draw(st.sampled_from(MODES)), mask=umask)

    @rule(data=some, who=who, number=handle)
    def open_and_remove(self, data: st.DataObject, who: str, number: int) -> None:
        """An open file loses its name, by unlink or by a rename over it."""
        path = data.draw(self._existing(stat.S_IFREG))
        self.do("open", who, number, path, data.draw(st.sampled_from([os.O_RDONLY, os.O_RDWR])), 0)
        if data.draw(st.booleans()):
            self.do("unlink", "root", path)
        else:
            self.do("rename", "root", data.draw(self._existing(stat.S_IFREG)), path, 0)
        self.do("h_stat", who, number)

    def _handle(self, data: st.DataObject) -> tuple[str, int]:
        """An open handle, when there is one."""
        opened = sorted((name, number) for name, numbers in self.pair.handles.items() for number in numbers)
        return data.draw(st.sampled_from(opened or [("root", 0)]))

    @rule(data=some, content=content)
    def handle_io(self, data: st.DataObject, content: bytes) -> None:
        who, number = self._handle(data)
        match data.draw(st.integers(0, 4)):
            case 0:
                self.do("h_read", who, number, data.draw(st.sampled_from(OFFSETS)), 5000)
            case 1:
                self.do("h_write", who, number, data.draw(st.sampled_from(OFFSETS)), content)
            case 2:
                self.do("h_append", who, number, content)
            case 3:
                self.do("h_truncate", who, number, data.draw(st.sampled_from(SIZES)))
            case 4:
                self.do("h_fsync", who, number)

    @rule(
        data=some, name=st.sampled_from(["h_stat", "h_chmod", "h_chown", "h_list", "h_setxattr", "h_xattrs"])
    )
    def handle_meta(self, data: st.DataObject, name: str) -> None:
        who, number = self._handle(data)
        if name == "h_chmod":
            self.do(name, who, number, data.draw(st.sampled_from(MODES)))
        elif name == "h_chown":
            self.do(name, who, number, *data.draw(st.sampled_from(IDS)))
        elif name == "h_setxattr":
            self.do(
                name, who, number, data.draw(st.sampled_from(XATTRS[:4])), data.draw(st.sampled_from(VALUES))
            )
        else:
            self.do(name, who, number)

    @rule(
        data=some,
        flags=st.sampled_from([os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_WRONLY]),
        other=handle,
    )
    def handle_reopen(self, data: st.DataObject, flags: int, other: int) -> None:
        who, number = self._handle(data)
        self.do("h_reopen", who, number, other, flags)

    @rule(data=some)
    def handle_close(self, data: st.DataObject) -> None:
        who, number = self._handle(data)
        self.do("h_close", who, number)
