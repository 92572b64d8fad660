"""Volumes writable by another user: names that the user creates or swaps are not trusted or followed."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mount.cli_calls import refused, succeed, wait_for
from tests.security.storage_actors import (
    SECONDS,
    Outside,
    VolumeUser,
    hold_lock,
    meanwhile,
    swap_content,
    swap_content_again,
    swap_hidden,
)
from tests.support import areas, snapshot
from tests.support.storage import Storage
from tests.support.worker import Worker
from tests.unit.union_support import OpenUnion
from tests.unit.union_support import open_union as open_union
from tests.volumes import trees
from tests.volumes.conftest import Store
from tests.volumes.conftest import store as store
from unionfs.errors import UserError
from unionfs.storage import workspace
from unionfs.storage.backup import backup
from unionfs.storage.model import Volume
from unionfs.storage.populate import populate
from unionfs.storage.restore import clone, restore

pytestmark = [pytest.mark.usefixtures("as_root"), pytest.mark.watchdog(200), pytest.mark.timeout(200)]


@pytest.fixture
def outside(area: Path) -> Iterator[Outside]:
    """A tree that must stay unchanged."""
    found = Outside(area)
    yield found
    found.check()


@pytest.fixture
def shared(area: Path) -> Path:
    """A directory of uid 1000 that root binds as a volume."""
    path = area / "shared"
    path.mkdir(mode=0o777)
    os.chown(path, 1000, 1000)
    path.chmod(0o777)
    return path


def bind(store: Store, shared: Path) -> None:
    """The volume `vol`, bound to the directory."""
    store.ok("create", "-o", "type=none", "-o", "o=bind", "-o", f"device={shared}", "vol")


def archive(store: Store, path: Path) -> Path:
    """A backup with a small tree, whose root belongs to root."""
    data = store.create("source")
    (data / "d/e").mkdir(parents=True)
    (data / "d/e/file").write_text("restored")
    (data / "top").write_text("restored")
    data.chmod(0o777)
    store.ok("backup", "source", "-o", path)
    return path


def hidden(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".unionfs-")]


class TestPlanted:
    @pytest.mark.parametrize("kind", ["symlink", "directory"])
    @pytest.mark.parametrize("name", [".unionfs-restore", ".unionfs-0123456789abcdef"])
    def test_names_in_the_volume_are_content(
        self, store: Store, shared: Path, outside: Outside, area: Path, kind: str, name: str, user: Worker
    ) -> None:
        """With a symlink of this name, root once changed all modes below its target."""
        bind(store, shared)
        source = archive(store, area / "b.tar")
        if kind == "symlink":
            user.call(os.symlink, str(outside.path), str(shared / name))
        else:
            user.call(os.mkdir, str(shared / name))
            user.call(os.symlink, str(outside.path / "old"), str(shared / name / "old"))
            user.call(os.symlink, str(outside.path / "new"), str(shared / name / "new"))
        store.ok("backup", "vol", "-o", area / "with.tar")
        assert name in trees.tar("-tf", area / "with.tar")
        store.ok("restore", "vol", "-i", source)
        assert sorted(os.listdir(shared)) == ["d", "top"]

    def test_a_journal_in_the_volume_is_content(
        self, store: Store, shared: Path, area: Path, user: Worker
    ) -> None:
        """With it, root once gave the volume's root any owner and mode."""
        bind(store, shared)
        planted = shared / ".unionfs-restore"
        for path in (planted, planted / "old", planted / "new"):
            user.call(os.mkdir, str(path))
        journal = json.dumps({"old": [], "new": [], "root": [0o4777, 0, 0, 0]})
        (planted / "journal").write_text(journal)
        before = snapshot.take(shared)
        store.ok("backup", "vol", "-o", area / "b.tar")
        store.ok("verify", "vol")
        assert {path: found.mode for path, found in snapshot.take(shared).items()} == {
            path: found.mode for path, found in before.items()
        }
        assert shared.stat().st_uid == 1000

    def test_the_lock_of_the_first_filling_is_nobody_else_s(
        self, one: Storage, shared: Path, user: Worker
    ) -> None:
        """flock(2) on a directory needs read permission only, and once blocked a mount by root for ever."""
        (one.place.lower / "etc").mkdir()
        (one.place.lower / "etc/x").write_text("x")
        bound = ("-o", "type=none", "-o", "o=bind", "-o", f"device={shared}")
        succeed(one.unionfs("volume", "create", *bound, "vol"))
        with meanwhile(hold_lock, shared.parent / "stop", shared):
            one.mount("-v", "vol:/etc")
        assert os.listdir(shared) == ["x"]
        one.umount()


