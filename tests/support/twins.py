"""Random operations on two directories, each of which must give both the same result: a program for load.

    python -m tests.support.twins ONE OTHER SEED STOP

Both directories begin with the same content. The program ends when the file STOP exists, and prints one
line of JSON:
the number of operations, the longest of ONE in seconds, and the first differences. ONE is the tree under
test, OTHER is on a native filesystem.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import stat
import sys
import time
from collections.abc import Callable
from typing import Any

from unionfs.sys import calls

NAMES = [*"abcdefgh", "a name that is longer than a record has room for", "i" * 200]
MOST_OPEN = 8
Result = tuple[str, Any]


class Twins:
    """Two directories with open files in each."""

    def __init__(self, one: str, other: str, seed: int) -> None:
        self.roots = one, other
        self.chosen = random.Random(seed)
        self.opened: list[tuple[int, int]] = []
        self.longest = 0.0
        self.count = 0

    def path(self) -> str:
        """A relative path of one to three names."""
        return "/".join(self.chosen.choice(NAMES) for _ in range(self.chosen.choice([1, 1, 2, 2, 3])))

    def both(self, what: str, act: Callable[[int], Any]) -> str | None:
        """Carry out an operation on both sides; returns the difference."""
        began = time.monotonic()
        one = _result(act, 0)
        self.longest = max(self.longest, time.monotonic() - began)
        other = _result(act, 1)
        self.count += 1
        return None if one == other else f"{what}: {one!r} and {other!r}"

    def step(self) -> str | None:
        """One random operation; returns the difference."""
        act = self.chosen.choice(OPERATIONS)
        return act(self)

    def at(self, side: int, path: str) -> str:
        return f"{self.roots[side]}/{path}"

    # -- names ----------------------------------------------------------------------------------------

    def mkdir(self) -> str | None:
        path = self.path()
        return self.both(f"mkdir {path}", lambda side: os.mkdir(self.at(side, path), 0o755))

    def rmdir(self) -> str | None:
        path = self.path()
        return self.both(f"rmdir {path}", lambda side: os.rmdir(self.at(side, path)))

    def unlink(self) -> str | None:
        path = self.path()
        return self.both(f"unlink {path}", lambda side: os.unlink(self.at(side, path)))

    def symlink(self) -> str | None:
        path = self.path()
        return self.both(f"symlink {path}", lambda side: os.symlink("target", self.at(side, path)))

    def link(self) -> str | None:
        old, new = self.path(), self.path()
        return self.both(f"link {old} {new}", lambda side: os.link(self.at(side, old), self.at(side, new)))

    def mknod(self) -> str | None:
        path = self.path()
        return self.both(f"mknod {path}", lambda side: os.mknod(self.at(side, path), stat.S_IFIFO | 0o644))

    def rename(self) -> str | None:
        old, new = self.path(), self.path()
        flags = self.chosen.choice([0, 0, 0, calls.RENAME_NOREPLACE, calls.RENAME_EXCHANGE])

        def act(side: int) -> None:
            paths = os.fsencode(self.at(side, old)), os.fsencode(self.at(side, new))
            calls.renameat2(calls.AT_FDCWD, paths[0], calls.AT_FDCWD, paths[1], flags)

        return self.both(f"rename {flags} {old} {new}", act)

    # -- files ----------------------------------------------------------------------------------------

    def open(self) -> str | None:
        if len(self.opened) >= MOST_OPEN:
            self.close()
        path = self.path()
        flags = self.chosen.choice([
            os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_CREAT | os.O_EXCL,
            os.O_RDWR | os.O_CREAT | os.O_TRUNC,
        ])  # fmt: skip
        fds = [-1, -1]

        def act(side: int) -> None:
            fds[side] = os.open(self.at(side, path), flags | os.O_NONBLOCK, 0o644)

        difference = self.both(f"open {flags:o} {path}", act)
        if min(fds) >= 0:
            self.opened.append((fds[0], fds[1]))
        return difference

    def close(self) -> str | None:
        if not self.opened:
            return None
        for fd in self.opened.pop(self.chosen.randrange(len(self.opened))):
            os.close(fd)
        return None

    def with_file(self, what: str, act: Callable[[int], Any]) -> str | None:
        if not self.opened:
            return None
        fds = self.chosen.choice(self.opened)
        return self.both(what, lambda side: act(fds[side]))

    def write(self) -> str | None:
        data = bytes([self.chosen.randrange(256)]) * self.chosen.choice([1, 100, 5000, 300_000])
        offset = self.chosen.choice([0, 10, 4096, 100_000])
        return self.with_file(f"write {len(data)} {offset}", lambda fd: os.pwrite(fd, data, offset))

    def read(self) -> str | None:
        size, offset = self.chosen.choice([10, 5000, 400_000]), self.chosen.choice([0, 5, 4096])
        return self.with_file(f"read {size} {offset}", lambda fd: hash(os.pread(fd, size, offset)))

    def truncate(self) -> str | None:
        size = self.chosen.choice([0, 3, 5000, 50_000])
        return self.with_file(f"ftruncate {size}", lambda fd: os.ftruncate(fd, size))

    def fstat(self) -> str | None:
        return self.with_file("fstat", lambda fd: _shown(os.fstat(fd)))

    def fsync(self) -> str | None:
        return self.with_file("fsync", os.fsync)

    def lock(self) -> str | None:
        how = self.chosen.choice([fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN]) | fcntl.LOCK_NB
        return self.with_file(f"flock {how}", lambda fd: fcntl.flock(fd, how))

    # -- attributes and listings ----------------------------------------------------------------------

    def chmod(self) -> str | None:
        path, mode = self.path(), self.chosen.choice([0o644, 0o600, 0o755, 0o700])
        return self.both(f"chmod {path}", lambda side: os.chmod(self.at(side, path), mode))

    def utime(self) -> str | None:
        path, when = self.path(), self.chosen.randrange(1 << 60)
        return self.both(f"utime {path}", lambda side: os.utime(self.at(side, path), ns=(when, when)))

    def setxattr(self) -> str | None:
        path, flags = self.path(), self.chosen.choice([0, os.XATTR_CREATE, os.XATTR_REPLACE])
        value = b"%d" % self.chosen.randrange(1000)
        return self.both(
            f"setxattr {flags} {path}",
            lambda side: os.setxattr(self.at(side, path), "user.x", value, flags, follow_symlinks=False),
        )

    def removexattr(self) -> str | None:
        path = self.path()
        return self.both(
            f"removexattr {path}",
            lambda side: os.removexattr(self.at(side, path), "user.x", follow_symlinks=False),
        )

    def getxattr(self) -> str | None:
        path = self.path()
        return self.both(
            f"getxattr {path}", lambda side: os.getxattr(self.at(side, path), "user.x", follow_symlinks=False)
        )

    def stat(self) -> str | None:
        path = self.path()
        return self.both(f"stat {path}", lambda side: _shown(os.lstat(self.at(side, path))))

    def listdir(self) -> str | None:
        path = self.chosen.choice(["", self.path()])
        return self.both(f"listdir {path}", lambda side: sorted(os.listdir(self.at(side, path))))

    def read_all(self) -> str | None:
        path = self.path()

        def act(side: int) -> int:
            fd = os.open(self.at(side, path), os.O_RDONLY | os.O_NONBLOCK)
            try:
                return hash(os.read(fd, 1 << 20))
            finally:
                os.close(fd)

        return self.both(f"read all of {path}", act)


OPERATIONS: list[Callable[[Twins], str | None]] = [
    Twins.mkdir, Twins.mkdir, Twins.rmdir, Twins.unlink, Twins.unlink, Twins.symlink, Twins.link, Twins.link,
    Twins.mknod, Twins.rename, Twins.rename, Twins.rename, Twins.open, Twins.open, Twins.open, Twins.open,
    Twins.close, Twins.write, Twins.write, Twins.read, Twins.truncate, Twins.fstat, Twins.fsync, Twins.lock,
    Twins.chmod, Twins.utime, Twins.setxattr, Twins.removexattr, Twins.getxattr, Twins.stat, Twins.stat,
    Twins.listdir, Twins.listdir, Twins.read_all,
]  # fmt: skip


def _shown(st: os.stat_result) -> tuple[int, ...]:
    """What both filesystems show of an object; they count the links and bytes of directories in their
    own way."""
    if stat.S_ISDIR(st.st_mode):
        return st.st_mode, st.st_uid, st.st_gid
    return st.st_mode, st.st_uid, st.st_gid, st.st_nlink, st.st_size


def _result(act: Callable[[int], Any], side: int) -> Result:
    try:
        return "result", act(side)
    except OSError as error:
        return "error", errno.errorcode[error.errno or 0]


def main(one: str, other: str, seed: int, stop: str) -> None:
    """Operate until the file `stop` exists."""
    twins = Twins(one, other, seed)
    differences: list[str] = []
    while not os.path.exists(stop) and len(differences) < 5:
        for _ in range(20):
            difference = twins.step()
            if difference is not None:
                differences.append(f"{twins.count}: {difference}")
    print(json.dumps({"count": twins.count, "longest": twins.longest, "differences": differences}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
