"""Listing directories, inode numbers, and the daemon's memory."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import snapshot, syscalls
from tests.support.mounting import Mount, mounted
from tests.support.patience import patient
from tests.support.syscalls import drop_caches
from tests.support.world import World, errno_of
from tests.unit.test_core_entries import entries_of

MakeWorld = Callable[..., World]


def _touch_many(folder: Path, prefix: str, count: int) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for number in range(count):
            os.close(os.open(f"{prefix}{number}", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd))
    finally:
        os.close(fd)


@pytest.mark.watchdog(240)
@pytest.mark.parametrize("many", [8_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_names(root: None, area: Path, session: str, many: int) -> None:
    """A listing is complete without duplicates, while other names come and go."""
    for name in ("lower", "lower2", "upper", "work"):
        (area / name).mkdir()
    for lower, prefix in (("lower", "a"), ("lower2", "b")):
        (area / lower / "d").mkdir()
        _touch_many(area / lower / "d", prefix, many // 2)
    lowers = [area / "lower", area / "lower2"]
    with mounted(area, lowers=lowers, upper=area / "upper", work=area / "work", session=session) as mount:
        folder = mount.mountpoint / "d"
        stop = threading.Event()
        failures: list[BaseException] = []

        def come_and_go() -> None:
            number = 0
            try:
                while not stop.is_set():
                    (folder / f"new{number}").write_bytes(b"")
                    if number >= 5:
                        (folder / f"new{number - 5}").unlink()
                    number += 1
            except OSError as error:
                failures.append(error)

        thread = threading.Thread(target=come_and_go)
        thread.start()
        listed = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            entries = syscalls.list_directory(listed)
        finally:
            os.close(listed)
            stop.set()
            thread.join()
        assert not failures
        assert max(entry.offset for entry in entries) < 1 << 31
        names = [entry.name.decode() for entry in entries if entry.name not in (b".", b"..")]
        steady = [name for name in names if not name.startswith("new")]
        assert len(steady) == many
        assert len(set(names)) == len(names)
        assert set(steady) == {f"{prefix}{number}" for prefix in "ab" for number in range(many // 2)}


def test_removing_while_listing(world: MakeWorld) -> None:
    """Every name is listed when each is removed directly after its listing (as by rm -r)."""

    def build(root: Path) -> None:
        (root / "d").mkdir()
        _touch_many(root / "d", "low", 1000)

    made = world(build)

    def calls(root: Path) -> list[object]:
        _touch_many(root / "d", "up", 1000)
        removed = 0
        with os.scandir(root / "d") as entries:
            for entry in entries:
                os.unlink(entry.path)
                removed += 1
        return [removed, os.listdir(root / "d"), errno_of(os.rmdir, root / "d")]

    made.as_native(calls)


class _Dir:
    """opendir(3) and related calls, which Python lacks."""

    def __init__(self, path: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.opendir.restype = ctypes.c_void_p
        self._libc.readdir.restype = ctypes.c_void_p
        self._libc.telldir.restype = ctypes.c_long
        self._dir = ctypes.c_void_p(self._libc.opendir(os.fsencode(path)))

    def read(self) -> bytes | None:
        entry = self._libc.readdir(self._dir)
        return ctypes.string_at(entry + 19) if entry else None

    def tell(self) -> int:
        return int(self._libc.telldir(self._dir))

    def seek(self, where: int) -> None:
        self._libc.seekdir(self._dir, ctypes.c_long(where))

    def rewind(self) -> None:
        self._libc.rewinddir(self._dir)

    def close(self) -> None:
        self._libc.closedir(self._dir)


def test_seekdir_telldir_rewinddir(world: MakeWorld) -> None:
    """A position leads back to the same name; rewinding shows new names."""

    def build(root: Path) -> None:
        (root / "d").mkdir()
        _touch_many(root / "d", "low", 600)

    made = world(build)
    _touch_many(made.union / "d", "up", 600)
    directory = _Dir(made.union / "d")
    try:
        order: list[tuple[int, bytes]] = []
        while True:
            where = directory.tell()
            name = directory.read()
            if name is None:
                break
            order.append((where, name))
        assert len(order) == 1202
        for index in (0, 1, 2, 300, 700, 1201):
            directory.seek(order[index][0])
            assert [directory.read() for _ in order[index : index + 3]] == [
                n for _, n in order[index : index + 3]
            ]
        directory.seek(order[500][0])
        rest = []
        while (name := directory.read()) is not None:
            rest.append(name)
        assert rest == [name for _, name in order[500:]]
        (made.union / "d/fresh").write_bytes(b"")
        (made.union / "d/low7").unlink()
        directory.rewind()
        again = []
        while (name := directory.read()) is not None:
            again.append(name)
        assert set(again) == ({name for _, name in order} | {b"fresh"}) - {b"low7"}
        assert len(again) == len(set(again))
    finally:
        directory.close()


def _with_equal_hashes(pairs: int) -> list[str]:
    """Names of which two each have the same hash in a listing."""
    entries = entries_of([b"same%d" % number for number in range(200_000)])
    return [entries.name(index + both).decode() for index in entries.same()[:pairs] for both in (0, 1)]


def test_positions_of_names_with_equal_hashes(world: MakeWorld) -> None:
    """In 31 bits such names are certain. Each reader sees each of them once, while others come and go."""
    equal = _with_equal_hashes(5)

    def build(root: Path) -> None:
        (root / "d").mkdir()
        for name in equal[:6]:
            (root / "d" / name).touch()

    made = world(build)
    folder = made.union / "d"
    for name in equal[6:]:
        (folder / name).touch()
    _touch_many(folder, "other", 100)
    for _ in range(2):  # the second time from the kernel's cache, where there is one
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            entries = syscalls.list_directory(fd)
            offsets = [entry.offset for entry in entries]
            assert len(set(offsets)) == len(offsets) == 112
            assert max(offsets) < 1 << 31
            for index, offset in enumerate(offsets):
                os.lseek(fd, offset, os.SEEK_SET)
                rest = [entry.name for entry in syscalls.getdents(fd, 300)]
                assert rest == [entry.name for entry in entries[index + 1 : index + 1 + len(rest)]]
        finally:
            os.close(fd)
    _read_while_others_go(folder, equal)


def _read_while_others_go(folder: Path, equal: list[str]) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        seen = []
        goes = iter(range(100))
        while chunk := syscalls.getdents(fd, 80):
            seen += [entry.name.decode() for entry in chunk]
            number = next(goes, None)
            if number is not None:
                (folder / f"other{number}").unlink()
                (folder / f"new{number}").touch()
            if seen[-1] in equal[::2]:
                (folder / seen[-1]).unlink()  # the position of a name that is gone
        assert sorted(name for name in seen if name in equal) == sorted(equal)
    finally:
        os.close(fd)


_PLAIN_READDIR = r"""
/* readdir(3) without large file support, as in glibc (sysdeps/unix/sysv/linux/getdents.c). */
typedef unsigned long long u64;
static int call(int number, int a, int b, int c)
{
    int result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory");
    return result;
}
void _start(void)
{
    static char buffer[1024];
    int names = 0, size, fd = call(5, (int)".", 0200000, 0);
    while ((size = call(220, fd, (int)buffer, sizeof buffer)) > 0)
        for (int at = 0; at < size; at += *(unsigned short *)(buffer + at + 16), names++) {
            if (*(u64 *)(buffer + at) >> 32 || *(u64 *)(buffer + at + 8) >> 31)
                call(1, 200, 0, 0);
        }
    call(1, size < 0 ? 201 : names, 0, 0);
}
"""


def test_a_program_of_32_bits(world: MakeWorld, area: Path) -> None:
    """It lists a directory whose inode numbers it can represent."""

    def build(root: Path) -> None:
        (root / "d").mkdir()
        _touch_many(root / "d", "low", 70)

    compiled = subprocess.run(
        ["gcc", "-m32", "-static", "-nostdlib", "-fno-pie", "-no-pie", "-fno-stack-protector", "-Wno-all",
         "-x", "c", "-", "-o", str(area / "list32")],
        input=_PLAIN_READDIR.encode(), capture_output=True, check=False,
    )  # fmt: skip
    if compiled.returncode:
        pytest.skip(f"gcc -m32 does not work: {compiled.stderr.decode()}")
    made = world(build)
    _touch_many(made.union / "d", "up", 70)
    assert max(entry.stat().st_ino for entry in os.scandir(made.union / "d")) < 1 << 32
    assert subprocess.run([str(area / "list32")], cwd=made.union / "d", check=False).returncode == 142


def test_small_buffers(world: MakeWorld) -> None:
    """A listing in pieces of a few records is the same, in the same order."""

    def build(root: Path) -> None:
        for length in (1, 100, 255):
            for byte in "abcdefg":
                (root / (byte * length)).write_bytes(b"")

    made = world(build)
    fd = os.open(made.union, os.O_RDONLY | os.O_DIRECTORY)
    try:
        large = syscalls.list_directory(fd)
        os.lseek(fd, 0, os.SEEK_SET)
        small: list[syscalls.Dirent] = []
        while chunk := syscalls.getdents(fd, 300):
            small += chunk
        assert small == large
    finally:
        os.close(fd)
    assert {item.name for item in large} == {os.fsencode(name) for name in os.listdir(made.native)} | {
        b".",
        b"..",
    }


def _mixed(root: Path) -> None:
    (root / "d/e").mkdir(parents=True)
    (root / "f").write_bytes(b"x")
    (root / "l").symlink_to("f")
    os.mkfifo(root / "p")
    os.mknod(root / "s", stat.S_IFSOCK | 0o600)
    os.mknod(root / "c", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(root / "b", stat.S_IFBLK | 0o600, os.makedev(7, 0))
    (root / "d/g").write_bytes(b"y")


def test_d_ino_d_type_and_st_dev(world: MakeWorld) -> None:
    """d_ino is st_ino, "." and ".." too, d_type is the type, and there is one st_dev."""
    made = world(_mixed)

    def types(root: Path) -> list[tuple[bytes, int]]:
        return sorted((path, entry.d_type) for path, entry in snapshot.take(root).items())

    made.as_native(types)
    (made.union / "own").mkdir()
    (made.union / "own/f").write_bytes(b"")
    tree = snapshot.take(made.union)
    assert all(entry.d_ino == entry.ino for path, entry in tree.items() if path != b".")
    assert {entry.dev for entry in tree.values()} == {made.union.stat().st_dev}
    assert len({entry.ino for entry in tree.values()}) == len(tree)
    for name in ("d", "d/e", "own"):
        path = made.union / name
        assert snapshot.dot_inodes(path) == {b".": path.stat().st_ino, b"..": path.parent.stat().st_ino}
    assert snapshot.dot_inodes(made.union)[b"."] == made.union.stat().st_ino


def test_st_ino_is_stable(world: MakeWorld) -> None:
    """Before and after copy-up, rename, and dropped caches; also for open files."""
    made = world(_mixed)
    (made.union / "own").write_bytes(b"")
    before = {path: entry.ino for path, entry in snapshot.take(made.union).items()}
    fd = os.open(made.union / "f", os.O_RDONLY)
    drop_caches(made.union)
    assert {path: entry.ino for path, entry in snapshot.take(made.union).items()} == before
    for path in before:
        os.utime(os.fsencode(made.union) + b"/" + path, ns=(1, 1), follow_symlinks=False)
    assert {path: entry.ino for path, entry in snapshot.take(made.union).items()} == before
    drop_caches(made.union)
    assert {path: entry.ino for path, entry in snapshot.take(made.union).items()} == before
    assert os.fstat(fd).st_ino == before[b"f"]
    os.rename(made.union / "f", made.union / "d/renamed")
    drop_caches(made.union)
    assert os.stat(made.union / "d/renamed").st_ino == before[b"f"] == os.fstat(fd).st_ino
    os.close(fd)
    drop_caches(made.union)
    assert os.stat(made.union / "d/renamed").st_ino == before[b"f"]


def test_inode_numbers_are_not_used_twice(union: Mount) -> None:
    """An open file without a name never shares its number with a new file."""
    path = union.mountpoint / "f"
    held = []
    for _ in range(50):
        path.write_bytes(b"x")
        held.append(os.open(path, os.O_RDONLY))
        path.unlink()
    numbers = [os.fstat(fd).st_ino for fd in held]
    for fd in held:
        os.close(fd)
    assert len(set(numbers)) == len(numbers)


def test_numbers_of_removed_copies_are_forgotten(world: MakeWorld) -> None:
    """A copy shows its origin's number; after its removal, the next file in its inode shows its own."""

    def build(root: Path) -> None:
        for index in range(10):
            (root / f"f{index}").write_bytes(b"data")

    made = world(build)
    for root, upper in ((made.union, made.upper), (made.kernel, made.kernel_upper)):
        freed = set()
        for index in range(10):
            os.chmod(root / f"f{index}", 0o600)
            freed.add((upper / f"f{index}").stat().st_ino)
            (root / f"f{index}").unlink()
        for index in range(30):
            (root / f"new{index}").write_bytes(b"")
        numbers = {(upper / f"new{index}").stat().st_ino for index in range(30)}
        if not numbers & freed:
            pytest.skip("this filesystem did not use an inode again")
        assert {(root / f"new{index}").stat().st_ino for index in range(30)} == numbers