class TestWorkspace:
    def test_its_record_is_outside_and_backups_leave_it_out(
        self, store: Store, shared: Path, area: Path
    ) -> None:
        bind(store, shared)
        source = archive(store, area / "b.tar")
        (shared / "kept").write_text("old")
        if (pid := os.fork()) == 0:
            # A process that dies during a restore.
            workspace.Workspace.commit = lambda self, keep=False: os._exit(0)  # type: ignore[method-assign]
            with suppress(BaseException):
                restore(store.volumes(), "vol", str(source))
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        (name,) = hidden(shared)
        assert stat.S_IMODE((shared / name).stat().st_mode) == 0o700
        assert (store.root / f"volumes/vol/{name}.json").stat().st_mode & 0o777 == 0o600
        store.ok("backup", "vol", "-o", area / "with.tar")  # the next use removes it
        assert hidden(shared) == []
        assert trees.tar("-tf", area / "with.tar").split()[1:-1] == ["./", "./kept"]
        assert not list((store.root / "volumes/vol").glob(".unionfs-*"))

    @pytest.mark.parametrize("how", ["symlink", "directory", "fifo", "gone"])
    def test_what_is_in_its_place_later_is_left_alone(
        self, store: Store, shared: Path, outside: Outside, area: Path, how: str, user: Worker
    ) -> None:
        bind(store, shared)
        record = {
            "name": ".unionfs-0123456789abcdef", "user": "restore:1:1:", "uid": 0, "ino": 1,
            "journal": {
                "old": ["kept"], "new": [], "mode": 0o4777, "uid": 0, "gid": 0, "mtime": 0,
                "xattrs": {}, "done": True,
            },
        }  # fmt: skip
        (store.root / "volumes/vol/.unionfs-0123456789abcdef.json").write_text(json.dumps(record))
        (shared / "kept").write_text("kept")
        place = str(shared / ".unionfs-0123456789abcdef")
        if how == "symlink":
            user.call(os.symlink, str(outside.path), place)
        elif how == "directory":
            user.call(os.mkdir, place)
            user.call(os.symlink, str(outside.path), place + "/new")
        elif how == "fifo":
            user.call(os.mkfifo, place)
        before = snapshot.take(shared)
        store.ok("backup", "vol", "-o", area / "b.tar")
        assert snapshot.take(shared) == before
        assert not list((store.root / "volumes/vol").glob(".unionfs-*"))

    def test_an_exchange_that_cannot_be_finished_says_how_to_go_on(self, store: Store, shared: Path) -> None:
        bind(store, shared)
        record = {
            "name": ".unionfs-0123456789abcdef", "user": "restore:1:1:", "uid": 0, "ino": 1,
            "journal": {
                "old": [], "new": ["lost"], "mode": 0o755, "uid": 0, "gid": 0, "mtime": 0, "xattrs": {},
                "done": False,
            },
        }  # fmt: skip
        path = store.root / "volumes/vol/.unionfs-0123456789abcdef.json"
        path.write_text(json.dumps(record))
        refused(store("verify", "vol"), str(path), "cannot be finished")
        path.unlink()
        assert "has no manifest" in store("verify", "vol").stderr

    def test_an_immutable_file_is_named_before_anything_is_moved(
        self, store: Store, shared: Path, area: Path
    ) -> None:
        bind(store, shared)
        source = archive(store, area / "b.tar")
        (shared / "d").mkdir()
        (shared / "d/locked").write_text("x")
        os.system(f"chattr +i {shared}/d/locked")
        try:
            before = snapshot.take(shared)
            refused(store("restore", "vol", "-i", source), "d/locked", "chattr -i")
            after = snapshot.take(shared)
            assert set(after) == set(before)
        finally:
            os.system(f"chattr -i {shared}/d/locked")
        store.ok("restore", "vol", "-i", source)


class TestOrdinaryUser:
    def test_directories_without_write_permission(self, area: Path) -> None:
        """rename(2) into another directory requires it on the moved one: the exchange ended half-way."""
        user = VolumeUser(area)
        shared = user.home / "shared"
        (shared / "closed/inner").mkdir(parents=True)
        (shared / "closed/inner/file").write_text("x")
        for path in (shared, *shared.rglob("*")):
            os.chown(path, 1000, 1000)
        for name in ("closed/inner", "closed"):
            (shared / name).chmod(0o555)
        words = ("-o", "type=none", "-o", "o=bind", "-o", f"device={shared}")
        succeed(user("create", *words, "vol"))
        assert user("backup", "vol", "-o", user.home / "b.tar").returncode == 0
        before = trees.value(shared)
        for _ in range(2):
            done = user("restore", "vol", "-i", user.home / "b.tar")
            assert done.returncode == 0, done.stderr
        assert trees.value(shared) == before
        assert hidden(shared) == []


