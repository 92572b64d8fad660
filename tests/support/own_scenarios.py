"""What an ordinary user does to files of his own, whatever their permission bits."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tests.support import syscalls

EXCHANGE = 2  # RENAME_EXCHANGE

Call = Callable[[], Any]
Act = Callable[[str], list[Any]]


class Scenario(NamedTuple):
    """`tree`: the mode of each path (a directory's ends in a slash); `act` gets the path of its root."""

    tree: dict[str, int]
    act: Act


def attempt(*calls: Call) -> list[Any]:
    """What each call returned, or the name of its errno."""
    results: list[Any] = []
    for call in calls:
        try:
            value = call()
        except OSError as error:
            value = errno.errorcode[error.errno or 0]
        results.append(value.decode("latin-1") if isinstance(value, bytes) else value)
    return results


# -- calls --------------------------------------------------------------------------------------------


def read(path: str) -> str:
    with open(path) as file:
        return file.read()


def write(path: str, flags: int = os.O_APPEND, mode: int = 0o644) -> None:
    """Open, write and close: with cached data that reports the errors."""
    fd = os.open(path, os.O_WRONLY | flags, mode)
    try:
        os.write(fd, b"more\n")
    finally:
        os.close(fd)


def listed(path: str | int) -> list[str]:
    return sorted(os.listdir(path))


def rm(path: str) -> int:
    return subprocess.run(["rm", "-rf", path], stderr=subprocess.DEVNULL).returncode


def chmod_all(path: str) -> int:
    return subprocess.run(["chmod", "-R", "u+rwX", path], stderr=subprocess.DEVNULL).returncode


def make(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))


def make_at(dir_fd: int, name: str) -> None:
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=dir_fd))


def exchange(one: str, other: str) -> None:
    syscalls.renameat2(one, other, EXCHANGE)


def xattr(path: str, value: bytes = b"new") -> None:
    os.setxattr(path, "user.test", value)


@contextmanager
def opened(path: str, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def run(path: str) -> int:
    """The exit code of a program."""
    return subprocess.run([path], stderr=subprocess.DEVNULL).returncode


# -- scenarios ----------------------------------------------------------------------------------------

READONLY = {
    "m/": 0o555,
    "m/s/": 0o755,
    "m/s/g": 0o644,
    "m/f": 0o644,
    "m/l": stat.S_IFLNK,
    "m/p": stat.S_IFIFO | 0o644,
}
DEEP = {"a/": 0o555, "a/b/": 0o555, "a/b/c/": 0o555, "a/b/c/f": 0o444, "a/b/c/g": 0o644}
SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str, tree: dict[str, int]) -> Callable[[Act], Act]:
    def register(act: Act) -> Act:
        SCENARIOS[name] = Scenario(tree, act)
        return act

    return register


def simple(name: str, tree: dict[str, int], *calls: Callable[[str], Any]) -> None:
    """A scenario of calls that take its root."""
    SCENARIOS[name] = Scenario(tree, lambda root: attempt(*(lambda call=call: call(root) for call in calls)))


