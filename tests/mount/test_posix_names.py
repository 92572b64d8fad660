"""Names, paths, links and renames."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.support import syscalls
from tests.support.mounting import Mount
from tests.support.worker import Worker
from tests.support.world import World, errno_of, outcome

MakeWorld = Callable[..., World]


def _one_file(root: Path) -> None:
    (root / "file").write_bytes(b"lower")
    (root / "dir").mkdir()
    (root / "dir/inner").write_bytes(b"inner")
    (root / "link").symlink_to("file")


def test_name_lengths(world: MakeWorld) -> None:
    """255 bytes are a name, 256 are ENAMETOOLONG, in every call with a name."""
    made = world(_one_file)

    def calls(root: Path, name: bytes) -> list[object]:
        base = os.fsencode(root) + b"/"
        path = base + name
        return [
            errno_of(os.lstat, path),
            errno_of(lambda: os.close(os.open(path, os.O_CREAT | os.O_WRONLY))),
            errno_of(os.rename, path, path + b"x"),
            errno_of(os.rename, base + b"file", path),
            errno_of(os.rename, path, base + b"file"),
            errno_of(os.rename, path + b"x", base + b"file"),
            errno_of(os.unlink, path),
            errno_of(os.mkdir, path),
            errno_of(os.rmdir, path),
            errno_of(os.symlink, b"t", path),
            errno_of(os.unlink, path),
            errno_of(os.mkfifo, path),
            errno_of(os.unlink, path),
            errno_of(os.link, base + b"file", path),
            errno_of(os.unlink, path),
            errno_of(os.listxattr, path),
            sorted(os.listdir(base)),
        ]

    for length in (1, 254, 255, 256, 257, 1000):
        for byte in (b"n", b"\xc3"):
            made.as_native(lambda root, name=byte * length: calls(root, name))  # type: ignore[misc]


FLAGS = (1, 2, 3, 4, 5, 8)
TARGETS = ("file", "dir", "link", "absent", "file2")


def test_rename_flags(world: MakeWorld) -> None:
    """NOREPLACE and EXCHANGE work; WHITEOUT and combinations are EINVAL, as on overlayfs."""

    def build(root: Path) -> None:
        for flags in FLAGS:
            for target in TARGETS:
                (root / f"{flags}-{target}").mkdir()
                _one_file(root / f"{flags}-{target}")

    made = world(build)

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        for case in sorted(os.listdir(root)):
            flags, target = case.split("-")
            place = root / case
            (place / "file2").write_bytes(b"upper")
            (place / "dir2").mkdir()
            for source in ("file", "file2", "dir2", "link", "nowhere"):
                code = errno_of(syscalls.renameat2, str(place / source), str(place / target), int(flags))
                kinds = sorted(
                    (item, stat.S_IFMT(os.lstat(place / item).st_mode)) for item in os.listdir(place)
                )
                found.append((case, source, code, kinds))
        return found

    made.as_kernel(calls)


def test_refused_exchange_copies_nothing_up(world: MakeWorld) -> None:
    """A lower file keeps its hard links if the other name is missing, or a directory that cannot move."""

    def build(root: Path) -> None:
        (root / "dir").mkdir()
        (root / "file").write_bytes(b"linked")
        os.link(root / "file", root / "dir/other")

    made = world(build, options=("redirect_dir=off",))

    def calls(root: Path) -> list[object]:
        (root / "gone").touch()
        (root / "gone").unlink()
        found: list[object] = []
        for other in ("dir", "gone", "never-was"):
            for names in (("file", other), (other, "file")):
                paths = [str(root / name) for name in names]
                found.append(errno_of(syscalls.renameat2, *paths, syscalls.RENAME_EXCHANGE))
                found.append(os.lstat(root / "file").st_nlink)
        return found

    made.as_kernel(calls)
    for upper in (made.upper, made.kernel_upper):
        assert not (upper / "file").exists()


def test_whiteout_node_cannot_be_made(world: MakeWorld, user: Worker) -> None:
    """mknod of a character device 0/0 is EPERM, for root too; other devices work for root only."""
    made = world(_one_file)

    def calls(root: Path) -> list[object]:
        root.chmod(0o777)
        mode = stat.S_IFCHR | 0o600
        found: list[object] = [
            errno_of(os.mknod, root / "zero", mode, os.makedev(0, 0)),
            user.errno(os.mknod, root / "zero", mode, os.makedev(0, 0)),
            user.errno(os.mknod, root / "null", mode, os.makedev(1, 3)),
            errno_of(os.mknod, root / "null", mode, os.makedev(1, 3)),
            errno_of(os.mknod, root / "block", stat.S_IFBLK | 0o600, os.makedev(0, 0)),
            user.errno(os.mknod, root / "fifo", stat.S_IFIFO | 0o640, 0),
            user.errno(os.mknod, root / "socket", stat.S_IFSOCK | 0o640, 0),
            user.errno(os.mknod, root / "plain", stat.S_IFREG | 0o640, 0),
        ]
        for name in sorted(os.listdir(root)):
            info = os.lstat(root / name)
            found.append((name, info.st_mode, info.st_rdev, info.st_uid, info.st_gid))
        return found

    found = made.as_kernel(calls)
    assert found[:2] == [errno.EPERM, errno.EPERM]


def _chain(root: Path, depth: int) -> int:
    """A chain of directories with 200-byte names; returns the number of levels created."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    name = "d" * 200
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd))
    os.close(fd)
    return depth


