"""Power cuts at every flush: what a disk has after one, of all that was written to it during a load.

The layers' disk is a `recorded_disk`. A disk keeps what was complete before a flush was answered, and of
later writes any, in any order. So after each flush there are two images: one with nothing else, and one with
some of the writes that follow it, chosen at random. Each must mount, and show of every file a state that it
had: not an older one than the last that was made durable, and never a mixture.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.faults.recorded_disk import Write, records
from tests.support.areas import Unavailable
from tests.support.mounting import is_mounted
from tests.support.patience import patient
from tests.support.worker import REPOSITORY

SIZES = {"ext4": 64 << 20, "xfs": 320 << 20}
_MKFS = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}
_SECTOR = 512
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class State(NamedTuple):
    """What a path showed from some moment on."""

    content: bytes | None
    """None: the path did not exist."""
    mode: int
    begun: int
    """The size of the log before the change."""


class Cut(NamedTuple):
    """A moment, and what the disk has then."""

    flushed: int
    """The size of the log at the last flush."""
    reach: int
    """The size of the log behind the last write that the disk may have."""
    image: Path


@contextmanager
def recorded(area: Path, kind: str) -> Iterator[tuple[Path, Path]]:
    """A mounted filesystem of that kind on a recorded disk, and the log; the disk without writes is
    AREA/blank. Raises Unavailable."""
    image, log, target, top = area / "image", area / "log", area / "disk", area / "disk.mounted"
    for directory in (target, top):
        directory.mkdir()
    image.touch()
    os.truncate(image, SIZES[kind])
    try:
        subprocess.run([*_MKFS[kind], str(image)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"no {kind} can be made: {error}") from None
    _copy(image, area / "blank")
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.recorded_disk", image, target, log], cwd=REPOSITORY
    )
    try:
        deadline = time.monotonic() + patient(20)
        while not is_mounted(target):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        subprocess.run(["mount", "-o", "loop", target / "disk", top], check=True)
        try:
            yield top, log
        finally:
            subprocess.run(["umount", top], check=True)
    finally:
        # The loop device lets go a moment later.
        while subprocess.run(["umount", target], capture_output=True).returncode and is_mounted(target):
            assert time.monotonic() < deadline + patient(60)
            time.sleep(0.01)
        server.wait(patient(20))


def _copy(image: Path, to: Path) -> None:
    subprocess.run(["cp", "--sparse=always", image, to], check=True)


class Load:
    """Random changes of a tree, of which most are made durable."""

    def __init__(self, top: Path, log: Path, seed: int) -> None:
        self.top = top
        self._log = log
        self._chance = random.Random(seed)
        self._number = 0
        self.history: dict[str, list[State]] = defaultdict(list)
        #: Of each path: the position in the log and the number of states, when they had become durable.
        self.durable: dict[str, list[tuple[int, int]]] = defaultdict(list)

    @staticmethod
    def lower(top: Path) -> None:
        """The tree before the changes."""
        for number in range(12):
            directory = top / f"d{number % 3}" / "deep" / "deeper"
            directory.mkdir(parents=True, exist_ok=True)
            size = 300_000 if number % 4 == 0 else 3000
            (directory / f"f{number}").write_bytes(b"%d" % number * size)

    def starts(self) -> None:
        """Take all files of the tree for durable."""
        for path in self.top.rglob("f*"):
            name = str(path.relative_to(self.top))
            self.history[name].append(State(path.read_bytes(), path.stat().st_mode & 0o7777, 0))
            self.durable[name].append((0, 1))

    def position(self) -> int:
        return self._log.stat().st_size

    # -- changes --------------------------------------------------------------------------------------

    def run(self, count: int) -> None:
        """Make so many changes."""
        kinds = [self._chmod, self._write, self._write, self._create, self._replace, self._remove, self._move]
        for _ in range(count):
            self._chance.choice(kinds)()

    def _some(self) -> str:
        return self._chance.choice([name for name, states in self.history.items() if states[-1].content])

    def _new_content(self) -> bytes:
        self._number += 1
        return b"%06d" % self._number * self._chance.choice([10, 2000, 50_000])

    def _has(self, name: str, content: bytes | None, mode: int, begun: int) -> None:
        self.history[name].append(State(content, mode, begun))

    def _sync(self, path: Path, *names: str) -> None:
        """fsync(2), mostly."""
        if self._chance.random() < 0.75:
            self._is_durable(path, *names)

    def _is_durable(self, path: Path, *names: str) -> None:
        """fsync(2) of a file or directory, which makes the last states of these names durable."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        for name in names:
            self.durable[name].append((self.position(), len(self.history[name])))

    def _chmod(self) -> None:
        name, begun = self._some(), self.position()
        mode = self._chance.choice([0o600, 0o640, 0o644, 0o755])
        (self.top / name).chmod(mode)
        self._has(name, self.history[name][-1].content, mode, begun)
        self._sync(self.top / name, name)

    def _write(self) -> None:
        """In the first sector, which a disk writes as a whole."""
        name, begun = self._some(), self.position()
        last = self.history[name][-1]
        assert last.content is not None
        self._number += 1
        data = b"%06d" % self._number * 30
        if len(last.content) < _SECTOR:
            return
        with (self.top / name).open("r+b", buffering=0) as file:
            file.write(data)
        self._has(name, data + last.content[len(data) :], last.mode, begun)
        self._sync(self.top / name, name)

    def _make(self, name: str, content: bytes) -> None:
        """A new file, durable but for its name."""
        fd = os.open(self.top / name, _NEW, 0o644)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    def _create(self) -> None:
        parent = Path(self._some()).parent
        name, begun, content = str(parent / f"new{self._number}"), self.position(), self._new_content()
        if name in self.history:
            return
        self._has(name, None, 0, 0)
        self.durable[name].append((0, 1))
        # Until the file is durable, its name may show any part of it: so it gets that name afterwards.
        self._make(name + ".tmp", content)
        (self.top / (name + ".tmp")).rename(self.top / name)
        self._has(name, content, 0o644, begun)
        self._sync(self.top / parent, name)

    def _replace(self) -> None:
        name, begun, content = self._some(), self.position(), self._new_content()
        self._make(name + ".tmp", content)
        (self.top / (name + ".tmp")).rename(self.top / name)
        self._has(name, content, 0o644, begun)
        self._sync((self.top / name).parent, name)

    def _remove(self) -> None:
        name, begun = self._some(), self.position()
        (self.top / name).unlink()
        self._has(name, None, 0, begun)
        self._sync((self.top / name).parent, name)

    def _move(self) -> None:
        """Within a directory, so that one fsync(2) makes both names durable."""
        name, begun = self._some(), self.position()
        self._is_durable(self.top / name, name)  # that of its directory will not store the data
        self._number += 1
        other, last = str(Path(name).parent / f"moved{self._number}"), self.history[name][-1]
        self._has(other, None, 0, 0)
        self.durable[other].append((0, 1))
        (self.top / name).rename(self.top / other)
        self._has(name, None, 0, begun)
        self._has(other, last.content, last.mode, begun)
        self._sync((self.top / name).parent, name, other)

    # -- after a cut ----------------------------------------------------------------------------------

    def problems(self, shown: Path, cut: Cut, flushes: list[int]) -> Iterator[str]:
        """What a tree shows that it must not, after a cut; ``flushes``: where the log has them."""
        for name, states in self.history.items():
            first = 0
            for position, count in self.durable[name]:
                # fsync(2) returned after the last flush before that position
                if max((flush for flush in flushes if flush <= position), default=0) <= cut.flushed:
                    first = max(first, count - 1)
            possible = [state for state in states[first:] if state.begun <= cut.reach]
            content, mode = _read(shown / name)
            if content not in [state.content for state in possible]:
                lengths = [None if state.content is None else len(state.content) for state in possible]
                length = None if content is None else len(content)
                yield f"{cut.flushed}: {name} has another content, of {length} bytes; expected: {lengths}"
            elif content is not None and mode not in [state.mode for state in possible]:
                yield f"{cut.flushed}: {name} has the mode {mode:o}"


