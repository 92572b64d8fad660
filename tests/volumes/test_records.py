"""The records of volumes and users, their repair, full disks, and many concurrent processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.mount.cli_calls import refused, succeed
from tests.support.patience import patient
from tests.volumes.conftest import Store
from unionfs.errors import UserError
from unionfs.storage import jsonfiles, records
from unionfs.storage.model import VolumeUser
from unionfs.sys.process import start_time


def _user(pid: int = os.getpid(), kind: str = "mount", what: str = "/mnt") -> str:
    return f"{kind}:{pid}:{start_time(pid)}:{what}"


class TestUsers:
    def test_a_volume_in_use_is_not_removed_and_its_user_is_named(self, store: Store) -> None:
        store.create("data")
        volumes = store.volumes()
        path = volumes.attach("data", _user())
        assert path == str(store.data("data"))
        message = refused(store("rm", "data"), "in use", "the mount /mnt", f"pid {os.getpid()}")
        assert "data" in message
        refused(store("rm", "-f", "data"), "in use")
        volumes.detach("data", _user())
        assert store.ok("rm", "data") == "data\n"
        assert not store.data("data").parent.exists()

    def test_a_user_is_counted_once_however_often_it_attaches(self, store: Store) -> None:
        store.create("data")
        volumes = store.volumes()
        for _ in range(3):
            volumes.attach("data", _user())
        assert len(volumes.users("data")) == 1
        volumes.detach("data", _user())
        volumes.detach("data", _user())
        assert volumes.users("data") == []

    def test_a_user_whose_process_is_gone_counts_no_more(self, store: Store) -> None:
        store.create("data")
        child = subprocess.Popen(["sleep", "100"])
        try:
            store.volumes().attach("data", _user(child.pid))
            refused(store("rm", "data"), f"pid {child.pid}")
        finally:
            child.kill()
            child.wait()
        assert store.ok("ls", "-q", "-f", "dangling=true") == "data\n"
        assert store.ok("rm", "data") == "data\n"

    def test_a_pid_that_was_given_to_another_process_is_another_user(self, store: Store) -> None:
        store.create("data")
        store.volumes().attach("data", f"mount:{os.getpid()}:1:/mnt")
        assert store.volumes().users("data") == []
        assert store.ok("rm", "data") == "data\n"


    @pytest.mark.parametrize("written", [0, 100])
    def test_the_spare_of_a_full_disk_is_filled_by_the_next_use(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, written: int
    ) -> None:
        real = os.write

        def full(fd: int, data: bytes) -> int:
            if data != b" " * 4096:
                return real(fd, data)
            if written == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, data[:written])

        monkeypatch.setattr(os, "write", full)
        spare = store.create("data").parent / "spare"
        monkeypatch.undo()
        assert not spare.exists()
        spare.touch()  # of an earlier version
        with store.volumes().used("data", "backup"):
            assert spare.stat().st_size == 4096

    def test_a_user_that_cannot_be_removed_is_named(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.create("data")
        volumes = store.volumes()
        volumes.attach("data", _user())

        def broken(path: str) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(os, "unlink", broken)
        with pytest.raises(UserError, match=r"\.user-.*read-only"):
            volumes.detach("data", _user())


class TestMaking:
    def test_what_is_made_is_docker_s_layout(self, store: Store) -> None:
        data = store.create("data")
        assert data == store.root / "volumes/data/_data"
        assert oct(data.stat().st_mode) == "0o40755"
        assert list(data.iterdir()) == []
        assert store.create("data") == data  # again, with the same options

    def test_an_anonymous_volume_has_64_digits_and_docker_s_label(self, store: Store) -> None:
        name = succeed(store("create")).strip()
        assert len(name) == 64
        assert set(name) <= set("0123456789abcdef")
        (found,) = json.loads(store.ok("inspect", name))
        assert found["Labels"] == {"com.docker.volume.anonymous": ""}

    @pytest.mark.parametrize("name", ["a", "-x", ".hidden", "a/b", "..", "über", "x" * 300, "a b", ""])
    def test_bad_names_are_refused(self, store: Store, name: str) -> None:
        refused(store("create", "--", name))
        assert not (store.root / "volumes").exists()

    def test_a_name_that_exists_with_other_options_is_refused(self, store: Store) -> None:
        store.create("--label", "a=1", "data")
        refused(store("create", "-o", "size=100m", "data"), "already exists", "option", "no size")
        refused(store("create", "--label", "a=2", "data"), "already exists", "a=1")
        refused(store("create", "-d", "union", "-o", "lower=/", "data"), "already exists", "driver local")
        assert store.ok("create", "--label", "a=1", "data") == "data\n"
        assert store.ok("create", "data") == "data\n"

    def test_unknown_drivers_and_options_are_refused_with_what_there_is(self, store: Store) -> None:
        refused(store("create", "-d", "lokal", "data"), "unknown volume driver lokal", "did you mean local")
        refused(store("create", "-d", "qqqq", "data"), "there are local, union")
        refused(store("create", "-o", "sise=1g", "data"), "option sise", "size")
        refused(store("create", "-o", "=x", "data"), "KEY=VALUE")
        refused(store("create", "-o", "size=1g", "-o", "size=2g", "data"), "twice")
        assert not (store.root / "volumes").exists()

    def test_a_root_that_cannot_be_made_is_named(self, store: Store, area: Path) -> None:
        (area / "file").touch()
        refused(
            store("create", "data", env={"UNIONFS_ROOT": str(area / "file/below")}), "file/below", "--root"
        )

    def test_root_option_overrides_the_environment(self, store: Store, area: Path) -> None:
        assert store.ok("create", "--root", area / "other", "data") == "data\n"
        assert (area / "other/volumes/data/_data").is_dir()
        assert store.ok("ls", "-q") == ""

    def test_other_things_in_the_way_are_not_touched(self, store: Store) -> None:
        (store.root / "volumes/data").mkdir(parents=True)
        (store.root / "volumes/data/precious").write_text("x")
        refused(store("create", "data"), "in the way")
        assert (store.root / "volumes/data/precious").read_text() == "x"
        assert [entry.name for entry in (store.root / "volumes").iterdir()] == ["data"]


class TestLongNames:
    @pytest.mark.parametrize("length", [248, 249, 250, 255])
    def test_a_name_may_be_as_long_as_a_directorys(self, store: Store, area: Path, length: int) -> None:
        name, neighbour = "n" * length, "n" * (length - 1) + "m"
        store.create(name).joinpath("file").write_text("content")
        store.create(neighbour)
        with store.volumes().working_on(name, "a test"):
            # The lock is of the whole name.
            store.ok("rm", neighbour)
            refused(store("rm", name), "is busy with a test")
        store.ok("backup", name, "-o", area / "b.tar")
        store.ok("restore", name, "-i", area / "b.tar")
        store.ok("rm", name)
        assert store.ok("ls", "-q") == ""
        assert not [path.name for path in (store.root / "locks").iterdir() if path.name.startswith("n")]


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_on_a_full_disk_volumes_are_listed_and_removed(filesystem: Callable[..., Path], kind: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    place = filesystem(kind, 32 << 20)
    store = Store(place / "root")
    (store.create("large") / "file").write_bytes(os.urandom(1 << 20))
    store.create("other")
    store.volumes().attach("large", _user())

    def fill() -> None:
        with suppress(OSError):  # first ext4's fixed number of inodes: then none is left for a lock
            for number in range(10000 if kind == "ext4" else 0):
                (place / f"inode {number}").touch()
        for size in (1 << 16, 512):
            with suppress(OSError), open(place / f"rest {size}", "ab", buffering=0) as rest:
                while rest.write(bytes(size)):
                    pass

    fill()
    assert store.ok("ls", "-q") == "large\nother\n"
    refused(store("create", "more"), "more", "free space")
    store.volumes().attach("other", _user())
    with pytest.raises(UserError, match="free space"):
        store.volumes().attach("other", _user(what="/another"))
    assert [user.text for user in store.volumes().users("other")] == [_user()]
    for name in ("large", "other"):
        store.volumes().detach(name, _user())
    assert store.volumes().all_users() == {}
    assert store.ok("rm", "large") == "large\n"
    assert store.ok("ls", "-q") == "other\n"
    assert not (store.root / "volumes/large").exists()
    fill()
    assert store.ok("prune", "-a", "-f").startswith("Deleted Volumes:\nother\n")
    assert os.listdir(store.root / "volumes") == []


class TestRepair:
    def test_a_newer_record_is_refused_and_left_alone(self, store: Store) -> None:
        path = store.create("data").parent / "volume.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
        before = path.read_bytes()
        for words in (("create", "data"), ("rm", "-f", "data")):
            refused(store(*words), "version 99", "newer", str(path))
        for words in (("ls", "-q"), ("inspect", "data")):
            assert "version 99" in store(*words).stderr
        assert path.read_bytes() == before
        assert store.data("data").is_dir()

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"name": "x"}', b'{"version": "x"}'])
    def test_a_damaged_record_is_kept_and_its_data_is_a_local_volume(
        self, store: Store, content: bytes
    ) -> None:
        data = store.create("--label", "a=1", "data")
        (data / "file").write_text("x")
        store.create("--label", "a=1", "other")
        store.volumes().attach("data", _user())
        (data.parent / "volume.json").write_bytes(content)
        done = store("ls", "-q")
        assert done.stdout.split() == ["data", "other"]
        assert "data had no record" in done.stderr
        assert (data.parent / "volume.json.damaged").read_bytes() == content
        assert store("ls", "-q").stderr == ""
        assert [volume.driver for volume in store.volumes().all()] == ["local", "local"]
        refused(store("rm", "data"), "in use by the mount /mnt")
        assert (data / "file").read_text() == "x"

    def test_a_damaged_record_of_another_volume_is_named(self, store: Store) -> None:
        path = store.create("-d", "union", "-o", "lower=/usr", "views").parent / "volume.json"
        store.create("data")
        path.write_bytes(b"")
        for words in (("create", "views"), ("rm", "views")):
            refused(store(*words), str(path), "damaged")
        done = store("ls", "-q")
        assert (done.returncode, done.stdout) == (0, "data\n")
        assert f"{path} is damaged" in done.stderr
        done = store("prune", "-a", "-f")
        assert (done.returncode, "Deleted Volumes:\ndata\n" in done.stdout) == (0, True)
        assert f"{path} is damaged" in done.stderr
        assert store.ok("rm", "-f", "views") == "views\n"
        assert not path.parent.exists()

    def test_a_volume_with_a_damaged_record_is_not_removed_while_it_is_mounted(self, store: Store) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root")
        directory = store.create("-d", "union", "-o", "lower=/usr", "views").parent
        (directory / "volume.json").write_bytes(b"")
        subprocess.run(["mount", "-t", "tmpfs", "none", str(directory / "views")], check=True)
        refused(store("rm", "-f", "views"), "still mounted")
        subprocess.run(["umount", str(directory / "views")], check=True)
        store.volumes().remove("views", force=True)

    @pytest.mark.parametrize("name", ["volume.json", ".user-x"])
    def test_what_cannot_be_read_is_named(self, store: Store, area: Path, name: str) -> None:
        path = store.create("data").parent / name
        path.unlink(missing_ok=True)
        path.symlink_to(area / "secret")
        store.create("other")
        done = store("ls", "-q", "-f", "dangling=true")
        assert (done.returncode, done.stdout.endswith("other\n"), str(path) in done.stderr) == (0, True, True)
        refused(store("rm", "data"), str(path))
        done = store("prune", "-a", "-f")
        assert ("Deleted Volumes:\nother\n" in done.stdout, str(path) in done.stderr) == (True, True)
        assert path.is_symlink()

    def test_a_directory_without_a_record_is_a_local_volume(self, store: Store) -> None:
        store.create("data")
        (store.root / "volumes/plain/_data").mkdir(parents=True)
        done = store("ls", "-q")
        assert done.stdout.split() == ["data", "plain"]
        assert "plain had no record" in done.stderr
        store.data("data").parent.joinpath("volume.json").write_text("{garbage")
        assert store("ls", "-q").stdout.split() == ["data", "plain"]

    def test_a_volume_whose_directory_was_removed_by_hand_is_gone(self, store: Store) -> None:
        store.create("data")
        shutil.rmtree(store.data("data").parent)
        done = store("ls", "-q")
        assert done.stdout == ""
        assert store.create("data").is_dir()


class TestEarlierVersion:
    """Users were stored in the record, and an SQLite database repeated all records."""

    @pytest.fixture
    def old(self, store: Store) -> Iterator[subprocess.Popen[bytes]]:
        """A storage root whose volume `data` is in use by that process."""
        path = store.create("data").parent / "volume.json"
        user = subprocess.Popen(["sleep", "100"])
        record = {**json.loads(path.read_text()), "users": [[_user(user.pid), str(store.data("data"))]]}
        path.write_text(json.dumps(record))
        for name in ("registry.db", "registry.db-wal", "registry.db-shm", "locks/.reserve"):
            (store.root / name).write_text("old")
        yield user
        user.kill()
        user.wait()

    def test_its_users_count_as_long_as_they_run(self, store: Store, old: subprocess.Popen[bytes]) -> None:
        assert json.loads(store.ok("inspect", "data"))[0]["UsageData"]["RefCount"] == 1
        assert store.ok("ls", "-q", "-f", "dangling=true") == ""
        refused(store("rm", "data"), f"in use by the mount /mnt (pid {old.pid})")
        assert not list(store.root.glob("registry.db*"))
        assert not (store.root / "locks/.reserve").exists()
        # Its daemon recreates the registry from the record when it ends.
        assert json.loads((store.data("data").parent / "volume.json").read_text())["users"]
        old.kill()
        old.wait()
        store.volumes().attach("data", _user())
        assert [user.text for user in store.volumes().users("data")] == [_user()]

    def test_its_users_can_be_detached(self, store: Store, old: subprocess.Popen[bytes]) -> None:
        volumes = store.volumes()
        assert volumes.attach("data", _user(old.pid)) == str(store.data("data"))
        volumes.detach("data", _user(old.pid))
        assert volumes.users("data") == []
        store.ok("rm", "data")

    def test_when_its_daemon_ends_it_knows_the_users_that_came_since(
        self, store: Store, old: subprocess.Popen[bytes]
    ) -> None:
        def listed() -> list[str]:
            return [
                text
                for text, _ in json.loads((store.data("data").parent / "volume.json").read_text())["users"]
            ]

        volumes = store.volumes()
        volumes.attach("data", _user())
        assert listed() == [_user(old.pid), _user()]
        volumes.detach("data", _user())
        assert listed() == [_user(old.pid)]
        volumes.detach("data", _user(old.pid))
        assert listed() == []
        (store.root / "registry.db").touch()  # that daemon's
        assert store.volumes().users("data") == []

    def test_its_users_count_on_a_full_disk(
        self, store: Store, old: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(jsonfiles, "write", full)
        (store.data("data").parent / "spare").unlink()
        refused(store("rm", "data"), f"pid {old.pid}")
        monkeypatch.undo()
        store.volumes().attach("data", _user())
        assert len(store.volumes().users("data")) == 2

    @pytest.fixture
    def database(self, store: Store) -> Iterator[sqlite3.Connection]:
        """The database of an earlier version, with what it wrote last in its WAL."""
        store.create("other")
        store.create("nfs")
        with closing(sqlite3.connect(store.root / "registry.db", isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(
                "CREATE TABLE volumes (name TEXT PRIMARY KEY, driver TEXT, mountpoint TEXT, "
                "anonymous INTEGER, options TEXT, labels TEXT, created REAL, scope TEXT)"
            )
            db.execute("CREATE TABLE users (volume TEXT, user TEXT, path TEXT)")
            yield db

    @pytest.mark.parametrize("content", [b"", b"{", None])
    def test_a_record_that_only_the_database_has_is_written(
        self, store: Store, database: sqlite3.Connection, content: bytes | None
    ) -> None:
        path = store.data("nfs").parent / "volume.json"
        options = {"type": "nfs", "device": ":/x", "o": "addr=10.0.0.1"}
        row = ("nfs", "local", str(store.data("nfs")), 0, json.dumps(options), '{"a": "b"}', 5.0, "local")
        database.execute("INSERT INTO volumes VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        database.execute("INSERT INTO users VALUES ('nfs', ?, '/somewhere')", (_user(),))
        path.write_bytes(content) if content is not None else path.unlink()
        volumes = store.volumes()
        found = volumes.get("nfs")
        assert (found.options, found.labels, found.created) == (options, {"a": "b"}, 5.0)
        assert volumes.users("nfs") == [VolumeUser(_user(), "/somewhere")]
        assert json.loads(path.read_text())["options"] == options
        assert not list(store.root.glob("registry.db*"))
        assert "record of volume nfs was lost" in store.told[0]

    def test_it_stays_until_every_record_is_written(self, store: Store, database: sqlite3.Connection) -> None:
        path = store.data("nfs").parent / "volume.json"
        row = ("nfs", "local", "", 0, '{"type": "nfs"}', "{}", 5.0, "local")
        database.execute("INSERT INTO volumes VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        path.unlink()
        (path.parent / "volume.json.new").mkdir()  # it cannot be written
        with pytest.raises(UserError, match="record of volume nfs is lost"):
            store.volumes().get("nfs")
        assert "nfs cannot be recorded" in store.told[0]
        assert (store.root / "registry.db").exists()
        assert not path.exists()
        (path.parent / "volume.json.new").rmdir()
        assert store.volumes().get("nfs").options == {"type": "nfs"}

    def test_a_damaged_database_is_kept_if_a_record_is_lost(self, store: Store) -> None:
        (store.create("data").parent / "volume.json").unlink()
        (store.root / "registry.db").write_bytes(b"no database" * 1000)
        assert store.volumes().get("data").driver == "local"
        assert (store.root / "registry.db.old").exists()
        assert "is damaged" in store.told[0]

    def test_what_else_it_left_is_removed(self, store: Store, old: subprocess.Popen[bytes]) -> None:
        for name in ("registry.db.damaged-20250101T000000Z-1", "locks/.registry.state"):
            (store.root / name).touch()
        store.ok("ls")
        assert not list(store.root.glob("registry.db*"))
        assert not list((store.root / "locks").glob(".re*"))

    def test_it_finds_what_it_expects_in_a_record(self, store: Store) -> None:
        record = json.loads((store.create("data").parent / "volume.json").read_text())
        assert record["users"] == []


_RACE = """
import os, sys
sys.path.insert(0, sys.argv[2])
from unionfs.storage.volumes import Volumes
from unionfs.errors import UserError
from unionfs.storage.model import VolumeUser
root, number = sys.argv[1], int(sys.argv[3])
volumes = Volumes(root, tell=lambda text: sys.exit(f"told: {text}"))
user = VolumeUser.of_this_process("mount", f"/mnt{number}")
for turn in range(15):
    volumes.create("common")
    volumes.create(f"own{number}")
    volumes.attach("common", user)
    assert any(one.text == user for one in volumes.users("common"))
    try:
        volumes.remove("common")
    except UserError as error:
        assert "in use" in str(error) or "busy" in str(error) or "no volume" in str(error), error
    else:
        sys.exit("a volume in use was removed")
    volumes.detach("common", user)
    volumes.remove(f"own{number}")