@pytest.mark.watchdog(200)
def test_nodes_and_descriptors_are_given_back(root: None, area: Path, session: str) -> None:
    """find over 6,000 files opens no descriptor per file; forgetting releases nodes and directories."""
    for name in ("lower", "upper", "work"):
        (area / name).mkdir()
    for folder in range(100):
        (area / f"lower/d{folder}").mkdir()
        _touch_many(area / f"lower/d{folder}", "f", 60)
    with mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session
    ) as mount:
        top = str(mount.mountpoint)
        idle = len(os.listdir(f"/proc/{mount.pid}/fd"))
        found = subprocess.run(
            ["find", top, "-newermt", "2001-01-01"], capture_output=True, text=True, check=True
        )
        assert len(found.stdout.splitlines()) == 6_101
        assert mount.figure("nodes") > 500  # not all: the kernel may forget some at any time
        assert len(os.listdir(f"/proc/{mount.pid}/fd")) < idle + 1200
        deadline = time.monotonic() + patient(20)
        while mount.figure("nodes") > 500 and time.monotonic() < deadline:
            drop_caches(top)
            time.sleep(0.1)
        assert mount.figure("nodes") <= 500
        # none of a directory no longer known; some may be forgotten between the queries
        fds = mount.figure("directory_fds")
        assert fds <= mount.figure("nodes") + 3
        for folder in range(100):
            assert os.stat(f"{top}/d{folder}/f7").st_size == 0
            os.utime(f"{top}/d{folder}/f8")
        assert len(os.listdir(f"/proc/{mount.pid}/fd")) < idle + 1200


