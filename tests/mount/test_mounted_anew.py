"""Mounts with `-o outlive` that no other daemon can go on with: they are mounted anew when theirs dies."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.cli_calls import (
    Place,
    gone,
    listed,
    mounts_at,
    refused,
    stopped,
    succeed,
    unionfs,
    wait_for,
)
from tests.mount.outliving_calls import KERNEL, Outliving
from tests.mount.user_calls import Host
from tests.support.storage import Storage, storage
from unionfs.storage.volumes import Volumes
from unionfs.sys.process import children_of

pytestmark = [pytest.mark.watchdog(600), pytest.mark.timeout(1200)]

SESSIONS = ["pyfuse3", *(["direct"] if KERNEL < (6, 9) else [])]


@pytest.fixture(params=SESSIONS)
def by(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stored(root: None, area: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """The same storage root for all commands."""
    with storage(area) as found:
        monkeypatch.setenv("UNIONFS_ROOT", str(found.root))
        yield found


def _log() -> Path:
    """The log of root's daemons, where there is no syslog."""
    if os.path.exists("/dev/log"):
        pytest.skip("the daemons log to syslog")
    return Path("/run/unionfs/unionfs.log")


def _figures(mount: Outliving) -> dict[str, object]:
    found = json.loads(succeed(unionfs("inspect", "--json", mount.top)))["figures"]["holder"]
    assert isinstance(found, dict)
    return found


def _states(mount: Outliving) -> list[str]:
    """As `ls` shows it."""
    found = listed(unionfs("ls", "--json", "--filter", f"mountpoint={mount.top}"))
    return [str(one["state"]) for one in found]


def _opened(pid: int) -> list[str]:
    """What a process has open besides its standard files."""
    numbers = [number for number in os.listdir(f"/proc/{pid}/fd") if int(number) > 2]
    return [os.readlink(f"/proc/{pid}/fd/{number}") for number in numbers]


def _write_and_sync(fd: int) -> None:
    os.pwrite(fd, b"x", 0)
    os.fsync(fd)


def test_names_work_again(place: Place, by: str) -> None:
    """Again and again; what was written is there, and what was open is lost, at once."""
    mount = Outliving(place, "--session", by)
    shown = _figures(mount)
    assert shown["mounts_anew_because"]
    holder = mount.last.holder
    assert holder is not None
    for number in range(3):
        with open(mount.top / "new", "a") as file:
            file.write(f"{number}\n")
            file.flush()
            os.fsync(file.fileno())  # before Linux 6.9 the kernel keeps what was written for a while
            mount.kill()
            with pytest.raises(OSError, match=r"not connected|abort"):
                _write_and_sync(file.fileno())
            os.dup2(os.open("/dev/null", os.O_WRONLY), file.fileno())
        assert (mount.top / "new").read_text() == "".join(f"{count}\n" for count in range(number + 1))
        assert (mount.top / "base").read_text() == "base\n"
        assert mount.last.holder == holder
        assert _opened(holder[0]) == ["/memfd:unionfs-state (deleted)"]
        assert len(mounts_at(mount.top)) == 1
        assert _figures(mount)["daemons_died"] == number + 1
    assert "the union is mounted anew" in mount.log()
    mount.end()
    assert mounts_at(mount.top) == []
    assert os.listdir(place.work / "work") == []


def test_a_waiting_request_ends(place: Place, by: str) -> None:
    """A program that waits for a daemon that is stopped, and then killed, gets an error and does not hang."""
    mount = Outliving(place, "--session", by)
    os.kill(mount.last.pid, signal.SIGSTOP)
    with subprocess.Popen(["stat", mount.top / "other"], stderr=subprocess.PIPE, text=True) as waiting:
        assert wait_for(lambda: Path(f"/proc/{waiting.pid}/comm").read_text() == "stat\n")
        mount.kill()
        assert waiting.communicate(timeout=60)[1]
    mount.end()