simple(
    "chmod of a read-only directory",
    READONLY,
    lambda r: os.chmod(f"{r}/m", 0o755),
    lambda r: make(f"{r}/m/n"),
)
simple(
    "append below a read-only directory", READONLY, lambda r: write(f"{r}/m/s/g"), lambda r: write(f"{r}/m/f")
)
simple(
    "touch below a read-only directory",
    READONLY,
    lambda r: os.utime(f"{r}/m"),
    lambda r: os.utime(f"{r}/m/f"),
    lambda r: os.utime(f"{r}/m/s", (9, 9)),
)
simple(
    "create below a read-only directory",
    READONLY,
    lambda r: make(f"{r}/m/s/n"),
    lambda r: os.mkdir(f"{r}/m/s/d"),
    lambda r: make(f"{r}/m/n"),
    lambda r: os.mkdir(f"{r}/m/d"),
    lambda r: os.symlink("x", f"{r}/m/n"),
    lambda r: os.mkfifo(f"{r}/m/n"),
)
simple(
    "remove below a read-only directory",
    READONLY,
    lambda r: os.unlink(f"{r}/m/s/g"),
    lambda r: os.rmdir(f"{r}/m/s"),
    lambda r: os.unlink(f"{r}/m/f"),
)
simple(
    "chmod -R and rm -rf",
    READONLY,
    lambda r: rm(f"{r}/m"),
    lambda r: chmod_all(f"{r}/m"),
    lambda r: rm(f"{r}/m"),
)
simple(
    "rename and link below a read-only directory",
    READONLY,
    lambda r: os.rename(f"{r}/m/s/g", f"{r}/m/s/h"),
    lambda r: os.link(f"{r}/m/s/h", f"{r}/m/s/i"),
    lambda r: os.rename(f"{r}/m/f", f"{r}/m/g"),
    lambda r: os.rename(f"{r}/m/f", f"{r}/m/s/f"),
    lambda r: os.link(f"{r}/m/f", f"{r}/m/s/f"),
)
simple(
    "xattrs in a read-only directory",
    READONLY,
    lambda r: xattr(f"{r}/m/f"),
    lambda r: xattr(f"{r}/m/s"),
    lambda r: xattr(f"{r}/m"),
)
simple(
    "truncation below a read-only directory",
    READONLY,
    lambda r: os.truncate(f"{r}/m/f", 1),
    lambda r: write(f"{r}/m/s/g", os.O_TRUNC),
)
simple(
    "symlink and fifo in a read-only directory",
    READONLY,
    lambda r: os.utime(f"{r}/m/l", (9, 9), follow_symlinks=False),
    lambda r: os.chmod(f"{r}/m/p", 0o600),
)
simple(
    "read-only directories in each other",
    DEEP,
    lambda r: write(f"{r}/a/b/c/g"),
    lambda r: os.chmod(f"{r}/a/b/c/f", 0o600),
    lambda r: write(f"{r}/a/b/c/f"),
    lambda r: make(f"{r}/a/b/c/n"),
    lambda r: os.chmod(f"{r}/a/b", 0o755),
    lambda r: make(f"{r}/a/b/n"),
)
simple(
    "rm -rf of read-only directories",
    DEEP,
    lambda r: rm(f"{r}/a"),
    lambda r: chmod_all(f"{r}/a"),
    lambda r: rm(f"{r}/a"),
    lambda r: os.mkdir(f"{r}/a"),
)

