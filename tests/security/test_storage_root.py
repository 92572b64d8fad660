"""Access to the storage root, and trusted roots: two real users, root and uid 1000."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mount.cli_calls import REPOSITORY, refused, succeed, unionfs
from tests.mount.test_run import Containers
from tests.support.storage import Storage
from tests.support.worker import Worker
from tests.volumes.conftest import Store
from tests.volumes.conftest import store as store
from unionfs.errors import UserError
from unionfs.storage.volumes import Volumes

pytestmark = pytest.mark.usefixtures("as_root")


def modes(root: Path) -> dict[str, int]:
    """The modes of the directories that lead to volumes and containers."""
    found = [root, *root.glob("*"), *root.glob("volumes/*"), *root.glob("containers/*")]
    return {str(path.relative_to(root)): stat.S_IMODE(path.stat().st_mode) for path in found if path.is_dir()}


class TestPassing:
    def test_no_host_user_runs_a_set_id_file_of_a_volume(self, store: Store, user: Worker) -> None:
        """CVE-2021-41091: root in a container creates it, and a user of the host becomes root."""
        data = store.create("data")
        program = shutil.copy("/usr/bin/id", data / "id")
        os.chmod(program, 0o4755)
        os.chmod(data, 0o777)
        assert user.errno(os.stat, str(program)) == errno.EACCES
        assert user.errno(os.execv, str(program), ["id"]) == errno.EACCES
        assert user.errno(os.listdir, str(store.root / "volumes")) == errno.EACCES

    def test_every_directory_on_the_way_is_closed(self, box: Containers) -> None:
        old = os.umask(0)
        try:
            box.say("--name", "box", "-v", "data:/data", "--", "true")
        finally:
            os.umask(old)
        found = modes(box.root)
        assert {"volumes/data", "containers/box", "locks", "volumes", "containers", "."} <= set(found)
        assert set(found.values()) == {0o700}

    def test_what_an_earlier_version_made_is_closed(self, store: Store, user: Worker) -> None:
        """An explicitly chosen root keeps its mode."""
        data = store.create("data")
        for name in ("locks", "volumes", "volumes/data"):
            (store.root / name).chmod(0o711)
        (store.root / "containers").mkdir(mode=0o711)
        store.root.chmod(0o755)
        (data / "file").touch()
        assert user.errno(os.stat, str(data / "file")) == 0
        store.ok("ls")
        assert user.errno(os.stat, str(data / "file")) == errno.EACCES
        store.ok("inspect", "data")
        found = modes(store.root)
        assert found.pop(".") == 0o755
        assert set(found.values()) == {0o700}

    def test_the_default_root_is_closed_too(self, area: Path) -> None:
        """An earlier version set its mode; no user chose it."""
        root = area / "data/unionfs"
        (root / "volumes").mkdir(parents=True)
        root.chmod(0o711)
        call = ("unshare", "--user", "--map-root-user", "--", "env", "-u", "UNIONFS_ROOT")
        environment = {**os.environ, "XDG_DATA_HOME": str(area / "data"), "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            [*call, sys.executable, "-m", "unionfs", "volume", "ls"],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert root.stat().st_mode & 0o777 == 0o700

    def test_users_reach_a_volume_through_the_union(self, one: Storage, user: Worker) -> None:
        """The mount in the union is the access path, for a volume of each driver."""
        (one.host / "file").chmod(0o644)
        for name, words in {"plain": (), "views": ("-d", "union", "-o", f"lower={one.host}")}.items():
            succeed(one.unionfs("volume", "create", *words, name))
        one.mount("-v", "plain:/plain", "-v", "views:/views", "-v", f"{one.host}:/bind")
        (one.merged / "plain/x").write_text("plain\n")
        for path in ("plain/x", "views/file", "bind/file"):
            assert user.errno(os.stat, str(one.merged / path)) == 0
        one.umount()

    def test_a_command_that_drops_to_another_user_works(self, box: Containers) -> None:
        (box.base / "etc/passwd").write_text("user:x:1000:1000::/data:/bin/sh\n")
        script = "busybox chmod 777 /data; busybox su user -c 'echo hello > /data/file'; cat /data/file"
        assert box.say("--rm", "-v", "data:/data", "--", "sh", "-c", script) == "hello\n"
        assert (box.root / "volumes/data/_data/file").stat().st_uid == 1000


def group_may_write(root: Path) -> None:
    root.chmod(0o770)


def others_may_write(root: Path) -> None:
    root.chmod(0o707)


def sticky(root: Path) -> None:
    root.chmod(0o1777)


def another_owner(root: Path) -> None:
    os.chown(root, 1000, 1000)


CHANGES = (group_may_write, others_may_write, sticky, another_owner)


class TestBelieving:
    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("part", ["", "/locks", "/volumes", "/volumes/data", "/containers"])
    def test_a_directory_that_others_could_change_is_refused(
        self, store: Store, change: Callable[[Path], None], part: str
    ) -> None:
        store.create("data")
        (store.root / "containers").mkdir(exist_ok=True)
        change(Path(f"{store.root}{part}"))
        sentence = refused(store("inspect", "data"), f"{store.root}{part}", "--root")
        assert "belongs to uid 1000" in sentence or "writable by its group or others" in sentence
        refused(unionfs("rm", "box", env={"UNIONFS_ROOT": str(store.root)}))

    @pytest.mark.parametrize("change", CHANGES[:2] + CHANGES[3:])
    def test_a_directory_above_too(self, area: Path, change: Callable[[Path], None], user: Worker) -> None:
        above = area / "above"
        above.mkdir()
        change(above)
        store = Store(above / "deeper/root")
        refused(store("create", "data"), f"lies below {above}", "--root")
        refused(unionfs("run", "-l", "/", "--", "true", env={"UNIONFS_ROOT": str(store.root)}))
        assert list(above.iterdir()) == []  # nothing is partly created

    def test_below_a_sticky_directory_it_is_safe(self, area: Path) -> None:
        above = area / "above"
        above.mkdir()
        above.chmod(0o1777)
        Store(above / "root").create("data")

    def test_a_symlink_on_the_way_belongs_to_who_can_change_it(self, area: Path, user: Worker) -> None:
        sticky, real = area / "sticky", area / "real"
        for path in (sticky, real):
            path.mkdir()
        sticky.chmod(0o1777)
        user.call(os.symlink, str(real), str(sticky / "theirs"))
        refused(Store(sticky / "theirs/root")("create", "data"), "which belongs to uid 1000")
        (sticky / "ours").symlink_to(real)
        Store(sticky / "ours/root").create("data")
        assert (real / "root/volumes/data/_data").is_dir()

    @pytest.mark.parametrize("name", ["locks", "volumes", "volumes/data", "volumes/data/volume.json"])
    def test_a_planted_symlink_is_not_followed(self, store: Store, area: Path, name: str) -> None:
        store.create("data")
        outside = area / "outside"
        outside.mkdir()
        planted = store.root / name
        if planted.exists():
            planted.rename(area / "aside")
        planted.symlink_to(outside)
        for words in (("inspect", "data"), ("create", "data"), ("rm", "data"), ("ls",)):
            done = store(*words)
            if words == ("ls",) and name == "volumes/data/volume.json":
                assert (done.returncode, str(planted) in done.stderr) == (0, True)
            elif words != ("ls",) or name != "volumes/data":
                refused(done, str(planted))
        assert list(outside.iterdir()) == []

    @pytest.mark.parametrize("name", ["registry.db", "registry.db-wal", "locks/.reserve"])
    def test_what_an_earlier_version_left_is_removed_and_not_followed(
        self, store: Store, area: Path, name: str
    ) -> None:
        store.create("data")
        (area / "outside").write_text("x")
        os.mkfifo(store.root / "registry.db")
        (store.root / name).unlink(missing_ok=True)
        (store.root / name).symlink_to(area / "outside")
        assert store.ok("ls", "-q") == "data\n"
        assert not (store.root / "registry.db").exists()
        assert not os.path.lexists(store.root / name)
        assert (area / "outside").read_text() == "x"

    def test_a_pipe_in_a_record_s_place_hangs_nobody(self, store: Store) -> None:
        path = store.create("data").parent / "volume.json"
        path.unlink()
        os.mkfifo(path)
        assert store("ls", "-q").stdout == "data\n"

    def test_a_planted_user_is_not_written(self, store: Store, area: Path) -> None:
        directory = store.create("data").parent
        volumes = store.volumes()
        volumes.attach("data", "mount:1:1:/m")
        (path,) = directory.glob(".user-*")
        path.unlink()
        for name in (path.name, f"{path.name}.new"):
            (directory / name).symlink_to(area / "new")
            with suppress(UserError):
                volumes.attach("data", "mount:1:1:/m")
            assert not (area / "new").exists()

    def test_a_user_of_a_foreign_root_is_not_given_back_there(self, area: Path) -> None:
        """As when root unmounts a user's mount: that user's root may contain anything, or nothing."""
        root = area / "root"
        root.mkdir()
        os.chown(root, 1000, 1000)
        with pytest.raises(UserError, match="belongs to uid 1000"):
            Volumes(str(root)).detach("data", "mount:1:1:/m")
        assert list(root.iterdir()) == []

    def test_a_record_of_another_user_s_is_not_entered(self, store: Store) -> None:
        store.create("mine")
        theirs = store.root / "volumes/theirs"
        (theirs / "_data").mkdir(parents=True)
        os.chown(theirs, 1000, 1000)
        assert store.ok("ls", "-q") == "mine\n"
        assert os.listdir(theirs) == ["_data"]