def test_storage(stored: Storage, by: str) -> None:
    """It is mounted again, with the content of its volumes, also of anonymous ones."""
    kinds = ("-v", "db:/data", "-v", "/anonymous", "-v", f"{stored.host}:/host", "--tmpfs", "/t")
    mount = Outliving(stored.place, "--session", by, *kinds)
    before, volumes = stored.mounts(), stored.volumes()
    for name in ("data", "anonymous", "host"):
        (mount.top / name / "new").write_text(name)
    for _ in range(2):
        mount.kill()
        assert stored.mounts() == before
        assert stored.volumes() == volumes
        for name in ("data", "anonymous", "host"):
            assert (mount.top / name / "new").read_text() == name
        refused(unionfs("volume", "rm", "db"), "in use", str(mount.top))
    mount.end()
    assert stored.mounts() == []
    assert succeed(unionfs("volume", "rm", "db")) == "db\n"


def test_a_lower_that_is_missing(stored: Storage, by: str) -> None:
    """Mounting anew is tried again; the volumes stay in use, and anonymous ones keep their content."""
    place = stored.place
    mount = Outliving(place, "--session", by, "-v", "/anonymous")
    (name,), volumes = stored.volumes(), Volumes(str(stored.root))
    (user,) = volumes.users(name)
    (mount.top / "anonymous/new").write_text("kept")
    place.lower.rename(place.root / "away")
    before = mount.entry()
    os.kill(before.pid, signal.SIGKILL)
    assert wait_for(lambda: gone(before.pid) and not mounts_at(mount.top))
    assert wait_for(lambda: [one.text for one in volumes.users(name)] not in ([], [user.text]))
    refused(unionfs("volume", "rm", name), "in use", str(mount.top))
    assert _states(mount) == ["waiting"]
    refused(unionfs("inspect", mount.top), "is not mounted at the moment", f"unionfs umount {mount.top}")
    other = place.root / "other"
    other.mkdir()
    words = ("-l", place.root / "away", "-u", place.upper, "-w", place.work, other)
    refused(unionfs("mount", *words), "about to be mounted anew", f"unionfs umount {mount.top}")
    (place.root / "away").rename(place.lower)
    assert mount.entry().pid != before.pid
    assert wait_for(lambda: len(volumes.users(name)) == 1)
    assert (mount.top / "anonymous/new").read_text() == "kept"
    mount.last = mount.entry()
    mount.end()


@pytest.mark.parametrize("words", [(), ("--lazy",), ("--force",)], ids=str)
def test_ended_before_it_is_mounted(stored: Storage, by: str, words: tuple[str, ...]) -> None:
    """It is not mounted anew any more; its volumes and its layers are free."""
    place = stored.place
    mount = Outliving(place, "--session", by, "-v", "db:/data")
    holder = mount.processes()[1]
    place.lower.rename(place.root / "away")
    os.kill(mount.last.pid, signal.SIGKILL)
    assert wait_for(lambda: _states(mount) == ["waiting"])
    succeed(unionfs("umount", *words, mount.top))
    assert gone(holder)
    assert _states(mount) == []
    (place.root / "away").rename(place.lower)
    assert succeed(unionfs("volume", "rm", "db")) == "db\n"
    succeed(unionfs("mount", *place.layers, mount.top))
    succeed(unionfs("umount", mount.top))


def test_ended_as_it_is_mounted(stored: Storage, by: str) -> None:
    """At any moment."""
    chosen = random.Random(2)
    for _ in range(6):
        mount = Outliving(stored.place, "--session", by, "-v", "db:/data")
        processes = mount.processes()
        os.kill(mount.last.pid, signal.SIGKILL)
        time.sleep(chosen.random() * 0.6)
        assert wait_for(lambda mount=mount: unionfs("umount", mount.top).returncode == 0)
        assert all(wait_for(lambda pid=pid: gone(pid), 30) for pid in processes)
        assert _states(mount) == []
        assert stored.mounts() == []
        assert Volumes(str(stored.root)).users("db") == []


