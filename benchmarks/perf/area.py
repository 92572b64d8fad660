"""The trees that are measured on. All is in memory (/dev/shm), so that the disk is out of the picture.

The lower is made once and shared by all, through a read-only bind mount: a contestant that writes into its
lower fails instead of spoiling the turns of the others.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.perf.contestants import Layers
from benchmarks.perf.processes import CommandFailed, held, run
from tests.support import areas, syscalls

_BASE = Path("/dev/shm")
_PREFIX = "unionfs-perf-"

SMALL_FILES = 5000
TREE_DIRECTORIES = 200
TREE_FILES = 2800
REPO_FILES = 3000
#: The word that grep looks for; it is in every tenth file of the tree.
WORD = "quagga"

#: Git without anybody's settings, and without the refreshed index that it would write after looking.
GIT_ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "GIT_OPTIONAL_LOCKS": "0",
    "GIT_AUTHOR_NAME": "perf", "GIT_AUTHOR_EMAIL": "perf@localhost",
    "GIT_COMMITTER_NAME": "perf", "GIT_COMMITTER_EMAIL": "perf@localhost",
}  # fmt: skip
_LONG_AGO = 1_500_000_000


class Area:
    """One run's place. `lower` is what contestants get; parts are made when they are first asked for."""

    def __init__(self, root: Path, *, megabytes: int, entries: int) -> None:
        self.root = root
        self.lower = root / "lower"
        self.megabytes = megabytes
        self.entries = entries
        self._made = root / "made"
        self._turns = 0
        self._helper: Path | None = None
        self._makers: dict[str, Callable[[Path], None]] = {
            "big": self._big, "small": _small, "tree": _tree, "repo": _repo, "many": self._many,
        }  # fmt: skip
        for path in (self.lower, self._made):
            path.mkdir()
        syscalls.mount(str(self._made), self.lower, "none", syscalls.MS_BIND)
        flags = syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY
        syscalls.mount("none", self.lower, "none", flags)

    def need(self, part: str) -> Path:
        """A part of the lower, as the area has it (not through the read-only mount)."""
        path = self._made / part
        if not path.exists():
            unfinished = self.root / f"{part}.new"
            self._makers[part](unfinished)
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
    def layers(self) -> Iterator[Layers]:
        """An empty upper and work for one mount over the lower, gone afterwards."""
        self._turns += 1
        home = self.root / f"turn{self._turns}"
        names = ("upper", "work", "merged")
        try:
            for name in names:
                (home / name).mkdir(parents=True)
            upper, work, merged = (home / name for name in names)
            yield Layers(self.lower, upper, work, merged, home / "log")
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

    def link(self, part: str, directory: Path) -> None:
        """The same file under `directory`, for those who only read it."""
        os.link(self.need(part), directory / part)

    def _big(self, path: Path) -> None:
        block = os.urandom(1 << 20)
        with path.open("wb") as file:
            for _ in range(self.megabytes):
                file.write(block)

    def _many(self, path: Path) -> None:
        path.mkdir()
        for number in range(self.entries):
            directory = path / f"d{number // 100:05}"
            if number % 100 == 0:
                directory.mkdir()
            os.mknod(f"{directory}/file{number:07}")


def _small(path: Path) -> None:
    for number in range(SMALL_FILES):
        # small_files.c builds the same names.
        file = path / f"{number // 100:02}" / f"f{number:04}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 1023 + b"\n")


def _text(dice: random.Random, number: int) -> str:
    words = [f"word{dice.randrange(2000)}" for _ in range(dice.randrange(50, 800))]
    if number % 10 == 0:
        words[len(words) // 2] = WORD
    return "\n".join(" ".join(words[at : at + 12]) for at in range(0, len(words), 12)) + "\n"


def _files(path: Path, directories: int, files: int) -> None:
    """`files` text files of a few KiB in `directories` directories; the same every time."""
    dice = random.Random(1)
    places = [path]
    while len(places) < directories:
        parent = places[(len(places) - 1) // 6]
        places.append(parent / f"dir{len(places):03}")
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        file = places[number % directories] / f"file{number:04}.txt"
        file.write_text(_text(dice, number))
        file.chmod(0o644)
        # Git reads a file again that is as young as its index.
        os.utime(file, (_LONG_AGO, _LONG_AGO))


def _tree(path: Path) -> None:
    _files(path, TREE_DIRECTORIES, TREE_FILES)


def _repo(path: Path) -> None:
    _files(path, TREE_DIRECTORIES, REPO_FILES)
    for words in (
        ("init", "-q", "."),
        # Device and inode numbers, and the time of the last change, are others in every mount. Everybody
        # shall do the same work: ask for all attributes, and not read what has not changed.
        ("config", "core.checkStat", "minimal"),
        ("config", "core.trustctime", "false"),
        ("add", "-A"),
        ("commit", "-q", "-m", "all"),
        ("gc", "-q"),
    ):
        run(["git", *words], cwd=path, environment=GIT_ENVIRONMENT)


def sweep() -> None:
    """Remove what a killed run has left: areas that nobody holds a lock on, and the mounts in them."""
    for path in _BASE.glob(_PREFIX + "*"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            areas.remove(path)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)


def _check_memory(megabytes: int, entries: int) -> None:
    # The lower's file, a copy in an upper, the pages of both in a mount; an entry is an inode and a dentry in
    # the tmpfs and in the mount, and whatever the daemon has for it. 512 MiB: everything else.
    needed = 4 * megabytes + entries * 4 // 1024 + 512
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) // 1024
            if free < needed:
                raise CommandFailed(
                    f"{needed} MiB of memory are needed and {free} are free; "
                    "choose a smaller --size or fewer --entries"
                )
    room = os.statvfs(_BASE)
    if room.f_bavail * room.f_frsize < (2 * megabytes + 256) << 20 or 0 < room.f_favail < entries + 50_000:
        raise CommandFailed(f"{_BASE} has too little room; choose a smaller --size or fewer --entries")


@contextmanager
def new_area(*, megabytes: int, entries: int) -> Iterator[Area]:
    """A fresh area, removed at the end with everything mounted in it. Raises CommandFailed."""
    sweep()
    _check_memory(megabytes, entries)
    with held():
        root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_BASE))
        lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield Area(root, megabytes=megabytes, entries=entries)
    finally:
        with held():
            areas.remove(root)
            os.close(lock)