def _descend(root: Path, depth: int) -> int:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        below = os.open("d" * 200, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    return fd


def test_deeper_than_path_max_in_upper(union: Mount) -> None:
    """A chain of more than 5,000 bytes is created, changed and removed."""
    root = union.mountpoint
    _chain(root, 30)
    fd = _descend(root, 30)
    try:
        with os.fdopen(os.open("leaf", os.O_RDWR, dir_fd=fd), "r+b") as file:
            file.write(b"deep")
        os.rename("leaf", "leaf2", src_dir_fd=fd, dst_dir_fd=fd)
        os.chmod("leaf2", 0o644, dir_fd=fd)
        assert os.lstat("leaf2", dir_fd=fd).st_size == 4
        assert sorted(os.listdir(fd)) == ["leaf2"]
    finally:
        os.close(fd)
    assert subprocess.run(["rm", "-rf", str(root / ("d" * 200))]).returncode == 0
    assert os.listdir(root) == []


def test_deeper_than_path_max_in_lower(world: MakeWorld) -> None:
    """The same with a chain in the lower: copy-up of a deep file and its parents, and rm -rf."""
    made = world(lambda root: _chain(root, 30))
    fd = _descend(made.union, 30)
    try:
        with os.fdopen(os.open("leaf", os.O_RDWR, dir_fd=fd), "r+b") as file:
            file.write(b"deep")
        os.setxattr(f"/proc/self/fd/{fd}/leaf", "user.x", b"1")
        os.symlink("leaf", "sym", dir_fd=fd)
        assert sorted(os.listdir(fd)) == ["leaf", "sym"]
    finally:
        os.close(fd)
    up = _descend(made.upper, 30)
    try:
        assert os.lstat("leaf", dir_fd=up).st_size == 4
    finally:
        os.close(up)
    assert subprocess.run(["rm", "-rf", str(made.union / ("d" * 200))]).returncode == 0
    assert os.listdir(made.union) == []
    os.close(_descend(made.lower, 30))


def _merged_dirs(root: Path) -> None:
    (root / "m/sub").mkdir(parents=True)
    (root / "m/file").write_bytes(b"x" * 1000)
    (root / "m/sub/f").write_bytes(b"y")
    (root / "gone").mkdir()
    os.utime(root / "m/file", ns=(10**18, 10**18))


def test_rename_of_lower_directory_is_exdev_and_mv_copies(world: MakeWorld) -> None:
    """Without redirects, a directory with lower parts cannot be renamed; mv copies, without loss."""
    made = world(_merged_dirs, options=("redirect_dir=off",))

    def calls(root: Path) -> list[object]:
        (root / "own").mkdir()
        found: list[object] = [
            errno_of(os.rename, root / "m", root / "n"),
            errno_of(os.rename, root / "m", root / "own"),
            errno_of(os.rename, root / "m/sub", root / "own/sub"),
            errno_of(os.rename, root / "own", root / "gone"),
            errno_of(os.rename, root / "gone", root / "m/own"),
        ]
        found.append(subprocess.run(["mv", str(root / "m"), str(root / "moved")]).returncode)
        found.append(sorted(str(path.relative_to(root)) for path in root.rglob("*")))
        found.append((root / "moved/file").stat().st_mtime_ns)
        found.append((root / "moved/file").read_bytes())
        return found

    made.as_kernel(calls)


def test_lower_hard_links_break(world: MakeWorld) -> None:
    """A write to one of several lower names does not change the others; a link made here stays."""

    def build(root: Path) -> None:
        (root / "a").write_bytes(b"same")
        os.link(root / "a", root / "b")
        os.link(root / "a", root / "c")

    made = world(build)

    def calls(root: Path) -> list[object]:
        (root / "a").write_bytes(b"changed")
        os.link(root / "b", root / "b2")
        (root / "b2").write_bytes(b"both")
        found: list[object] = [(name, (root / name).read_bytes()) for name in ("a", "b", "b2", "c")]
        found.append((root / "b").stat().st_nlink)
        found.append((root / "b").stat().st_ino == (root / "b2").stat().st_ino)
        found.append(len({(root / name).stat().st_ino for name in ("a", "b", "c")}))
        return found

    made.as_kernel(calls)
    assert (made.lower / "a").read_bytes() == b"same"


def test_recreate_over_whiteout(world: MakeWorld) -> None:
    """A new object in place of a removed one shows nothing of the old one."""
    made = world(_merged_dirs)

    def calls(root: Path) -> list[object]:
        subprocess.run(["rm", "-r", str(root / "m")], check=True)
        found: list[object] = [outcome(os.listdir, root)]
        (root / "m").mkdir()
        found.append(os.listdir(root / "m"))
        (root / "m/sub").symlink_to("nowhere")
        found.append(os.readlink(root / "m/sub"))
        os.unlink(root / "m/sub")
        os.mkfifo(root / "m/sub")
        os.unlink(root / "m/sub")
        (root / "m/sub").mkdir()
        found.append(os.listdir(root / "m/sub"))
        os.rmdir(root / "m/sub")
        (root / "m/sub").write_bytes(b"file")
        found.append(sorted(os.listdir(root / "m")))
        return found

    made.as_kernel(calls)


ODD_NAMES = (b"caf\xe9", b"new\nline", b" ", b"-rf", b"\xff\xfe\x01", b"a\\b", b"t\tb")


def test_odd_names(world: MakeWorld) -> None:
    """Names are bytes."""

    def build(root: Path) -> None:
        for name in ODD_NAMES:
            Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(b"lower")

    made = world(build)

    def calls(root: Path) -> list[object]:
        base = os.fsencode(root) + b"/"
        found: list[object] = [sorted(os.listdir(base))]
        for name in ODD_NAMES:
            with open(base + name, "ab") as file:
                file.write(b"+")
            os.rename(base + name, base + b"x" + name)
            os.symlink(name, base + b"s")
            with open(base + b"x" + name, "rb") as file:
                found.append(file.read())
            found += [sorted(os.listdir(base)), os.readlink(base + b"s")]
            os.unlink(base + b"x" + name)
            os.unlink(base + b"s")
        return [*found, sorted(os.listdir(base))]

    made.as_native(calls)


def test_symlink_lengths(world: MakeWorld) -> None:
    """A target of up to 4,095 bytes is stored; an empty or longer one is refused."""
    made = world()

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        for length in (0, 1, 255, 4000, 4094, 4095, 4096):
            found.append(errno_of(os.symlink, "t" * length, root / f"s{length}"))
            found.append(outcome(lambda path: len(os.readlink(path)), root / f"s{length}"))
        return found

    made.as_native(calls)
