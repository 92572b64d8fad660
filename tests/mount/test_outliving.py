"""Mounts that outlive their daemons: `-o outlive`, the holder, and `unionfs upgrade`."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.mount.cli_calls import UNIONFS, Place, gone, listed, mounts_at, refused, succeed, unionfs, wait_for
from tests.mount.user_calls import Host
from tests.support.patience import patient
from unionfs.daemon import live

MODES = ["hybrid", "passthrough", "cached"]
KERNEL = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])

pytestmark = [
    pytest.mark.watchdog(600),
    pytest.mark.timeout(1200),
    pytest.mark.skipif(KERNEL < (6, 9), reason="FUSE_NOTIFY_RESEND needs Linux 6.9"),
]


class Outliving:
    """A mount with a holder."""

    def __init__(
        self, place: Place, *options: str, layers: Sequence[str | Path] = (), deaths: int = 0
    ) -> None:
        """``deaths``: how many within a minute are too many; 0: none are."""
        self.place = place
        self.top = place.merged
        environment = {"UNIONFS_DEATHS": str(deaths)}
        words = [*(layers or place.layers), "-o", "outlive", *options, place.merged]
        done = unionfs("mount", *words, env=environment)
        assert succeed(done) == ""
        self.last = self.entry()

    def entry(self) -> live.LiveMount:
        """The registry's entry of a daemon that serves it, when there is one."""
        found: list[live.LiveMount] = []

        def is_served() -> bool:
            found[:] = [
                one for one in live.live_mounts()
                if one.settings.mountpoint == str(self.top) and one.holder is not None
            ]  # fmt: skip
            return bool(found)

        assert wait_for(is_served, 60), "no daemon took over"
        return found[0]

    def kill(self) -> live.LiveMount:
        """Kill the daemon; returns the entry of the next one, which serves."""
        before = self.entry()
        os.kill(before.pid, signal.SIGKILL)
        assert wait_for(lambda: gone(before.pid))
        self.last = self.entry()
        assert self.last.pid != before.pid
        return self.last

    def log(self) -> str:
        """The last lines of the daemons' log."""
        path = json.loads(succeed(unionfs("inspect", "--json", self.top)))["log"]
        lines = Path(path).read_text().splitlines() if os.path.exists(path) else [f"the log is {path}"]
        return "\n".join(lines[-40:])

    def processes(self) -> list[int]:
        assert self.last.holder is not None
        return [self.last.pid, self.last.holder[0]]