def test_names_change_under_two_listings(world: MakeWorld) -> None:
    """An open listing continues from its position; a new one shows the current state."""

    def build(root: Path) -> None:
        (root / "d").mkdir()
        _touch_many(root / "d", "x", 500)

    made = world(build)
    first = os.open(made.union / "d", os.O_RDONLY | os.O_DIRECTORY)
    try:
        start = syscalls.getdents(first, 1000)
        for number in range(0, 500, 2):
            (made.union / f"d/x{number}").unlink()
        _touch_many(made.union / "d", "y", 100)
        rest = []
        while chunk := syscalls.getdents(first, 1000):
            rest += chunk
        names = [item.name for item in start + rest]
        assert len(set(names)) == len(names)
        assert {b"x%d" % number for number in range(1, 500, 2)} <= set(names)
        assert len(os.listdir(made.union / "d")) == 350
    finally:
        os.close(first)


def test_a_removed_directory_that_is_open(world: MakeWorld) -> None:
    """No entries can be created in it, it lists none, and it can still be examined."""

    def build(root: Path) -> None:
        (root / "d").mkdir()

    made = world(build)

    def calls(root: Path) -> list[object]:
        (root / "own").mkdir()
        found: list[object] = []
        for name in ("d", "own"):
            fd = os.open(root / name, os.O_RDONLY | os.O_DIRECTORY)
            os.rmdir(root / name)
            found.append(errno_of(os.mkfifo, "x", dir_fd=fd))
            found.append(errno_of(os.mkdir, "y", dir_fd=fd))
            found.append(errno_of(os.listdir, fd))
            found.append(stat.S_ISDIR(os.fstat(fd).st_mode))
            found.append(os.fstat(fd).st_nlink)
            os.mkdir(root / name)
            found.append(errno_of(os.mkdir, "z", dir_fd=fd))
            found.append(os.listdir(root / name))
            os.close(fd)
        return found

    made.as_native(calls)