for bits in (0o555, 0o000, 0o300, 0o400, 0o2555):
    simple(
        f"a directory {bits:o} over a removed one",
        {"d/": 0o755, "d/f": 0o644, "d/e/": 0o755},
        lambda r: rm(f"{r}/d"),
        lambda r, bits=bits: os.mkdir(f"{r}/d", bits),
        lambda r: stat.S_IMODE(os.stat(f"{r}/d").st_mode),
        lambda r: listed(f"{r}/d"),
    )
    simple(
        f"removing a new directory {bits:o}",
        {"keep": 0o644},
        lambda r, bits=bits: (os.mkdir(f"{r}/t"), os.chmod(f"{r}/t", bits)),
        lambda r: rm(f"{r}/t"),
    )
    simple(
        f"removing a full new directory {bits:o}",
        {"keep": 0o644},
        lambda r, bits=bits: (os.mkdir(f"{r}/t"), make(f"{r}/t/f"), os.chmod(f"{r}/t", bits)),
        lambda r: os.rmdir(f"{r}/t"),
        lambda r: rm(f"{r}/t"),
    )
    simple(f"rmdir of an empty lower directory {bits:o}", {"t/": bits}, lambda r: os.rmdir(f"{r}/t"))
    simple(
        f"rmdir of a full lower directory {bits:o}", {"t/": bits, "t/f": 0o644}, lambda r: os.rmdir(f"{r}/t")
    )
    simple(
        f"rmdir of an emptied directory {bits:o}",
        {"t/": 0o755, "t/f": 0o644, "t/g": 0o644},
        lambda r: (rm(f"{r}/t/f"), rm(f"{r}/t/g")),
        lambda r, bits=bits: os.chmod(f"{r}/t", bits),
        lambda r: os.rmdir(f"{r}/t"),
        lambda r: os.mkdir(f"{r}/t"),
    )
    simple(
        f"rename over an empty lower directory {bits:o}",
        {"t/": bits},
        lambda r: os.mkdir(f"{r}/n"),
        lambda r: os.rename(f"{r}/n", f"{r}/t"),
    )
    simple(
        f"rename over an empty new directory {bits:o}",
        {"keep": 0o644},
        lambda r, bits=bits: (os.mkdir(f"{r}/n"), os.mkdir(f"{r}/t", bits)),
        lambda r: os.rename(f"{r}/n", f"{r}/t"),
    )
    simple(
        f"rename over an emptied directory {bits:o}",
        {"t/": 0o755, "t/f": 0o644},
        lambda r: os.unlink(f"{r}/t/f"),
        lambda r, bits=bits: os.chmod(f"{r}/t", bits),
        lambda r: os.mkdir(f"{r}/n"),
        lambda r: os.rename(f"{r}/n", f"{r}/t"),
    )
    simple(
        f"rename over a full directory {bits:o}",
        {"t/": bits, "t/f": 0o644},
        lambda r: os.mkdir(f"{r}/n"),
        lambda r: os.rename(f"{r}/n", f"{r}/t"),
    )
    simple(
        f"rename of a new directory {bits:o}",
        {"o/": 0o755, "x": 0o644},
        lambda r: os.unlink(f"{r}/x"),
        lambda r, bits=bits: os.mkdir(f"{r}/n", bits),
        lambda r: os.rename(f"{r}/n", f"{r}/m"),
        lambda r: os.rename(f"{r}/m", f"{r}/x"),
        lambda r: os.rename(f"{r}/x", f"{r}/o/m"),
    )
    simple(
        f"exchange with a new directory {bits:o}",
        {"f": 0o644, "o/": 0o755, "g": 0o644},
        lambda r: os.unlink(f"{r}/g"),
        lambda r, bits=bits: (os.mkdir(f"{r}/n", bits), os.mkdir(f"{r}/g", bits)),
        lambda r: exchange(f"{r}/n", f"{r}/g"),
        lambda r: exchange(f"{r}/n", f"{r}/f"),
        lambda r: os.mkdir(f"{r}/o/d"),
        lambda r: exchange(f"{r}/g", f"{r}/o/d"),
    )
    simple(
        f"opening up a lower directory {bits:o}",
        {"t/": bits, "t/f": 0o644, "t/d/": 0o755, "t/d/g": 0o600},
        lambda r: listed(f"{r}/t"),
        lambda r: read(f"{r}/t/f"),
        lambda r: os.chmod(f"{r}/t", 0o700),
        lambda r: listed(f"{r}/t"),
        lambda r: read(f"{r}/t/f"),
        lambda r: write(f"{r}/t/d/g"),
        lambda r: os.unlink(f"{r}/t/f"),
        lambda r: listed(f"{r}/t"),
    )
    simple(
        f"rm -rf of a lower directory {bits:o}",
        {"t/": bits, "t/f": 0o644, "t/d/": bits, "t/d/g": 0o600},
        lambda r: rm(f"{r}/t"),
        lambda r: chmod_all(f"{r}/t"),
        lambda r: rm(f"{r}/t"),
    )
    simple(
        f"attributes of a lower directory {bits:o}",
        {"t/": bits, "t/f": 0o644},
        lambda r: os.utime(f"{r}/t", (9, 9)),
        lambda r: os.chown(f"{r}/t", os.getuid(), os.getgid()),
        lambda r: xattr(f"{r}/t"),
        lambda r: os.listxattr(f"{r}/t"),
    )

FILES = {"t/": 0o755}
for bits in (0o000, 0o200, 0o444, 0o111, 0o4555):
    tree = {**FILES, "t/f": bits}
    simple(
        f"chmod of a lower file {bits:o}",
        tree,
        lambda r: os.chmod(f"{r}/t/f", 0o600),
        lambda r: read(f"{r}/t/f"),
        lambda r: write(f"{r}/t/f"),
    )
    simple(f"touch of a lower file {bits:o}", tree, lambda r: os.utime(f"{r}/t/f", (9, 9)))
    simple(
        f"opens of a lower file {bits:o}",
        tree,
        lambda r: read(f"{r}/t/f"),
        lambda r: write(f"{r}/t/f"),
        lambda r: write(f"{r}/t/f", os.O_TRUNC),
        lambda r: os.truncate(f"{r}/t/f", 3),
        lambda r: os.close(os.open(f"{r}/t/f", os.O_RDWR)),
    )
    simple(f"append to a lower file {bits:o}", tree, lambda r: write(f"{r}/t/f"))
    simple(
        f"names of a lower file {bits:o}",
        tree,
        lambda r: os.rename(f"{r}/t/f", f"{r}/t/g"),
        lambda r: os.link(f"{r}/t/g", f"{r}/t/h"),
        lambda r: os.unlink(f"{r}/t/g"),
    )
    simple(
        f"xattrs of a lower file {bits:o}",
        tree,
        lambda r: xattr(f"{r}/t/f"),
        lambda r: os.getxattr(f"{r}/t/f", "user.old"),
        lambda r: os.listxattr(f"{r}/t/f"),
        lambda r: os.chmod(f"{r}/t/f", 0o600),
        lambda r: os.getxattr(f"{r}/t/f", "user.old"),
    )
    simple(
        f"a new file {bits:o}",
        FILES,
        lambda r, bits=bits: write(f"{r}/t/n", os.O_CREAT | os.O_EXCL, bits),
        lambda r: read(f"{r}/t/n"),
        lambda r: write(f"{r}/t/n"),
        lambda r: os.chmod(f"{r}/t/n", 0o600),
        lambda r: read(f"{r}/t/n"),
    )