@contextmanager
def load(place: Place, count: int, seed: int) -> Iterator[list[dict[str, object]]]:
    """Random operations on the mount, each compared with a native directory; yields a list that has their
    results at the end."""
    stop, native = place.root / "stop", place.root / "native"
    programs = [
        subprocess.Popen(
            [
                sys.executable, "-m", "tests.support.twins", str(place.merged / f"w{number}"),
                str(native / f"w{number}"), str(seed * 100 + number), str(stop),
            ],
            stdout=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip
    results: list[dict[str, object]] = []
    try:
        yield results
        stop.touch()
        for program in programs:
            results.append(json.loads(program.communicate(timeout=patient(60))[0]))
    finally:
        for program in programs:
            program.kill()
            program.communicate()
        stop.unlink(missing_ok=True)


def fill(place: Place, count: int, io: str) -> None:
    """The same files in a layer and in the native directory. With passthrough in the upper: with a
    lower's file open, a copy-up would show, as docs/compliance.md says."""
    for root in (place.upper if io == "passthrough" else place.lower, place.root / "native"):
        for number in range(count):
            deep = root / f"w{number}/a/b"
            deep.mkdir(parents=True)
            for name in "cdef":
                (deep.parents[1] / name).write_bytes(name.encode() * 3000)
                (deep.parent / name).write_bytes(b"x" * 200_000)
                (deep / name).write_bytes(b"y" * 10)


def storm(mount: Outliving, kills: int, seed: int) -> None:
    """Kill daemons at random moments, and sometimes those that are just taking over."""
    chosen = random.Random(seed)
    for _ in range(kills):
        entry = mount.entry()
        time.sleep(chosen.random() * 0.2)
        os.kill(entry.pid, signal.SIGKILL)
        assert wait_for(lambda pid=entry.pid: gone(pid))
        if chosen.random() < 0.3 and entry.holder is not None:
            time.sleep(chosen.random() * 0.4)
            for pid in children(entry.holder[0]):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    mount.last = mount.entry()


def children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def tree(root: Path) -> dict[str, object]:
    """Names, types and contents."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        what: object = path.lstat().st_mode
        if path.is_symlink():
            what = os.readlink(path)
        elif path.is_file():
            what = path.lstat().st_mode, path.lstat().st_nlink, path.read_bytes()
        found[str(path.relative_to(root))] = what
    return found


@pytest.mark.parametrize("io", MODES)
def test_programs_go_on(place: Place, io: str) -> None:
    """Open files, removed and unchanged ones, the working directory, names and attributes."""
    (place.lower / "d/e").mkdir(parents=True)
    (place.lower / "d/e/f").write_text("deep")
    (place.lower / "large").write_bytes(b"l" * 300_000)
    mount = Outliving(place, "--session", "direct", "--io", io)
    top = mount.top
    here = os.open(top / "d/e", os.O_RDONLY | os.O_DIRECTORY)
    removed = open(top / "gone", "w+")  # noqa: SIM115
    with open(top / "large", "rb") as lower, open(top / "new", "w+") as new, removed:
        lower.read(10)
        new.write("one ")
        removed.write("removed")
        removed.flush()
        os.unlink(top / "gone")
        os.link(top / "base", top / "second")
        for _ in range(2):
            mount.kill()
            assert lower.read(100_000) == b"l" * 100_000
            new.write("two ")
            new.flush()
            assert os.pread(new.fileno(), 100, 0).startswith(b"one two")
            assert os.pread(removed.fileno(), 100, 0) == b"removed"
            assert os.fstat(removed.fileno()).st_nlink == 0
            assert os.listdir(here) == ["f"]
            assert os.stat(top / "base").st_ino == os.stat(top / "second").st_ino
            with open(top / "second", "a") as linked:
                linked.write("more\n")
        assert (top / "base").read_text() == "base\nmore\nmore\n"
        os.rename(top / "d", top / "moved")
        assert os.stat("f", dir_fd=here).st_size == 4
    os.close(here)
    succeed(unionfs("umount", "--lazy", top))  # another test's mount namespace may have a copy
    assert all(wait_for(lambda pid=pid: gone(pid)) for pid in mount.processes())
    assert os.listdir(place.work / "work") == []


def test_locks_stay(place: Place) -> None:
    """flock(2) and POSIX locks are held by the kernel."""
    mount = Outliving(place)
    with open(mount.top / "base", "r+") as one, open(mount.top / "base", "r+") as other:
        fcntl.flock(one, fcntl.LOCK_EX)
        fcntl.lockf(one, fcntl.LOCK_EX)
        mount.kill()
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_upper_in_memory_stays(place: Place) -> None:
    mount = Outliving(place, layers=("-l", place.lower, "-u", "tmpfs"))
    (place.merged / "new").write_text("new")
    (place.merged / "base").write_text("changed")
    mount.kill()
    assert (place.merged / "new").read_text() == "new"
    assert (place.merged / "base").read_text() == "changed"


def test_without_an_upper(place: Place) -> None:
    mount = Outliving(place, layers=("-l", place.lower, "-l", place.lower2))
    with open(mount.top / "deep") as file:
        mount.kill()
        assert file.read() == "deep\n"
    assert (mount.top / "base").read_text() == "base\n"
    with pytest.raises(OSError, match="Read-only"):
        os.mkdir(mount.top / "new")


@pytest.mark.parametrize("words", ["-f", "-v {}:/v", "--session pyfuse3", "--watch-lower"])
def test_not_available(place: Place, words: str) -> None:
    """`inspect` says why; a killed daemon leaves a dead mount, as without the option."""
    (place.root / "data").mkdir()
    more = words.format(place.root / "data").split()
    command = [*UNIONFS, "mount", *map(str, place.layers), "-o", "outlive", *more, str(place.merged)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL):
        assert wait_for(lambda: [e for e in live.live_mounts() if e.settings.mountpoint == str(place.merged)])
        figures = json.loads(succeed(unionfs("inspect", "--json", place.merged)))["figures"]
        assert set(figures["holder"]) == {"none_because"}
        os.kill(place.pid(), signal.SIGKILL)
    if "-v" not in more:  # its guardian unmounts it
        succeed(unionfs("cleanup", place.merged))
    assert wait_for(lambda: not mounts_at(place.merged))


@pytest.mark.parametrize("io", MODES)
def test_killed_under_load(place: Place, io: str) -> None:
    """No operation fails that succeeds on a native filesystem, and none is done twice."""
    fill(place, 2, io)
    mount = Outliving(place, "--session", "direct", "--io", io)
    with load(place, 2, 1) as results:
        storm(mount, 4, 1)
    assert [one["differences"] for one in results] == [[], []]
    assert tree(mount.top / "w0") == tree(place.root / "native/w0")
    succeed(unionfs("umount", "--lazy", mount.top))


@pytest.mark.slow
@pytest.mark.parametrize("io", MODES)
def test_killed_many_times_under_load(place: Place, io: str) -> None:
    """170 times in each mode: 510 in all."""
    fill(place, 3, io)
    mount = Outliving(place, "--session", "direct", "--io", io)
    for turn in range(17):
        with load(place, 3, turn) as results:
            storm(mount, 10, turn)
        print(io, turn, [(one["count"], one["longest"]) for one in results])
        assert [one["differences"] for one in results] == [[], [], []], f"turn {turn}\n{mount.log()}"
        for number in range(3):
            assert tree(mount.top / f"w{number}") == tree(place.root / f"native/w{number}"), turn
    succeed(unionfs("umount", "--lazy", mount.top))
    assert unionfs("check", *place.layers).returncode == 0


@pytest.mark.parametrize("io", MODES)
def test_the_next_daemon_dies_after_its_first_answer(place: Place, io: str) -> None:
    """What it opened for that answer is there for the one after it."""
    for name in "abc":
        (place.upper / name).write_text(name)
    mount = Outliving(place, "--session", "direct", "--io", io)
    for name in "abc":
        with open(mount.top / name) as file:
            before = mount.entry()
            assert before.holder is not None
            holder = before.holder[0]
            os.kill(before.pid, signal.SIGKILL)
            assert wait_for(lambda holder=holder: children(holder))
            (following,) = children(holder)
            os.unlink(mount.top / name)
            os.kill(following, signal.SIGKILL)
            assert os.fstat(file.fileno()).st_nlink == 0
            assert file.read() == name


@pytest.mark.parametrize("io", MODES)
@pytest.mark.parametrize("layer", ["lower", "upper"])
def test_the_other_name_of_a_removed_one(place: Place, layer: str, io: str) -> None:
    """Daemons know one name of a file that a former one has linked; the kernel knows the others, too."""
    (place.root / layer / "a").write_text("text")
    mount = Outliving(place, "--session", "direct", "--io", io)
    top = mount.top
    os.link(top / "a", top / "b")
    mount.kill()
    os.unlink(top / "a")
    mount.kill()
    os.link(top / "b", top / "c")
    assert os.stat(top / "b").st_nlink == os.stat(top / "c").st_nlink == 2
    mount.kill()
    os.rename(top / "b", top / "a")
    assert (top / "c").samefile(top / "a")
    assert (top / "c").read_text() == "text"


def test_written_data_while_daemons_die(place: Place) -> None:
    """Large requests, which a daemon that is killed may just be reading."""
    mount = Outliving(place, "--session", "direct", "--io", "cached")
    stop, count = threading.Event(), 0
    errors: list[OSError] = []

    def write() -> None:
        nonlocal count
        fd = os.open(mount.top / "new", os.O_RDWR | os.O_CREAT)
        while not stop.is_set():
            try:
                os.pwrite(fd, bytes([count % 256]) * (4 << 20), 0)
                os.fsync(fd)
            except OSError as error:
                errors.append(error)
            count += 1
        os.close(fd)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        storm(mount, 10, 1)
    finally:
        stop.set()
        writer.join()
    assert errors == []
    assert (mount.top / "new").read_bytes() == bytes([(count - 1) % 256]) * (4 << 20)


def test_daemons_that_keep_dying(place: Place) -> None:
    """After too many deaths all requests fail with EIO, and `inspect` says why; `cleanup` ends it."""
    mount = Outliving(place, deaths=3)
    for _ in range(2):
        mount.kill()
    os.kill(mount.last.pid, signal.SIGKILL)

    def fails() -> bool:
        try:
            os.statvfs(mount.top)
        except OSError as error:
            return error.errno == errno.EIO
        return False

    assert wait_for(fails, 30)
    refused(unionfs("inspect", mount.top), "its daemons have died too often within a minute", "cleanup")
    assert succeed(unionfs("ls", "--json"))
    succeed(unionfs("cleanup", mount.top))
    assert mounts_at(mount.top) == []
    assert all(wait_for(lambda pid=pid: gone(pid)) for pid in mount.processes())
    again = Outliving(place)
    assert (again.top / "base").read_text() == "base\n"


def test_upgrade(place: Place) -> None:
    """The daemon is exchanged under an open file."""
    mount = Outliving(place)
    before = mount.entry()
    with open(mount.top / "new", "w+") as file:
        file.write("text")
        file.flush()
        said = succeed(unionfs("upgrade", mount.top))
        after = mount.entry()
        assert said == f"{mount.top}: daemon {before.pid} was replaced by {after.pid}\n"
        assert os.pread(file.fileno(), 10, 0) == b"text"
    assert json.loads(succeed(unionfs("inspect", "--json", mount.top)))["since"] is not None
    assert after.since == before.since


def test_upgrade_without_a_holder(place: Place) -> None:
    place.mount()
    refused(unionfs("upgrade", place.merged), "cannot be upgraded", "it was not asked for")


def test_unmounted_while_no_daemon_serves(place: Place) -> None:
    """The holder and its next daemon end."""
    mount = Outliving(place)
    os.kill(mount.last.pid, signal.SIGKILL)
    subprocess.run(["umount", "--lazy", mount.top], check=True)
    assert all(wait_for(lambda pid=pid: gone(pid), 30) for pid in mount.processes())
    assert wait_for(lambda: not [e for e in live.entries() if e.settings.mountpoint == str(mount.top)], 30)


def test_an_ordinary_user(host: Host) -> None:
    """Mounted by fusermount3."""
    pid = host.mount("-o", "outlive")
    merged = host.place.merged
    succeed(host.run("sh", "-c", f"echo new > {merged}/new"))
    os.kill(pid, signal.SIGKILL)
    assert succeed(host.run("cat", merged / "new", merged / "base")) == "new\nbase\n"
    succeed(host.run("mv", merged / "new", merged / "moved"))

    def others() -> list[int]:
        return [int(one["pid"]) for one in listed(host.unionfs("ls", "--json")) if one["pid"] != pid]

    assert wait_for(others, 30)
    succeed(host.unionfs("umount", merged))
    assert (host.place.upper / "moved").read_text() == "new\n"
