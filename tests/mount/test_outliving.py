"""Mounts that outlive their daemons: `-o outlive`, the holder, and `unionfs upgrade`."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.mount.cli_calls import (
    REPOSITORY,
    UNIONFS,
    Place,
    call,
    gone,
    listed,
    mounts_at,
    refused,
    succeed,
    unionfs,
    wait_for,
)  # fmt: skip
from tests.mount.outliving_calls import MODES, RESENDS, Outliving, fill, load, storm, tree
from tests.mount.user_calls import Host
from unionfs.daemon import live
from unionfs.sys.process import children_of

pytestmark = [pytest.mark.watchdog(600), pytest.mark.timeout(1200), RESENDS]


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
    mount.end()
    assert os.listdir(place.work / "work") == []


def test_the_end_of_a_terminal(place: Place) -> None:
    """It ends no mount in the background, whichever daemon serves it."""
    mount = Outliving(place)
    pid = mount.kill().pid
    os.kill(pid, signal.SIGHUP)
    time.sleep(0.2)
    assert (mount.top / "base").read_text() == "base\n"
    assert mount.entry().pid == pid
    mount.end()


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


def test_daemons_open_as_many_files_as_the_first(place: Place) -> None:
    """Also with an index."""
    mount = Outliving(place, "-o", "index=on")
    mount.kill()
    before = len(os.listdir(f"/proc/{mount.last.pid}/fd"))
    for _ in range(3):
        mount.kill()
    assert len(os.listdir(f"/proc/{mount.last.pid}/fd")) == before


def test_without_an_upper(place: Place) -> None:
    mount = Outliving(place, layers=("-l", place.lower, "-l", place.lower2))
    with open(mount.top / "deep") as file:
        mount.kill()
        assert file.read() == "deep\n"
    assert (mount.top / "base").read_text() == "base\n"
    with pytest.raises(OSError, match="Read-only"):
        os.mkdir(mount.top / "new")


def test_not_in_the_foreground(place: Place) -> None:
    """`inspect` says so; a killed daemon leaves a dead mount, as without the option."""
    command = [*UNIONFS, "mount", *map(str, place.layers), "-o", "outlive", "-f", str(place.merged)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL):
        assert wait_for(lambda: [e for e in live.live_mounts() if e.settings.mountpoint == str(place.merged)])
        figures = json.loads(succeed(unionfs("inspect", "--json", place.merged)))["figures"]
        assert set(figures["holder"]) == {"none_because"}
        os.kill(place.pid(), signal.SIGKILL)
    succeed(unionfs("cleanup", place.merged))
    assert wait_for(lambda: not mounts_at(place.merged))


@pytest.mark.parametrize("what", ["interpreter", "package"])
def test_a_program_that_lies_on_the_union(place: Place, what: str) -> None:
    """No other daemon could be started from there, says `inspect`; but the mount serves."""
    top = Path(sys.base_prefix)
    if what == "package":
        top = place.lower
        shutil.copytree(REPOSITORY / "unionfs", top / "unionfs")
    command = " ".join(UNIONFS)
    script = (
        f"{command} mount -l {top} -l {place.lower2} -o outlive {top} && cat {top}/deep >&2 && "
        f"{command} inspect --json {top}"
    )
    around = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script)
    done = call(around, env={"PYTHONPATH": str(top if what == "package" else REPOSITORY)})
    assert (done.returncode, done.stderr) == (0, "deep\n")
    holder = json.loads(done.stdout)["figures"]["holder"]
    assert holder == {"none_because": "this program lies on the union itself"}


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
    mount.end()
    succeed(unionfs("check", *place.layers))


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("io", MODES)
def test_many_programs(place: Place, io: str, dies: bool) -> None:
    """64 programs at once, for half a minute, or UNIONFS_LOAD_SECONDS. Ten minutes need about 10 GB, so
    TMPDIR=/var/tmp."""
    fill(place, 64, io)
    mount = Outliving(place, "--session", "direct", "--io", io)
    end = time.monotonic() + float(os.environ.get("UNIONFS_LOAD_SECONDS", "30"))
    deaths = 0
    with load(place, 64, 1) as results:
        while time.monotonic() < end:
            if dies:
                storm(mount, 1, 1)
                deaths += 1
            time.sleep(2)
    print(io, deaths, "deaths", sum(int(str(one["count"])) for one in results), "operations")
    assert [one["differences"] for one in results] == [[]] * 64
    assert tree(mount.top / "w0") == tree(place.root / "native/w0")
    succeed(unionfs("umount", "--lazy", mount.top))


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
            assert wait_for(lambda holder=holder: children_of(holder))
            (following,) = children_of(holder)
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


@pytest.mark.parametrize("deaths", [3, None])
def test_daemons_that_keep_dying(place: Place, deaths: int | None) -> None:
    """After too many deaths, ten if nothing else is said, all requests fail with EIO, and `inspect` says why;
    `cleanup` ends it."""
    mount = Outliving(place, deaths=deaths)
    for _ in range((deaths or 10) - 1):
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


def test_a_mount_without_a_daemon_for_a_while(place: Place) -> None:
    """`ls` shows it, `inspect` says what it waits for, and a file there can be read afterwards."""
    mount = Outliving(place)
    with mount.without_daemon() as holder:
        (shown,) = [one for one in listed(unionfs("ls", "--json")) if one["mountpoint"] == str(mount.top)]
        assert (shown["state"], shown["pid"]) == ("waiting", holder)
        refused(unionfs("inspect", mount.top), "has no daemon at the moment", "another one is to take over")
    assert (mount.top / "base").read_text() == "base\n"
    mount.end()


def test_a_command_that_comes_between_two_daemons(place: Place) -> None:
    """It waits for the next one."""
    mount = Outliving(place)
    pid = mount.last.pid
    with mount.without_daemon() as holder:
        goes_on = threading.Timer(0.5, os.kill, (holder, signal.SIGCONT))
        goes_on.start()
        found = json.loads(succeed(unionfs("inspect", "--json", mount.top)))
        goes_on.join()
    assert found["pid"] == mount.entry().pid != pid
    mount.end()


def test_unmounted_in_a_pause_after_many_deaths(place: Place) -> None:
    """The upper can be mounted again at once."""
    mount = Outliving(place, deaths=None)
    for _ in range(7):
        mount.kill()
    pid, holder = mount.processes()
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: gone(pid))
    succeed(unionfs("umount", mount.top))
    assert mounts_at(mount.top) == []
    assert gone(holder)
    again = Outliving(place)
    assert (again.top / "base").read_text() == "base\n"
    again.end()


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


@pytest.mark.parametrize(("serving", "deaths"), [("direct", 0), ("direct", 1), ("pyfuse3", 0)])
def test_a_holder_that_is_killed(place: Place, serving: str, deaths: int) -> None:
    """The mount serves on, `inspect` and the log say that it no longer outlives its daemon, and an upgrade
    is refused."""
    mount = Outliving(place, "--session", serving)
    for _ in range(deaths):
        mount.kill()
    pid, holder = mount.processes()
    os.kill(holder, signal.SIGKILL)

    def said() -> object:
        answer = json.loads(succeed(unionfs("inspect", "--json", mount.top)))
        return answer["figures"]["holder"].get("none_because")

    assert wait_for(said)
    assert said() == "its holder was killed"
    assert "will not outlive its daemon: its holder was killed" in mount.log()
    refused(unionfs("upgrade", mount.top), "cannot be upgraded", "its holder was killed")
    (mount.top / "base").write_text("changed\n")
    assert place.pid() == pid
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: gone(pid))
    (shown,) = [one for one in listed(unionfs("ls", "--json")) if one["mountpoint"] == str(mount.top)]
    assert shown["state"] == "dead"
    again = Outliving(place)
    assert (again.top / "base").read_text() == "changed\n"
    again.end()


def test_unmounted_while_no_daemon_serves(place: Place) -> None:
    """The holder and its next daemon end."""
    mount = Outliving(place)
    os.kill(mount.last.pid, signal.SIGKILL)
    subprocess.run(["umount", "--lazy", mount.top], check=True)
    assert all(wait_for(lambda pid=pid: gone(pid), 30) for pid in mount.processes())
    assert wait_for(lambda: not [e for e in live.entries() if e.settings.mountpoint == str(mount.top)], 30)


@pytest.mark.parametrize("deaths", [0, 1])
def test_the_upper_stays_locked(place: Place, deaths: int) -> None:
    """Another mount cannot have it, also while there is no daemon, and after the one that took the lock."""
    mount = Outliving(place)
    for _ in range(deaths):
        mount.kill()
    pid = mount.last.pid
    other = place.root / "other"
    other.mkdir()
    with mount.without_daemon():
        refused(unionfs("mount", *place.layers, other), "already in use by another mount")
    assert mount.entry().pid != pid
    mount.end()


def test_a_file_that_its_owner_must_not_read(host: Host) -> None:
    """Its inode number stays the same, also after the next mount, and open files go on."""
    pid = host.mount("-o", "outlive")
    path = host.place.merged / "base"
    succeed(host.run("chmod", "0200", path))
    number = succeed(host.run("stat", "-c", "%i", path))
    script = f"exec 7>>{path}; kill -9 {pid}; echo more >&7 && sync -d /dev/fd/7 && stat -L -c %i /dev/fd/7"
    assert succeed(host.run("sh", "-c", script)) == number
    assert (host.place.upper / "base").read_text() == "base\nmore\n"
    succeed(host.unionfs("umount", host.place.merged))
    host.mount()
    assert succeed(host.run("stat", "-c", "%i", path)) == number


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
