"""Root's commands on mounts and directories in the directory of another user, who redirects them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mount.cli_calls import Place, refused, succeed, unionfs, wait_for
from tests.security import attacks
from tests.support import areas
from tests.support.worker import Worker
from unionfs.daemon import live, others
from unionfs.sys import unmount
from unionfs.sys.mountinfo import mounted_at

SECONDS = 6.0


@pytest.fixture
def theirs(place: Place, attacker: Worker) -> Iterator[Path]:
    """A directory of the attacker with two others, `p` and `q`, each with `mnt/data`."""
    top = place.root / "theirs"
    for name in ("p", "q"):
        (top / name / "mnt/data").mkdir(parents=True)
    for path in (top, *top.rglob("*")):
        os.chown(path, attacker.uid, attacker.uid)
    (place.lower / "data").mkdir()
    yield top
    attacker.call(attacks.stop)
    areas.detach(top)


def test_doctor(place: Place, attacker: Worker, theirs: Path) -> None:
    """It creates files, and removes them, in a directory that the attacker may rename."""
    victim = place.root / "victim"
    victim.write_text("precious\n")
    victim.chmod(0o600)
    attacker.call(attacks.replace_new, str(theirs), "unionfs-doctor-", str(victim))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert "Traceback" not in unionfs("doctor", "--dir", theirs).stderr
    assert victim.read_text() == "precious\n"


def test_no_helper_that_works_by_path(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As root, fusermount3 would unmount the current target of the path."""
    called = tmp_path / "called"
    helper = tmp_path / "fusermount3"
    helper.write_text(f"#!/bin/sh\ntouch {called}\n")
    helper.chmod(0o755)
    place.mount()
    mount = mounted_at(str(place.merged))
    assert mount is not None

    def refuse(*_: object) -> None:
        raise PermissionError(13, "not searchable")

    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        patch.setattr(unmount, "unmount_id", refuse)
        with pytest.raises(PermissionError):
            unmount.unmount(mount)
    assert not called.exists()
    unmount.unmount(mount)


def test_storage_that_is_put_back(place: Place, attacker: Worker, theirs: Path) -> None:
    """The union is busy, so its storage is mounted again: in the union, wherever that is now."""
    mountpoint = theirs / "p/mnt"
    done = unionfs("mount", *place.layers, "-v", f"{place.lower2}:/data", mountpoint)
    assert done.returncode == 0, done.stderr
    mount = mounted_at(str(mountpoint))
    assert mount is not None
    with subprocess.Popen(["sleep", "60"], cwd=mountpoint) as busy:
        attacker.call(attacks.swap, str(theirs / "p"), str(theirs / "q"))
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            unionfs("umount", mountpoint)
            for entry in all_below(theirs):
                assert entry.device == mount.device or entry.parent_id == mount.mount_id
        attacker.call(attacks.stop)
        busy.kill()


def all_below(path: Path) -> list[unmount.MountEntry]:
    from unionfs.sys.mountinfo import read_mountinfo

    return [entry for entry in read_mountinfo() if entry.mountpoint.startswith(f"{path}/")]


def test_storage_of_a_new_mount(place: Place, attacker: Worker, theirs: Path) -> None:
    """The mountpoint's directory is exchanged during the mount: storage follows the union, or is refused."""
    other = place.root / "other"
    for name in ("l", "u", "w"):
        (other / name).mkdir(parents=True)
    (other / "l/data").mkdir()
    first = unionfs("mount", "-l", other / "l", "-u", other / "u", "-w", other / "w", theirs / "q/mnt")
    assert first.returncode == 0, first.stderr
    foreign = mounted_at(str(theirs / "q/mnt"))
    assert foreign is not None
    attacker.call(attacks.swap, str(theirs / "p"), str(theirs / "q"), 0.02)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done = unionfs("mount", *place.layers, "-v", f"{place.lower2}:/data", theirs / "p/mnt")
        for entry in all_below(theirs):
            assert entry.is_fuse or entry.parent_id != foreign.mount_id, done.stderr
        end_daemons_of(place)
    # the number of successes is random; without the attack the same command succeeds
    attacker.call(attacks.stop)
    calm = theirs / "r"
    calm.mkdir()
    done = unionfs("mount", *place.layers, "-v", f"{place.lower2}:/data", calm)
    assert done.returncode == 0, done.stderr
    end_daemons_of(place)