@pytest.mark.parametrize("layer", ["lower", "upper", "work"])
@pytest.mark.parametrize("how", ["directory", "symlink"])
def test_a_layer_that_was_replaced(place: Place, by: str, layer: str, how: str) -> None:
    """Another user may own the directory above it: what is there now, nobody has chosen."""
    mount = Outliving(place, "--session", by)
    path, away = place.root / layer, place.root / "away"
    with stopped(mount.processes()[1]):
        os.kill(mount.last.pid, signal.SIGKILL)
        path.rename(away)
        if how == "directory":
            path.mkdir()
            (path / "other").touch()
        else:
            (place.root / "other").mkdir()
            path.symlink_to("other")
    log = _log()
    assert wait_for(lambda: f"mounted anew: layer {path} " in log.read_text())
    assert mounts_at(mount.top) == []
    assert os.listdir(path) == (["other"] if how == "directory" else [])
    path.unlink() if how == "symlink" else shutil.rmtree(path)
    away.rename(path)
    mount.end()


def test_a_mountpoint_that_was_replaced(place: Place, by: str) -> None:
    """A symlink there is not followed."""
    mount = Outliving(place, "--session", by)
    victim = place.root / "victim"
    victim.mkdir()
    place.lower.rename(place.root / "away")
    os.kill(mount.last.pid, signal.SIGKILL)
    assert wait_for(lambda: not mounts_at(mount.top))
    mount.top.rmdir()
    mount.top.symlink_to(victim)
    (place.root / "away").rename(place.lower)
    log = _log()
    assert wait_for(lambda: f"mountpoint {mount.top} cannot be opened" in log.read_text(), 30)
    assert mounts_at(victim) == []
    mount.top.unlink()
    mount.top.mkdir()
    mount.end()


def test_a_mount_that_was_detached(stored: Storage, by: str) -> None:
    """Somebody has unmounted it, though it was in use when the daemon died: it does not come back."""
    mount = Outliving(stored.place, "--session", by, "-v", "db:/data")
    with open(mount.top / "base"):
        subprocess.run(["umount", "--lazy", mount.top], check=True)
        os.kill(mount.last.pid, signal.SIGKILL)
        assert all(wait_for(lambda pid=pid: gone(pid), 30) for pid in mount.processes())
    assert stored.mounts() == []
    assert succeed(unionfs("volume", "rm", "db")) == "db\n"


def test_unmounted_before_its_guardian_does(stored: Storage, by: str) -> None:
    mount = Outliving(stored.place, "--session", by, "-v", "db:/data")
    assert mount.last.guardian is not None
    with stopped(mount.last.guardian[0]):
        os.kill(mount.last.pid, signal.SIGKILL)
        assert wait_for(lambda: gone(mount.last.pid))
        succeed(unionfs("umount", mount.top))
    assert all(wait_for(lambda pid=pid: gone(pid), 30) for pid in mount.processes())
    assert stored.mounts() == []


def test_daemons_that_die_as_they_mount(stored: Storage, by: str) -> None:
    """At any moment; the next one mounts."""
    mount = Outliving(stored.place, "--session", by, "-v", "db:/data")
    holder, chosen = mount.processes()[1], random.Random(1)
    for _ in range(4):
        os.kill(mount.entry().pid, signal.SIGKILL)
        for _ in range(2):
            time.sleep(chosen.random() * 0.5)
            for pid in children_of(holder):
                os.kill(pid, signal.SIGKILL)
        mount.last = mount.entry()
        (mount.top / "data/new").write_text("new")
        assert mounts_at(mount.top) == ["fuse.unionfs"]
    mount.end()
    assert stored.mounts() == []


@pytest.mark.parametrize("words", [(), ("-v", "db:/data")])
def test_remounted_with_restrictions(stored: Storage, by: str, words: tuple[str, ...]) -> None:
    """They stay."""
    mount = Outliving(stored.place, "--session", by, "-o", "suid,dev,exec", *words)
    subprocess.run(["mount", "-i", "-o", "remount,bind,ro,nosuid,nodev,noexec", mount.top], check=True)
    for _ in range(2):
        mount.kill()
        with pytest.raises(OSError, match="Read-only"):
            (mount.top / "new").touch()
        flags = os.statvfs(mount.top).f_flag
        assert flags & os.ST_NOSUID
        assert flags & os.ST_NODEV
        assert flags & os.ST_NOEXEC
    mount.end()


def test_options_that_are_no_restrictions(place: Place, by: str) -> None:
    mount = Outliving(place, "--session", by, "-o", "suid,dev")
    mount.kill()
    assert not os.statvfs(mount.top).f_flag & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC)
    mount.end()


