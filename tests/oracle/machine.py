"""Draws operations that fit the current tree, and plays them on a ``Pair``.

A seed decides everything: the same code on the same kernel plays the same operations, independent of the
repository's location and other code in the process. So numbers come only from ``random.Random`` (seeded with
a text, which does not go through ``hash``), every choice is from a list or a sorted sequence, and the source
tree is overlayfs's. A library that draws examples would depend on its environment: Hypothesis adds constants
from the source of every imported module to its integers. Its shrinking is not needed either: leaving out
steps (``replay``) shortens a sequence of operations best.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Sequence
from typing import TypeVar

from tests.oracle import values
from tests.oracle.operations import Op
from tests.oracle.pair import Pair

_T = TypeVar("_T")
HANDLES = 4
"""The maximum number of open files of an identity."""


class Machine:
    """One example in a fresh arena; ``Pair.step`` compares after each operation. ``played`` lists all."""

    def __init__(self, pair: Pair, seed: str) -> None:
        self.pair = pair
        self.random = random.Random(seed)
        self.played: list[Op] = []

    def play(self, steps: int, *, push_after: int = 0) -> None:
        """Make that many choices from ``OPERATIONS``, then the final checks; raises Difference.

        ``push_after``: also put a new upper on top each time that many were made.
        """
        names = [name for name, _ in OPERATIONS]
        weights = [weight for _, weight in OPERATIONS]
        self.pair.begin()
        for number, name in enumerate(self.random.choices(names, weights, k=steps), 1):
            getattr(self, name)()
            if push_after and number % push_after == 0:
                self.push()
        self.pair.finish()

    def do(self, name: str, who: str, *args: object, mask: int = 0o022) -> None:
        """Play one operation."""
        op = Op(name, who, mask, args)
        self.played.append(op)
        self.pair.step(op)

    # -- choosing

    def pick(self, items: Sequence[_T]) -> _T:
        """One of the items."""
        return self.random.choice(items)

    def who(self) -> str:
        """An identity."""
        return self.pick(values.WHO)

    def existing(self, *kinds: int) -> bytes:
        """A name in the tree, of one of the file types if any are set."""
        paths = sorted(p for p, e in self.pair.tree.items() if p != b"." and (not kinds or e.kind in kinds))
        return self.pick(paths or [b"file"])

    def fresh(self) -> bytes:
        """A name from the pool in some directory; it may exist."""
        folder = self.pick(sorted(p for p, e in self.pair.tree.items() if e.kind == stat.S_IFDIR))
        name = self.pick(values.NAMES)
        return name if folder == b"." else folder + b"/" + name

    def path(self, *kinds: int) -> bytes:
        """Usually an existing name (of the given types), sometimes a free or an odd one."""
        way = self.random.random()
        if way < 0.85:
            return self.existing(*kinds)
        return self.fresh() if way < 0.93 else self.pick(values.ODD_PATHS)

    def place(self) -> bytes:
        """Usually a free name, sometimes an existing or an odd one."""
        way = self.random.random()
        if way < 0.8:
            return self.fresh()
        return self.existing() if way < 0.9 else self.pick(values.ODD_PATHS)

    def is_plain(self, path: bytes) -> bool:
        """Device nodes are not opened: they are the host's devices."""
        entry = self.pair.tree.get(os.path.normpath(path))
        return entry is None or entry.kind not in (stat.S_IFCHR, stat.S_IFBLK)

    def handle(self) -> tuple[str, int]:
        """An open handle, if any."""
        opened = sorted((who, number) for who, numbers in self.pair.handles.items() for number in numbers)
        return self.pick(opened or [("root", 0)])

    # -- operations by path

    def create(self) -> None:
        flags, mode = self.pick(values.CREATE_FLAGS), self.pick(values.MODES)
        content, umask = self.pick(values.CONTENTS), self.pick(values.UMASKS)
        self.do("create", self.who(), self.place(), flags, mode, content, mask=umask)

    def write(self) -> None:
        flags, offset = self.pick(values.WRITE_FLAGS), self.pick(values.OFFSETS)
        self.do("write", self.who(), self.path(stat.S_IFREG), flags, offset, self.pick(values.CONTENTS))

    def read(self) -> None:
        path = self.path(stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR)
        if self.is_plain(path):
            self.do("read", self.who(), path, self.pick(values.OFFSETS), 5000)

    def truncate(self) -> None:
        self.do("truncate", self.who(), self.path(stat.S_IFREG), self.pick([*values.SIZES, -1]))

    def chmod(self) -> None:
        self.do("chmod", self.who(), self.path(), self.pick(values.MODES))

    def chown(self) -> None:
        self.do("chown", self.who(), self.path(), *self.pick(values.IDS))

    def link(self) -> None:
        self.do("link", self.who(), self.path(stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO), self.place())

    def symlink(self) -> None:
        self.do("symlink", self.who(), self.pick(values.TARGETS), self.place())

    def rename(self) -> None:
        flags = self.pick(values.RENAME_FLAGS)
        source = self.path()
        target = self.path() if flags & 2 or self.random.random() < 0.3 else self.place()
        self.do("rename", self.who(), source, target, flags)

    def rename_over(self) -> None:
        kind = self.pick([stat.S_IFREG, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK])
        self.do("rename", self.who(), self.existing(kind), self.existing(kind), 0)

    def move_directory(self) -> None:
        """Rename a directory, to a free name, over another directory, or in exchange with anything."""
        folder = self.existing(stat.S_IFDIR)
        way = self.random.random()
        if way < 0.6:
            self.do("rename", "root", folder, self.fresh(), 0)
        elif way < 0.8:
            self.do("rename", "root", folder, self.existing(stat.S_IFDIR), 0)
        else:
            self.do("rename", "root", folder, self.existing(), 2)

    def remount(self) -> None:
        self.do("remount", "root")

    def push(self) -> None:
        self.do("push", "root")

    def swap(self) -> None:
        self.do("swap", "root")

    def unlink(self) -> None:
        kinds = [stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK]
        self.do("unlink", self.who(), self.path(*(kinds if self.random.random() < 0.9 else [stat.S_IFDIR])))

    def mkdir(self) -> None:
        self.do("mkdir", self.who(), self.place(), self.pick(values.MODES), mask=self.pick(values.UMASKS))

    def rmdir(self) -> None:
        self.do("rmdir", self.who(), self.path(*([stat.S_IFDIR] if self.random.random() < 0.9 else [])))

    def remove_all(self) -> None:
        """rm -rf of a directory by root, step by step; recreates it half of the time."""
        root = self.existing(stat.S_IFDIR)
        below = [p for p in self.pair.tree if p == root or p.startswith(root + b"/")]
        if len(below) > 12:
            return
        for path in sorted(below, key=lambda p: (p.count(b"/"), p), reverse=True):
            kind = self.pair.tree[path].kind
            self.do("rmdir" if kind == stat.S_IFDIR else "unlink", "root", path)
        if self.random.random() < 0.5:
            self.do("mkdir", "root", root, 0o777, mask=0)

    def mknod(self) -> None:
        what = self.pick(values.DEVICES)
        self.do("mknod", self.who(), self.place(), *what, mask=self.pick(values.UMASKS))

    def setxattr(self) -> None:
        name = self.pick(values.XATTRS)
        pool = values.VALUES
        if name.startswith("system."):
            pool = values.ACLS
        elif name == "security.capability":
            pool = values.CAPABILITIES
        path = self.path()
        flags = self.pick([0, 0, 0, os.XATTR_CREATE, os.XATTR_REPLACE])
        if b"hard" in path:
            flags = 0  # rule 10 of normalise
        self.do("setxattr", self.who(), path, name, self.pick(pool), flags)

    def _named_xattr(self) -> tuple[bytes, str]:
        """A path and the name of an xattr, usually an existing one."""
        having = sorted(p for p, e in self.pair.tree.items() if e.xattrs and p != b".")
        if having and self.random.random() < 0.7:
            path = self.pick(having)
            return path, self.pick(sorted(self.pair.tree[path].xattrs))
        return self.path(), self.pick(values.XATTRS)

    def getxattr(self) -> None:
        self.do("getxattr", self.who(), *self._named_xattr())

    def removexattr(self) -> None:
        self.do("removexattr", self.who(), *self._named_xattr())

    def utimens(self) -> None:
        times = self.pick(values.TIMES), self.pick(values.TIMES)
        self.do("utimens", self.who(), self.path(), *times, self.pick([True, False]))

    def look_at(self) -> None:
        name = self.pick(["listxattr", "readdir", "readlink", "stat", "lstat", "namemax"])
        kinds = {"readdir": [stat.S_IFDIR], "readlink": [stat.S_IFLNK]}.get(name, [])
        self.do(name, self.who(), self.path(*kinds))

    def access(self) -> None:
        self.do("access", self.who(), self.path(), self.pick([os.R_OK, os.W_OK, os.X_OK, os.F_OK]))

    def fsync(self) -> None:
        path = self.path(stat.S_IFREG, stat.S_IFDIR)
        if self.is_plain(path):
            self.do("fsync", "root", path)

    def drop_caches(self) -> None:
        self.do("drop_caches", "root")

    # -- operations by open file

    def open(self) -> None:
        flags, mode = self.pick(values.OPEN_FLAGS), self.pick(values.MODES)
        path = self.place() if flags & os.O_CREAT else self.path(stat.S_IFREG, stat.S_IFDIR)
        if self.is_plain(path):
            number = self.random.randrange(HANDLES)
            self.do("open", self.who(), number, path, flags, mode, mask=self.pick(values.UMASKS))

    def open_and_remove(self) -> None:
        """Remove the name of an open file, by unlink or by a rename over it."""
        path, who, number = self.existing(stat.S_IFREG), self.who(), self.random.randrange(HANDLES)
        self.do("open", who, number, path, self.pick([os.O_RDONLY, os.O_RDWR]), 0)
        if self.random.random() < 0.5:
            self.do("unlink", "root", path)
        else:
            self.do("rename", "root", self.existing(stat.S_IFREG), path, 0)
        self.do("h_stat", who, number)

    def handle_io(self) -> None:
        who, number = self.handle()
        offset, content = self.pick(values.OFFSETS), self.pick(values.CONTENTS)
        match self.random.randrange(5):
            case 0:
                self.do("h_read", who, number, offset, 5000)
            case 1:
                self.do("h_write", who, number, offset, content)
            case 2:
                self.do("h_append", who, number, content)
            case 3:
                self.do("h_truncate", who, number, self.pick(values.SIZES))
            case 4:
                self.do("h_fsync", who, number)

    def handle_meta(self) -> None:
        who, number = self.handle()
        name = self.pick(["h_stat", "h_chmod", "h_chown", "h_list", "h_setxattr", "h_xattrs"])
        if name == "h_chmod":
            self.do(name, who, number, self.pick(values.MODES))
        elif name == "h_chown":
            self.do(name, who, number, *self.pick(values.IDS))
        elif name == "h_setxattr":
            self.do(name, who, number, self.pick(values.XATTRS[:4]), self.pick(values.VALUES))
        else:
            self.do(name, who, number)

    def handle_reopen(self) -> None:
        who, number = self.handle()
        self.do("h_reopen", who, number, self.random.randrange(HANDLES), self.pick(values.REOPEN_FLAGS))

    def handle_close(self) -> None:
        self.do("h_close", *self.handle())


OPERATIONS = [
    ("create", 6), ("write", 6), ("read", 2), ("truncate", 4), ("chmod", 4), ("chown", 4), ("link", 4),
    ("symlink", 2), ("rename", 8), ("rename_over", 4), ("move_directory", 6), ("remount", 1),
    ("push", 1), ("swap", 1),
    ("unlink", 5), ("mkdir", 4), ("rmdir", 4), ("remove_all", 2), ("mknod", 3), ("setxattr", 5),
    ("getxattr", 1), ("removexattr", 3), ("utimens", 3), ("look_at", 2), ("access", 1), ("fsync", 1),
    ("drop_caches", 1), ("open", 5), ("open_and_remove", 3), ("handle_io", 6), ("handle_meta", 5),
    ("handle_reopen", 2), ("handle_close", 1),
]  # fmt: skip
"""The machine's methods that make a step, and their relative frequency."""
