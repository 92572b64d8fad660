"""Listings without an open directory in the daemon: stable positions, while names come and go."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount import direct_calls as dc
from tests.support import syscalls
from tests.support.mounting import mounted
from tests.support.patience import patient
from tests.support.world import World

MakeWorld = Callable[..., World]

LIST = """
import collections, os, sys, time
rounds, most, wrong = 0, 0, []
print("ready", flush=True)
while True:
    begun = time.monotonic()
    try:
        names = os.listdir(sys.argv[1])
    except (FileNotFoundError, NotADirectoryError):
        break
    rounds += 1
    most = max(most, len(names))
    wrong += [name for name, count in collections.Counter(names).items() if count > 1]
    # whoever removes a name waits for each piece of a listing, so that one without pauses stops him
    time.sleep((time.monotonic() - begun) * 4)
print(rounds, most, len(wrong))
"""


def _remove_while_listed(area: Path, session: str, count: int) -> None:
    for name in ("lower/big", "upper", "work"):
        (area / name).mkdir(parents=True)
    for number in range(count // 2):
        (area / f"lower/big/lower-{number:06d}").touch()
    with mounted(
        area, lowers=[area / "lower"], upper=area / "upper", work=area / "work", session=session
    ) as mount:
        big = mount.mountpoint / "big"
        big.stat()
        (area / "upper/big").mkdir(exist_ok=True)
        for number in range(count - count // 2):
            (big / f"upper-{number:06d}").touch()
        assert len(os.listdir(big)) == count
        lister = subprocess.Popen([sys.executable, "-c", LIST, str(big)], stdout=subprocess.PIPE, text=True)
        assert lister.stdout is not None
        try:
            assert lister.stdout.readline() == "ready\n"
            done = subprocess.run(
                ["rm", "-rf", str(big)], capture_output=True, text=True, timeout=patient(900)
            )
            assert (done.returncode, done.stderr) == (0, "")
            rounds, most, wrong = map(int, lister.communicate(timeout=patient(60))[0].split())
        finally:
            lister.kill()
            lister.wait()
        assert wrong == 0
        assert rounds > 0
        assert most <= count
        assert os.listdir(mount.mountpoint) == []
        big.mkdir()
        assert os.listdir(big) == []
        (big / "lower-000001").write_bytes(b"again")
        assert os.listdir(big) == ["lower-000001"]
        if session.startswith("direct"):
            # the kernel requests once and then never again
            assert mount.figure("readdirplus") > 1
            assert mount.figure("opendir") == 1
    assert len(os.listdir(area / "lower/big")) == count // 2


def test_rm_rf_of_a_big_directory(root: None, area: Path, session: str) -> None:
    """rm -rf succeeds while another process lists; no listing has a duplicate name."""
    _remove_while_listed(area, session, 3_000)


@pytest.mark.slow
@pytest.mark.watchdog(900)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [20_000, 100_000])
def test_rm_rf_of_a_huge_directory(root: None, area: Path, session: str, count: int) -> None:
    """The same with more names."""
    _remove_while_listed(area, session, count)


@pytest.mark.parametrize("size", [256, 32768], ids=["small buffer", "large buffer"])
def test_names_that_stay_come_once(world: MakeWorld, size: int) -> None:
    """Names are created, renamed, copied up and removed concurrently; names that exist all the time appear
    exactly once in each listing, with the d_ino of stat."""

    def build(root: Path) -> None:
        (root / "d").mkdir()
        for number in range(400):
            (root / f"d/stay{number}").touch()
            (root / f"d/go{number}").touch()

    made = world(build)
    top = made.union / "d"
    stop = threading.Event()
    failures: list[BaseException] = []

    def change() -> None:
        choice = random.Random(5)
        try:
            for number in range(10**9):
                if stop.is_set():
                    return
                name = f"new{number % 200}"
                (top / name).touch()
                if number % 3 == 0:
                    os.rename(top / name, top / f"renamed{choice.randrange(300)}")
                elif number % 3 == 1:
                    os.unlink(top / name)
                if number < 400:
                    os.unlink(top / f"go{number}")
                os.chmod(top / f"stay{choice.randrange(400)}", choice.choice((0o600, 0o644)))
        except BaseException as error:
            failures.append(error)

    inodes = {f"stay{number}": (top / f"stay{number}").stat().st_ino for number in range(400)}
    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(6):
            with dc.opened(top, os.O_RDONLY | os.O_DIRECTORY) as fd:
                seen: list[syscalls.Dirent] = []
                while chunk := syscalls.getdents(fd, size):
                    seen += chunk
            stayed = {entry.name.decode(): entry.ino for entry in seen if entry.name.startswith(b"stay")}
            assert stayed == inodes
            counts = Counter(entry.name for entry in seen)
            assert {name for name, count in counts.items() if count > 1 and name.startswith(b"stay")} == set()
            assert counts[b"."] == counts[b".."] == 1
    finally:
        stop.set()
        thread.join()
    assert not failures
    for name, inode in inodes.items():
        assert (top / name).stat().st_ino == inode


def test_places_are_good_across_streams(world: MakeWorld, session: str) -> None:
    """seekdir to a telldir result continues after that name: in the same stream, after changes elsewhere in
    the directory, and (where opening one costs nothing) in another stream."""

    def build(root: Path) -> None:
        (root / "d").mkdir()
        for number in range(300):
            (root / f"d/name{number:03d}").touch()

    made = world(build)
    top = made.union / "d"
    (top / "own").touch()
    stream = dc.open_stream(top)
    other = dc.open_stream(top)
    try:
        entries = dc.read_stream(stream)
        names = [name for name, _ in entries]
        assert len(names) == len(set(names)) == 303
        for index in (0, 1, 2, 5, 100, 301, 302):
            for where in (stream, other) if session.startswith("direct") else (stream,):
                dc.seek_stream(where, entries[index][1])
                assert [name for name, _ in dc.read_stream(where, 20)] == names[index + 1 : index + 21]
        # entries after a position stay after it, whatever happens to the names before
        dc.seek_stream(stream, entries[150][1])
        for name in names[:150]:
            if name.startswith(b"name"):
                os.unlink(os.path.join(os.fsencode(top), name))
        (top / "newcomer").touch()
        rest = [name for name, _ in dc.read_stream(stream) if name != b"newcomer"]
        assert rest == names[151:]
    finally:
        dc.close_stream(stream)
        dc.close_stream(other)


def test_an_open_directory_that_is_removed_and_made_again(world: MakeWorld) -> None:
    """The old one is empty and refuses new entries, the new one is different."""

    def build(root: Path) -> None:
        (root / "d").mkdir()
        (root / "d/f").touch()

    made = world(build)

    def calls(root: Path) -> list[object]:
        found: list[object] = []
        with dc.opened(root / "d", os.O_RDONLY | os.O_DIRECTORY) as fd:
            found.append(sorted(os.listdir(fd)))
            os.unlink(root / "d/f")
            os.rmdir(root / "d")
            os.lseek(fd, 0, os.SEEK_SET)
            found += [os.listdir(fd), os.fstat(fd).st_nlink]
            os.mkdir(root / "d")
            (root / "d/g").touch()
            found.append(os.listdir(fd))
            try:
                os.close(os.open("h", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd))
            except OSError as error:
                found.append(error.errno == errno.ENOENT)
            found.append(os.fstat(fd).st_ino != (root / "d").stat().st_ino)
        found.append(os.listdir(root / "d"))
        return found

    dc.natively(made, calls)


def test_cached_listings_are_dropped(world: MakeWorld) -> None:
    """Every change drops a listing cached by the kernel: create, unlink, rename in and out, link."""
    made = world(lambda root: [(root / name).mkdir() for name in ("d", "e")])

    def calls(root: Path) -> list[object]:
        d, e = root / "d", root / "e"
        found: list[object] = []

        def look() -> None:
            for _ in range(3):  # the second reading is cached
                found.append((sorted(os.listdir(d)), sorted(os.listdir(e))))

        changes: list[Callable[[], object]] = [
            lambda: (d / "a").touch(),
            lambda: (e / "b").mkdir(),
            lambda: os.rename(d / "a", e / "a"),
            lambda: os.link(e / "a", d / "a"),
            lambda: os.symlink("x", d / "s"),
            lambda: os.rename(d / "s", d / "t"),
            lambda: syscalls.renameat2(str(d / "t"), str(e / "b"), syscalls.RENAME_EXCHANGE),
            lambda: os.unlink(d / "a"),
            lambda: os.unlink(e / "b"),
        ]
        for change in changes:
            look()
            change()
        look()
        return found

    dc.natively(made, calls)