def end_daemons_of(place: Place) -> None:
    for entry in live.live_mounts():
        if entry.settings.upper == str(place.upper):
            with suppress(ProcessLookupError):
                os.kill(entry.pid, 15)
            assert wait_for(lambda entry=entry: not entry.is_alive())


def test_an_answer_for_another_users_mount(place: Place, attacker: Worker) -> None:
    """A new mount namespace has copies of all mounts, which still belong to their owners."""
    place.mount()
    mount = mounted_at(str(place.merged))
    assert mount is not None
    daemon = others._Daemon(attacker.pid, attacker.call(attacks.started), attacker.uid)
    settings = json.loads(json.dumps(place.entry().settings.to_json()))
    answer = {"device": mount.device, "since": 0, "settings": settings}
    assert others._confirmed(daemon, answer, [replace(mount, super_options="rw,user_id=1002")]) is None
    assert others._confirmed(daemon, answer, [mount]) is None
    found = others._confirmed(daemon, answer, [replace(mount, super_options=f"rw,user_id={attacker.uid}")])
    assert found is not None
    assert found.settings.mountpoint == str(place.merged)
    unmount.unmount(mount)


def test_a_lock_whose_holder_has_ended(place: Place, attacker: Worker) -> None:
    """The file stays open, and locked, in the process that started it."""
    flock = shutil.which("flock")
    if flock is None:
        pytest.skip("flock is not installed")
    with subprocess.Popen(
        ["setpriv", "--reuid", str(attacker.uid), "--regid", str(attacker.uid), "--clear-groups", "sh", "-c",
         f"exec 9< {place.upper}; flock -x 9; exec sleep 60"],
    ) as holder:  # fmt: skip
        time.sleep(0.5)
        place.mount()
        holder.kill()
    assert unionfs("umount", place.merged).returncode == 0


class TestSymlinksOfOthers:
    """Root follows another user's symlink only to objects of that user."""

    @pytest.fixture
    def home(self, place: Place, attacker: Worker) -> Path:
        """The attacker's directory, with symlinks to a directory in it, and to one of root's."""
        home = place.root / "home"
        (home / "own").mkdir(parents=True)
        private = place.root / "private"
        private.mkdir(mode=0o700)
        (private / "secret").write_text("precious")
        (home / "good").symlink_to(home / "own")
        (home / "evil").symlink_to(private)
        (home / "file").symlink_to(private / "secret")
        for path in (home, *home.iterdir()):
            os.lchown(path, attacker.uid, attacker.uid)
        return home

    def test_a_bind(self, place: Place, home: Path) -> None:
        mount = ("mount", *place.layers)
        refused(unionfs(*mount, "-v", f"{home}/evil:/data", place.merged), "symlink of uid 1001")
        refused(unionfs(*mount, "-v", f"{home}/evil/secret:/data", place.merged), "symlink of uid 1001")
        succeed(unionfs(*mount, "-v", f"{home}/good:/data", place.merged))
        succeed(unionfs("umount", place.merged))

    def test_a_volume(self, place: Place, home: Path) -> None:
        """It was created for a directory that the user replaces later."""
        root = ("--root", place.root / "root")
        for name in ("good", "evil"):
            options = ("-o", "type=none", "-o", "o=bind", "-o", f"device={home}/{name}")
            succeed(unionfs("volume", "create", *root, *options, name))
        archive = place.root / "good.tar"
        assert unionfs("volume", "backup", *root, "good", "-o", archive).returncode == 0
        refused(unionfs("volume", "backup", *root, "evil", "-o", place.root / "x.tar"), "symlink of uid 1001")
        refused(unionfs("volume", "restore", *root, "evil", "-i", archive), "symlink of uid 1001")
        private = place.root / "private"
        assert os.listdir(private) == ["secret"]
        assert private.stat().st_uid == 0

    def test_a_backup(self, place: Place, home: Path) -> None:
        root = ("--root", place.root / "root")
        succeed(unionfs("volume", "create", *root, "data"))
        for target in (home / "file", home / "evil" / "new"):
            refused(unionfs("volume", "backup", *root, "data", "-o", target), "symlink of uid 1001")
        assert (place.root / "private/secret").read_text() == "precious"
        assert unionfs("volume", "backup", *root, "data", "-o", home / "good" / "new").returncode == 0
        assert (home / "own/new").stat().st_size > 0
