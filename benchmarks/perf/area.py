"""The place of the layers: memory (/dev/shm), which takes the disk out of the picture, or any directory.

The lower is created once and shared by all, through a read-only bind mount: a contestant that writes to its
lower fails instead of spoiling the others' turns.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.perf import parts
from benchmarks.perf.contestants import Layers
from benchmarks.perf.parts import Sizes
from benchmarks.perf.processes import CommandFailed, held, run
from tests.support import areas, syscalls

#: The default place of the layers: memory.
MEMORY = Path("/dev/shm")
_PREFIX = "unionfs-perf-"


class Area:
    """One run's place. `lower` is the contestants' lower; parts are created on first use."""

    def __init__(self, root: Path, sizes: Sizes) -> None:
        self.root = root
        self.lower = root / "lower"
        self.sizes = sizes
        self._made = root / "made"
        self._turns = 0
        self._helper: Path | None = None
        for path in (self.lower, self._made):
            path.mkdir()
        syscalls.mount(str(self._made), self.lower, "none", syscalls.MS_BIND)
        flags = syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY
        syscalls.mount("none", self.lower, "none", flags)

    def need(self, part: str) -> Path:
        """A part of the lower, not through the read-only mount."""
        path = self._made / part
        if not path.exists():
            unfinished = self.root / f"{part}.new"
            if unfinished.exists():  # what failed for one contestant may work for the next
                run(["rm", "-rf", str(unfinished)])
            parts.make(part, unfinished, self.sizes)
            unfinished.rename(path)
        return path

    def archive(self) -> Path:
        """A tar archive of the tree."""
        path = self.root / "tree.tar"
        if not path.exists():
            run(["tar", "-cf", str(path), "-C", str(self.need("tree").parent), "tree"])
        return path

    def helper(self) -> Path:
        """The compiled small_files.c. Raises CommandFailed."""
        if self._helper is None:
            program = self.root / "small_files"
            source = Path(__file__).with_name("small_files.c")
            run(["gcc", "-O2", "-Wall", "-o", str(program), str(source)])
            self._helper = program
        return self._helper

    @contextmanager
    def layers(self, *, stacked: bool = False) -> Iterator[Layers]:
        """An empty upper and work for one mount, removed afterwards. `stacked`: over the many lowers."""
        lowers: tuple[Path, ...] = (self.lower,)
        if stacked:
            self.need("lowers")
            lowers = tuple(self.lower / "lowers" / f"l{number}" for number in range(self.sizes.lowers))
        self._turns += 1
        home = self.root / f"turn{self._turns}"
        names = ("upper", "work", "merged")
        try:
            for name in names:
                (home / name).mkdir(parents=True)
            upper, work, merged = (home / name for name in names)
            yield Layers(lowers, upper, work, merged, home / "log")
        finally:
            with held():
                areas.remove(home)

    def put(self, part: str, directory: Path, name: str) -> None:
        """A copy of a part, `directory`/`name`."""
        source = self.need(part)
        if source.is_file():
            shutil.copyfile(source, directory / name)
        else:
            run(["cp", "-a", str(source), str(directory / name)])


def _areas(base: Path) -> Iterator[Path]:
    for path in base.glob(_PREFIX + "*"):
        if path.is_dir() and not path.is_symlink():
            yield path


def sweep(base: Path) -> None:
    """Remove what a killed run left: areas without a lock, and the mounts in them."""
    for path in _areas(base):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            areas.remove(path)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)


def filesystem_of(path: Path) -> str:
    """Its type from /proc/self/mountinfo."""
    device = path.stat().st_dev
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        left, right = line.split(" - ", 1)
        if left.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return right.split()[0]
    # on btrfs and others files have their own device number
    told = run(["stat", "-f", "-c", "%T", str(path)]).output.strip()
    return told or "unknown"


def check_place(base: Path) -> str | None:
    """Why no layers can be created there, in one sentence; None if they can."""
    where = f"--on {base}"
    if not base.is_dir():
        return f"{where}: " + ("not a directory" if base.exists() else "there is no such directory")
    if any(sign in str(base.resolve()) for sign in ":,\\ \t\n"):
        return f"{where}: mount options cannot carry a path with colons, commas, backslashes or blanks"
    try:
        probe = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    except OSError as error:
        return f"{where}: nothing can be made in it: {error.strerror}"
    try:
        os.setxattr(probe, "trusted.overlay.probe", b"y")
        os.mknod(probe / "whiteout", stat.S_IFCHR, os.makedev(0, 0))
    except OSError as error:
        what = "trusted.* attributes" if error.errno == errno.ENOTSUP else f"whiteouts ({error.strerror})"
        return f"{where}: its filesystem has no {what}, so it cannot hold an upper; choose another"
    finally:
        areas.remove(probe)
    return None


def _check_room(base: Path, sizes: Sizes, used: Collection[str]) -> None:
    """Raise CommandFailed if the used parts do not fit."""
    cure = "choose a smaller --size or fewer --entries"
    wanted = sum(parts.bytes_needed(part, sizes) for part in used)
    inodes = 50_000 + (sizes.entries if "many" in used else 0) + (sizes.names if "names" in used else 0)
    room = os.statvfs(base)
    # Once in the lower, once more in an upper.
    needed = 2 * wanted + (256 << 20)
    free = room.f_bavail * room.f_frsize
    if free < needed or 0 < room.f_favail < inodes:
        raise CommandFailed(
            f"{base} has too little room: {needed >> 20} MiB and {inodes:,} inodes are needed, "
            f"{free >> 20} MiB and {room.f_favail:,} are free; {cure}"
        )
    # The pages of both in a mount; an entry is an inode and a dentry in the mount, and the daemon's node.
    # 512 MiB: everything else. On a tmpfs the layers themselves are memory, too.
    memory = (2 * wanted >> 20) + 512 + (2 * wanted >> 20 if filesystem_of(base) == "tmpfs" else 0)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:") and (available := int(line.split()[1]) // 1024) < memory:
            raise CommandFailed(f"{memory} MiB of memory are needed and {available} are free; {cure}")


@contextmanager
def new_area(base: Path, sizes: Sizes, used: Collection[str]) -> Iterator[Area]:
    """A fresh area, removed at the end with everything mounted in it. Raises CommandFailed.

    `used`: the needed parts, since only those need room.
    """
    sweep(base)
    _check_room(base, sizes, used)
    with held():
        root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base.resolve()))
        lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        root.chmod(0o755)
        yield Area(root, sizes)
    finally:
        with held():
            areas.remove(root)
            os.close(lock)