simple(
    "programs that can only be run",
    {"true": 0o111, "all": 0o755},
    lambda r: run(f"{r}/true"),
    lambda r: (os.chmod(f"{r}/all", 0o111), run(f"{r}/all")),
)


@scenario("open files whose mode is taken away", {"r": 0o644, "w": 0o644, "rw": 0o644, "m": 0o644})
def _taken_away(root: str) -> list[Any]:
    with (
        opened(f"{root}/r", os.O_RDONLY) as r,
        opened(f"{root}/w", os.O_WRONLY) as w,
        opened(f"{root}/rw", os.O_RDWR) as rw,
        opened(f"{root}/new", os.O_RDWR | os.O_CREAT, 0o600) as new,
        opened(f"{root}/m", os.O_RDWR) as m,
    ):
        for fd in (r, w, rw, new, m):
            os.fchmod(fd, 0)
        results = attempt(
            lambda: os.read(r, 100), lambda: (os.write(w, b"W"), os.fsync(w)),
            lambda: (os.pwrite(rw, b"W", 1), os.fsync(rw), os.pread(rw, 100, 0)),
            lambda: (os.write(new, b"W"), os.fsync(new), os.pread(new, 100, 0)),
            lambda: os.ftruncate(w, 2), lambda: os.fstat(r).st_size,
        )  # fmt: skip
        with mmap.mmap(m, 2) as memory:
            memory[0:1] = b"M"
            results += attempt(memory.flush)
        return [str(result) for result in results]


@scenario("many new files of mode 444, written later", FILES)
def _many(root: str) -> list[Any]:
    numbers = range(530)  # the daemon keeps fewer open
    fds = [os.open(f"{root}/t/{number}", os.O_WRONLY | os.O_CREAT, 0o444) for number in numbers]
    results = {str(attempt(lambda fd=fd: os.write(fd, b"data"), lambda fd=fd: os.close(fd))) for fd in fds}
    return [sorted(results), sum(os.stat(f"{root}/t/{number}").st_size for number in numbers)]


@scenario(
    "open directories whose mode is taken away", {"t/": 0o755, "t/f": 0o644, "t/s/": 0o755, "t/s/g": 0o644}
)
def _directory(root: str) -> list[Any]:
    with opened(f"{root}/t", os.O_RDONLY) as t, opened(f"{root}/t/s", os.O_RDONLY) as s:
        os.fchmod(t, 0)
        results = attempt(
            lambda: listed(t), lambda: listed(s), lambda: os.stat("f", dir_fd=t).st_size,
            lambda: os.stat("g", dir_fd=s).st_size, lambda: make_at(s, "n"),
            lambda: os.unlink("g", dir_fd=s), lambda: os.mkdir("d", dir_fd=s), lambda: listed(s),
            lambda: os.fchmod(s, 0), lambda: listed(s), lambda: os.mkdir("e", dir_fd=s),
        )  # fmt: skip
        os.fchmod(t, 0o755)
        return results


@scenario(
    "an open file below a directory whose mode is taken away", {"t/": 0o755, "t/f": 0o644, "t/g": 0o644}
)
def _file_below(root: str) -> list[Any]:
    with opened(f"{root}/t/f", os.O_RDWR) as f, opened(f"{root}/t/g", os.O_RDONLY) as g:
        os.chmod(f"{root}/t", 0)
        results = attempt(
            lambda: os.read(f, 100), lambda: (os.write(f, b"W"), os.fsync(f)), lambda: os.fchmod(f, 0o600),
            lambda: os.utime(g, (9, 9)), lambda: os.read(g, 100), lambda: os.fstat(g).st_size,
            lambda: os.setxattr(f, "user.test", b"1"), lambda: os.getxattr(f, "user.test"),
        )  # fmt: skip
        os.chmod(f"{root}/t", 0o755)
        return results