def test_storage_is_not_made_again(stored: Storage, by: str) -> None:
    """A volume that is empty by now is not filled once more, nor is a missing source of a bind mount made."""
    (stored.place.lower / "data").mkdir()
    (stored.place.lower / "data/file").touch()
    source = stored.place.root / "source"
    mount = Outliving(stored.place, "--session", by, "-v", "db:/data", "-v", f"{source}:/bound")
    (mount.top / "data/file").unlink()
    mount.kill()
    assert os.listdir(mount.top / "data") == []
    before = mount.entry()
    with stopped(mount.processes()[1]):
        os.kill(before.pid, signal.SIGKILL)
        source.rename(stored.place.root / "away")
    log = _log()
    assert wait_for(lambda: f"bind source {source} does not exist" in log.read_text(), 30)
    assert not source.exists()
    (stored.place.root / "away").rename(source)
    mount.end()


def test_a_volatile_upper(place: Place, by: str) -> None:
    """No mount takes it after a crash: the mount ends with its daemon."""
    words = (*place.layers, "-o", "outlive,volatile", "--session", by, place.merged)
    succeed(unionfs("mount", *words))
    found = json.loads(succeed(unionfs("inspect", "--json", place.merged)))["figures"]["holder"]
    assert "its upper is volatile" in found["none_because"]


def test_daemons_that_keep_dying(place: Place, by: str) -> None:
    """After too many deaths the mount stays dead, and `cleanup` removes it."""
    mount = Outliving(place, "--session", by, deaths=3)
    for _ in range(2):
        mount.kill()
    os.kill(mount.last.pid, signal.SIGKILL)
    assert all(wait_for(lambda pid=pid: gone(pid), 30) for pid in mount.processes())
    refused(unionfs("inspect", mount.top), "has died", "cleanup")
    succeed(unionfs("cleanup", mount.top))
    assert mounts_at(mount.top) == []


def test_watched_lowers(place: Place) -> None:
    mount = Outliving(place, "--watch-lower")
    for _ in range(2):
        mount.kill()
        (place.lower / "base").write_text("changed by hand\n")
        assert wait_for(lambda: (mount.top / "base").read_text() == "changed by hand\n")
        (place.lower / "base").write_text("base\n")
    assert _figures(mount)["mounts_anew_because"] == "it watches its lowers"
    mount.end()


def test_an_upper_in_memory(place: Place, by: str) -> None:
    """It would be empty: the mount ends with its daemon."""
    words = ("-l", place.lower, "-u", "tmpfs", "-o", "outlive", "--session", by, place.merged)
    succeed(unionfs("mount", *words))
    found = json.loads(succeed(unionfs("inspect", "--json", place.merged)))["figures"]["holder"]
    assert "its upper is in memory" in found["none_because"]


def test_an_upgrade_is_refused(place: Place, by: str) -> None:
    mount = Outliving(place, "--session", by)
    refused(unionfs("upgrade", mount.top), "cannot be upgraded")
    assert mount.entry().pid == mount.last.pid


@pytest.mark.parametrize("stored", [False, True])
def test_an_ordinary_user(host: Host, by: str, stored: bool) -> None:
    """Mounted by fusermount3, also anew; storage is served by the daemon."""
    data = host.place.root / "data"
    data.mkdir()
    (data / "file").write_text("data\n")
    words = ["-v", f"{data}:/v"] if stored else []
    pid = host.mount("-o", "outlive", "--session", by, *words)
    merged = host.place.merged
    succeed(host.run("sh", "-c", f"echo new > {merged}/new"))
    os.kill(pid, signal.SIGKILL)

    def others() -> list[int]:
        found = (one["pid"] for one in listed(host.unionfs("ls", "--json")))
        return [int(one) for one in found if one not in (pid, None)]

    assert wait_for(others, 30)
    assert succeed(host.run("cat", merged / "new", merged / "base")) == "new\nbase\n"
    if stored:
        assert succeed(host.run("cat", merged / "v/file")) == "data\n"
    succeed(host.unionfs("umount", merged))
    assert (host.place.upper / "new").read_text() == "new\n"
