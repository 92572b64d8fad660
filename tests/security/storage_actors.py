"""Actions of another user in a directory that root works in, and a check of unaffected files."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.mount.cli_calls import REPOSITORY, Done
from tests.support.worker import Worker

SECONDS = 5.0
_LONGEST = 90.0
MODULE = "tests.security.storage_actors"

State = dict[str, tuple[int, int, int, bytes]]


class Outside:
    """A tree that no command may affect: its owners, modes and content stay."""

    def __init__(self, area: Path) -> None:
        self.path = area / "outside"
        for name in ("old", "new", "deep/er"):
            (self.path / name).mkdir(parents=True)
            (self.path / name / "secret").write_text("the secret of root")
            (self.path / name / "secret").chmod(0o640)
        (self.path / "journal").write_text("{}")
        self._before = self._state()

    def _state(self) -> State:
        found = {}
        for path in [self.path, *sorted(self.path.rglob("*"))]:
            status = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            found[str(path)] = (status.st_mode, status.st_uid, status.st_gid, content)
        return found

    def check(self) -> None:
        """Check that nothing has changed."""
        assert self._state() == self._before


@contextmanager
def meanwhile(function: object, *args: object) -> Iterator[None]:
    """Run a function of this module as uid 1000 until the context creates the file in its first argument."""
    stop = Path(str(args[0]))
    with Worker(1000, 1000, modules=[MODULE]) as worker:
        worker.start(function, *map(str, args))  # type: ignore[arg-type]
        try:
            yield
        finally:
            stop.touch()
            rounds = worker.finish(30)
    stop.unlink()
    assert rounds > 100, f"only {rounds} attempts"


class VolumeUser:
    """`unionfs volume` as uid 1000, with a separate home and storage root, or a skip."""

    def __init__(self, area: Path) -> None:
        self.home = area / "home"
        self.home.mkdir()
        os.chown(self.home, 1000, 1000)
        # A virtual environment may be in root's home.
        for self._python in (sys.executable, "/usr/bin/python3"):
            if self("ls").returncode == 0:
                return
        pytest.skip("no Python that an ordinary user may run")

    def __call__(self, *arguments: str | Path) -> Done:
        path = f"{REPOSITORY}:{sysconfig.get_path('purelib')}"
        home = {"HOME": str(self.home), "UNIONFS_ROOT": str(self.home / "root")}
        return subprocess.run(
            ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "--",
             self._python, "-m", "unionfs", "volume", *map(str, arguments)],
            env={**os.environ, **home, "PYTHONPATH": path},
            cwd="/", capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip


def _until(stop: str) -> Iterator[int]:
    end = time.monotonic() + _LONGEST
    rounds = 0
    while not os.path.lexists(stop) and time.monotonic() < end:
        rounds += 1
        yield rounds


def swap_hidden(stop: str, directory: str, target: str) -> int:
    """Replace each hidden name with a symlink, or the user's directory, as soon as it appears."""
    rounds = 0
    for rounds in _until(stop):
        for name in os.listdir(directory):
            if not name.startswith(".unionfs-"):
                continue
            with suppress(OSError):
                if os.lstat(f"{directory}/{name}").st_uid != 0:
                    continue
                os.rename(f"{directory}/{name}", f"{directory}/moved-{rounds}")
                if rounds % 2:
                    os.symlink(target, f"{directory}/{name}")
                else:
                    os.mkdir(f"{directory}/{name}", 0o777)
                    for inner in ("old", "new"):
                        os.symlink(f"{target}/{inner}", f"{directory}/{name}/{inner}")
        for name in os.listdir(directory):
            if name.startswith("moved-"):
                with suppress(OSError):
                    os.rmdir(f"{directory}/{name}")
    return rounds


def swap_content(stop: str, directory: str, target: str) -> int:
    """Exchange directories of the content for symlinks, move them up and down, and create new ones."""
    fd = os.open(directory, os.O_RDONLY)
    rounds = 0
    for rounds in _until(stop):
        _swap(fd, target, rounds)
    os.close(fd)
    return rounds


def swap_content_again(stop: str, directory: str, target: str) -> int:
    """The same in a directory that root moves into a volume: keeps an fd of it for some time."""
    rounds = 0
    for _ in _until(stop):
        try:
            fd = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:
            continue
        for _ in range(50):
            rounds += 1
            _swap(fd, target, rounds)
        os.close(fd)
    return rounds


def _swap(fd: int, target: str, rounds: int) -> None:
    with suppress(OSError):
        os.mkdir("a", 0o777, dir_fd=fd)
        os.mkdir("a/b", 0o777, dir_fd=fd)
        os.mkdir("a/b/c", 0o777, dir_fd=fd)
    with suppress(OSError):
        os.close(os.open(f"a/b/c/file{rounds % 7}", os.O_CREAT | os.O_WRONLY, 0o666, dir_fd=fd))
    with suppress(OSError):
        os.rename("a/b", f"x{rounds % 5}", src_dir_fd=fd, dst_dir_fd=fd)
        os.symlink(target, "a/b", dir_fd=fd)
    with suppress(OSError):
        os.rename("a", f"y{rounds % 5}", src_dir_fd=fd, dst_dir_fd=fd)
        os.symlink(target, "a", dir_fd=fd)
    for name in ("a", "a/b", f"y{rounds % 3}/b"):
        with suppress(OSError):
            os.unlink(name, dir_fd=fd)
    with suppress(OSError):
        os.rename(f"x{rounds % 3}", f"y{rounds % 5}/z", src_dir_fd=fd, dst_dir_fd=fd)


def hold_lock(stop: str, directory: str) -> int:
    """Hold flock(2) on a directory with read permission only."""
    fd = os.open(directory, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    for _ in _until(stop):
        time.sleep(0.001)
    os.close(fd)
    return 1000


def resize_file(stop: str, path: str) -> int:
    """Create a sparse file, and truncate and extend it repeatedly."""
    fd = os.open(path, os.O_RDWR)
    rounds = 0
    for rounds in _until(stop):
        os.ftruncate(fd, (rounds % 5) << 20)
        os.pwrite(fd, b"x" * 4096, (rounds % 7) << 19)
    os.close(fd)
    return rounds