def repeat(step: Callable[[], object]) -> int:
    """Call it for some seconds; a refusal is acceptable. Returns the number of successes."""
    done = 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with suppress(UserError):
            step()
            done += 1
    return done


class TestRaces:
    @pytest.mark.parametrize("actor", [swap_hidden, pytest.param(swap_content, marks=pytest.mark.slow)])
    def test_restore(self, store: Store, shared: Path, outside: Outside, area: Path, actor: object) -> None:
        bind(store, shared)
        source = archive(store, area / "b.tar")
        volumes = store.volumes()
        with meanwhile(actor, area / "stop", shared, outside.path):
            repeat(lambda: restore(volumes, "vol", str(source)))
        outside.check()
        restore(volumes, "vol", str(source))
        assert not list((store.root / "volumes/vol").glob(".unionfs-*"))
        assert sorted(os.listdir(shared)) == ["d", "top"]
        assert (shared / "d/e/file").read_text() == "restored"

    def test_the_first_filling(
        self, open_union: OpenUnion, shared: Path, outside: Outside, area: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "l0/d/e").mkdir(parents=True)
        (tmp_path / "l0/d/e/x").write_text("layer")
        (tmp_path / "l0/d").chmod(0o777)
        stack = open_union().stack
        home = tmp_path / "root/volumes/vol"
        home.mkdir(parents=True, mode=0o700)
        volume = Volume("vol", "local", str(shared), False, directory=str(home))
        fd = os.open(shared, os.O_PATH | os.O_DIRECTORY)

        def fill() -> None:
            populate(stack, (b"d",), fd, volume)
            for name in os.listdir(shared):
                areas.remove(shared / name)

        with meanwhile(swap_hidden, area / "stop", shared, outside.path):
            assert repeat(fill) > 10
        os.close(fd)

    @pytest.mark.slow
    def test_backup_and_clone(self, store: Store, outside: Outside, area: Path) -> None:
        """The user's directory is in a local volume: a process of the user keeps it open."""
        data = store.create("vol")
        pool = area / "pool"
        pool.mkdir()
        os.chown(pool, 1000, 1000)
        volumes = store.volumes()

        def step() -> None:
            try:
                backup(volumes, "vol", str(area / "b.tar"), compress="none")
                assert b"the secret of root" not in (area / "b.tar").read_bytes()
                clone(volumes, "vol", "copy")
            finally:
                volumes.remove("copy", missing_ok=True)

        with meanwhile(swap_content, area / "stop", pool, outside.path):
            assert wait_for(lambda: os.listdir(pool))  # it has opened its directory
            pool.rename(data / "pool")
            repeat(step)

    @pytest.mark.slow
    def test_backup_and_removal_of_a_bound_volume(
        self, store: Store, shared: Path, outside: Outside, area: Path
    ) -> None:
        volumes = store.volumes()
        options = {"type": "none", "o": "bind", "device": str(shared)}

        def step() -> None:
            volumes.create("vol", options=options)
            try:
                backup(volumes, "vol", str(area / "b.tar"), compress="none")
                assert b"the secret of root" not in (area / "b.tar").read_bytes()
            finally:
                volumes.remove("vol")

        with meanwhile(swap_content, area / "stop", shared, outside.path):
            repeat(step)
        assert shared.is_dir()

    @pytest.mark.parametrize("force", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_removal(self, store: Store, outside: Outside, area: Path, force: bool) -> None:
        """A directory that its owner still has open is removed with the volume."""
        pool = area / "pool"
        volumes = store.volumes()

        def step() -> None:
            data = Path(volumes.create("vol").mountpoint)
            pool.mkdir(mode=0o777)
            os.chown(pool, 1000, 1000)
            time.sleep(0.005)
            pool.rename(data / "pool")
            volumes.remove("vol", force=force)

        with meanwhile(swap_content_again, area / "stop", pool, outside.path):
            assert repeat(step) > 10
        volumes.create("last")
        assert [name for name in os.listdir(store.root / "volumes") if name != "last"] == []

    def test_a_mount_of_root_s(self, one: Storage, shared: Path, outside: Outside, area: Path) -> None:
        (one.place.lower / "etc/deep").mkdir(parents=True)
        (one.place.lower / "etc/deep/x").write_text("x")
        bound = ("-o", "type=none", "-o", "o=bind", "-o", f"device={shared}")
        succeed(one.unionfs("volume", "create", *bound, "vol"))
        with meanwhile(swap_hidden, area / "stop", shared, outside.path):
            for _ in range(5):
                if one.try_mount("-v", "vol:/etc").returncode == 0:
                    one.umount()
                for name in os.listdir(shared):
                    areas.remove(shared / name)