def _read(path: Path) -> tuple[bytes | None, int]:
    try:
        return path.read_bytes(), path.stat().st_mode & 0o7777
    except FileNotFoundError:
        return None, 0
    except OSError as error:
        return os.strerror(error.errno or errno.EIO).encode(), 0


def flushes(log: Path) -> list[int]:
    """Where the log has flushes."""
    return [one.end for one in records(log) if not one.data]


def cuts(area: Path, log: Path, after: int, seed: int, *, every: int = 1) -> Iterator[Cut]:
    """The disk at the last flush before a position of the log, and at those behind it, each time without
    later writes and with some; ``every``: only at one flush of so many."""
    chance = random.Random(seed)
    disk, image = area / "replayed", area / "cut"
    _copy(area / "blank", disk)
    every_write = list(records(log))
    first = max(one.end for one in every_write if not one.data and one.end <= after)
    number = 0
    with disk.open("r+b", buffering=0) as file:
        for index, one in enumerate(every_write):
            if one.data:
                _put(file.fileno(), one)
                continue
            if one.end < first:
                continue
            number += 1
            if every > 1 and number % every != 1:
                continue
            _copy(disk, image)
            yield Cut(one.end, one.end, image)
            _copy(disk, image)
            reach = one.end
            with image.open("r+b", buffering=0) as torn:
                for later in every_write[index + 1 :]:
                    if not later.data:
                        break
                    reach = later.end
                    if chance.random() < 0.5:
                        _put(torn.fileno(), later)
            yield Cut(one.end, reach, image)
    disk.unlink()
    image.unlink(missing_ok=True)


def _put(fd: int, one: Write) -> None:
    os.pwrite(fd, one.data, one.offset)