print("done")
"""


_AGAIN_AND_AGAIN = """
import sys
sys.path.insert(0, sys.argv[2])
from unionfs.storage.model import VolumeUser
from unionfs.storage.volumes import Volumes
volumes, user = Volumes(sys.argv[1]), VolumeUser.of_this_process("mount", "/mnt")
print("up", flush=True)
while True:
    volumes.create("data", labels={"a": "b"})
    volumes.attach("data", user)
    volumes.detach("data", user)
    volumes.remove("data")
"""
_REPOSITORY = str(Path(__file__).resolve().parents[2])


class TestManyProcesses:
    def test_they_make_use_and_remove_at_once(self, store: Store) -> None:
        store.create("common")
        children = [
            subprocess.Popen(
                [sys.executable, "-c", _RACE, str(store.root), _REPOSITORY, str(number)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(6)
        ]
        for child in children:
            out, err = child.communicate(timeout=patient(60))
            assert (child.returncode, out) == (0, "done\n"), err
        assert [volume.name for volume in store.volumes().all()] == ["common"]
        assert store.volumes().users("common") == []

    def test_a_volume_is_never_seen_without_its_record(self, store: Store) -> None:
        """A directory with `_data` is a local volume, except while another process creates or removes one."""
        words = [sys.executable, "-c", _AGAIN_AND_AGAIN, str(store.root), _REPOSITORY]
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        seen = 0
        try:
            end = time.monotonic() + 1.5
            while time.monotonic() < end or (seen < 20 and time.monotonic() < end + 30):
                for volume in store.volumes().all():
                    seen += 1
                    assert (volume.name, volume.labels) == ("data", {"a": "b"})
        finally:
            child.kill()
            child.wait()
        assert store.told == []

    @pytest.mark.parametrize("seed", range(4))
    def test_processes_that_are_killed_leave_nothing_half_made(self, store: Store, seed: int) -> None:
        for turn in range(4):
            child = subprocess.Popen(
                [sys.executable, "-c", _AGAIN_AND_AGAIN, str(store.root), _REPOSITORY], stdout=subprocess.PIPE
            )
            assert child.stdout is not None
            assert child.stdout.readline() == b"up\n"
            time.sleep(
                0.003 * (seed * 4 + turn)
            )  # the moment of its death does not matter, but it should vary
            child.send_signal(signal.SIGKILL)
            child.wait()
            child.stdout.close()
        volumes = store.volumes()
        for volume in volumes.all():
            assert (volume.name, volume.labels) == ("data", {"a": "b"})
            assert os.path.isdir(volume.mountpoint)
        assert volumes.all_users() == {}
        volumes.create("data", labels={"a": "b"})
        assert volumes.remove("data")
        assert [path.name for path in (store.root / "volumes").iterdir()] == []
        assert store.told == []

    def test_a_volume_that_is_replaced_while_it_is_read_is_not_damaged(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        directory = store.create("data").parent
        real, writer = jsonfiles.read, store.volumes()

        def slow(path: str, at: int | None = None) -> object:
            if at is not None:
                monkeypatch.undo()
                writer.remove("data")
                writer.create("data")
            return real(path, at)

        monkeypatch.setattr(jsonfiles, "read", slow)
        assert records.find(str(directory)) is None
        assert [volume.name for volume in store.volumes().all()] == ["data"]

    def test_users_are_recorded_beside_the_data(self, store: Store) -> None:
        directory = store.create("data").parent
        store.volumes().attach("data", _user())
        (path,) = directory.glob(".user-*")
        assert json.loads(path.read_text()) == [_user(), str(store.data("data"))]
        assert records.users(str(directory)) == [VolumeUser(_user(), str(store.data("data")))]
        assert str(VolumeUser(_user(), "")) == f"the mount /mnt (pid {os.getpid()})"
