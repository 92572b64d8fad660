"""Plain tars of volumes, their names, and restoring into a new volume."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.mount.cli_calls import REPOSITORY, UNIONFS, refused
from tests.volumes import trees
from tests.volumes.conftest import Store
from unionfs.storage import records
from unionfs.storage.renaming import rename


class TestPlain:
    def test_a_plain_tar_holds_everything(self, root: None, store: Store, area: Path) -> None:
        data = store.create("data")
        trees.fill(data)
        store.ok("export", "data", "-o", area / "x.tar")
        assert ".unionfs-backup" not in trees.tar("tf", area / "x.tar")
        (area / "out").mkdir()
        trees.tar("xpf", area / "x.tar", "--xattrs", "--xattrs-include=*", "--acls", "-C", area / "out")
        assert trees.value(area / "out") == trees.value(data)
        store.create("other")
        assert store.ok("import", "other", area / "x.tar") == "other\n"
        assert trees.value(store.data("other")) == trees.value(data)

    @pytest.mark.parametrize("ending", ["tar", "tar.gz", "tar.zst"])
    def test_compressed(self, store: Store, area: Path, ending: str) -> None:
        data = store.create("data")
        (data / "file").write_text("content")
        store.ok("export", "data", "-o", area / f"x.{ending}")
        store.create("other")
        store.ok("import", "other", area / f"x.{ending}")
        assert (store.data("other") / "file").read_text() == "content"

    def test_through_a_pipe(self, store: Store, area: Path) -> None:
        data = store.create("data")
        (data / "file").write_text("content")
        store.create("other")
        program = shlex.join(UNIONFS)
        done = subprocess.run(
            ["sh", "-c", f"{program} volume export data | {program} volume import other"],
            capture_output=True, text=True, check=False, cwd=REPOSITORY,
            env={**os.environ, "UNIONFS_ROOT": str(store.root)},
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "other\n"), done.stderr
        assert (store.data("other") / "file").read_text() == "content"

    def test_other_owners(self, root: None, store: Store, area: Path) -> None:
        data = store.create("data")
        (data / "file").write_text("content")
        (data / "large").write_bytes(bytes(1 << 20))
        os.symlink("file", data / "link")
        store.ok("export", "--uid", "7", "data", "-o", area / "x.tar")
        with tarfile.open(area / "x.tar") as tar:
            assert {(one.uid, one.gid) for one in tar} == {(7, 0)}
        store.create("other")
        store.ok("import", "--uid", "8", "--gid", "9", "other", area / "x.tar")
        target = store.data("other")
        for path in (target, *target.iterdir()):
            assert (path.lstat().st_uid, path.lstat().st_gid) == (8, 9), path

    def test_of_other_programs(self, root: None, store: Store, area: Path) -> None:
        """Names without directories, absolute names, and the content before is replaced."""
        data = store.create("data")
        (data / "old").touch()
        with tarfile.open(area / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for name in ("deep/er/file", "/absolute", "n" * 200):
                member = tarfile.TarInfo(name)
                member.size = 3
                tar.addfile(member, io.BytesIO(b"abc"))
        store.ok("import", "data", area / "x.tar")
        assert sorted(os.listdir(data)) == sorted(["deep", "absolute", "n" * 200])
        assert (data / "deep/er/file").read_text() == "abc"

    @pytest.mark.parametrize("how", ["..", "symlink", "hardlink", "cut", "no tar", "file in the way"])
    def test_a_tar_that_leads_outside_changes_nothing(self, store: Store, area: Path, how: str) -> None:
        data = store.create("data")
        (data / "old").write_text("old")
        members = [tarfile.TarInfo("first")]
        if how == "..":
            members.append(tarfile.TarInfo("a/../../up"))
        elif how == "symlink":
            link = tarfile.TarInfo("way")
            link.type, link.linkname = tarfile.SYMTYPE, str(area)
            members += [link, tarfile.TarInfo("way/up")]
        elif how == "hardlink":
            link = tarfile.TarInfo("way")
            link.type, link.linkname = tarfile.LNKTYPE, "../../../../../etc/passwd"
            members.append(link)
        elif how == "file in the way":
            members += [tarfile.TarInfo("first/below")]
        with tarfile.open(area / "x.tar", "w") as tar:
            for member in members:
                tar.addfile(member)
        if how == "cut":
            (area / "x.tar").write_bytes((area / "x.tar").read_bytes()[:300])
        elif how == "no tar":
            (area / "x.tar").write_bytes(b"no tar" * 1000)
        refused(store("import", "data", area / "x.tar"), "cannot be imported")
        assert [(path.name, path.read_text()) for path in data.iterdir()] == [("old", "old")]
        assert not (area / "up").exists()

    def test_bad_calls(self, store: Store, area: Path) -> None:
        store.create("data")
        refused(store("import", "data", area / "none"), "none", "cannot be read")
        refused(store("import", "nothing", area / "none"), "no volume nothing")
        refused(store("export", "nothing", "-o", area / "x.tar"), "no volume nothing")
        refused(store("export", "data", "-o", store.data("data") / "x.tar"), "into the volume itself")
        refused(store("export", "data", "--json"), "share standard output")


class TestRename:
    def test_everything_stays_but_the_name(self, store: Store, area: Path) -> None:
        data = store.create("--label", "a=b", "data")
        (data / "file").write_text("content")
        store.ok("backup", "data", "-o", area / "x.tar")
        (before,) = json.loads(store.ok("inspect", "data"))
        assert store.ok("rename", "data", "new-name") == "new-name\n"
        (after,) = json.loads(store.ok("inspect", "new-name"))
        assert after == {**before, "Name": "new-name", "Mountpoint": str(store.data("new-name"))}
        assert (store.data("new-name") / "file").read_text() == "content"
        assert "as in its last backup" in store.ok("verify", "new-name")
        assert store("exists", "data").returncode == 1
        assert store("exists", "new-name").returncode == 0
        store.create("data")
        assert store.ok("list", "-q") == "data\nnew-name\n"
        assert store.ok("remove", "data", "new-name") == "data\nnew-name\n"
        assert store.told == []

    def test_an_image(self, root: None, store: Store) -> None:
        store.create("-o", "size=20m", "data")
        with store.volumes().used("data", "test") as path:
            (Path(path) / "file").write_text("content")
        store.ok("rename", "data", "other")
        with store.volumes().used("other", "test") as path:
            assert (Path(path) / "file").read_text() == "content"

    def test_refusals(self, store: Store) -> None:
        store.create("data")
        store.create("other")
        refused(store("rename", "data", "other"), "volume other already exists")
        refused(store("rename", "data", "a b"), "invalid volume name")
        refused(store("rename", "nothing", "new"), "no volume nothing")
        with store.volumes().used("data", "test"):
            refused(store("rename", "data", "new"), "in use")
        assert store.ok("ls", "-q") == "data\nother\n"

    def test_a_crash_before_the_record_is_settled(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.create("--label", "a=b", "-d", "union", "-o", "lower=/usr", "data")

        def die(volume: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(records, "settle", die)
            with pytest.raises(KeyboardInterrupt):
                rename(store.volumes(), "data", "other")
        (found,) = json.loads(store.ok("inspect", "other"))
        assert (found["Driver"], found["Labels"]) == ("union", {"a": "b"})
        assert store("exists", "data").returncode == 1
        store.ok("rename", "other", "third")
        assert json.loads(store.ok("inspect", "third"))[0]["Labels"] == {"a": "b"}


class TestRestoreCreate:
    def test_a_missing_volume_is_created_as_it_was(self, root: None, store: Store, area: Path) -> None:
        store.create("-o", "size=20m", "--label", "a=b", "data")
        with store.volumes().used("data", "test") as path:
            (Path(path) / "file").write_text("content")
        store.ok("backup", "data", "-o", area / "x.tar")
        refused(store("restore", "new", "-i", area / "x.tar"), "no volume new")
        assert store.ok("restore", "--create", "new", "-i", area / "x.tar") == "new\n"
        (found,) = json.loads(store.ok("inspect", "new"))
        assert (found["Options"], found["Labels"]) == ({"size": "20m"}, {"a": "b"})
        with store.volumes().used("new", "test") as path:
            assert (Path(path) / "file").read_text() == "content"
        # One that exists keeps its own.
        store.create("plain")
        store.ok("restore", "--create", "plain", "-i", area / "x.tar")
        assert json.loads(store.ok("inspect", "plain"))[0]["Options"] == {}

    def test_an_archive_does_not_choose_a_place(self, root: None, store: Store, area: Path) -> None:
        (area / "host").mkdir()
        store.create("-o", "type=none", "-o", "o=bind", "-o", f"device={area}/host", "data")
        store.ok("backup", "data", "-o", area / "x.tar")
        refused(store("restore", "--create", "new", "-i", area / "x.tar"), "storage elsewhere", "o=bind")
        store.create("-d", "union", "-o", f"lower={area}/host", "data2")
        store.ok("backup", "data2", "-o", area / "y.tar")
        refused(store("restore", "--create", "new", "-i", area / "y.tar"), "storage elsewhere", "-d union")
        assert store("exists", "new").returncode == 1

    def test_nothing_is_left_of_a_failure(self, store: Store, area: Path) -> None:
        data = store.create("data")
        (data / "file").write_bytes(os.urandom(100_000))
        store.ok("backup", "data", "-o", area / "x.tar")
        whole = (area / "x.tar").read_bytes()
        (area / "x.tar").write_bytes(whole[:50_000])
        refused(store("restore", "--create", "new", "-i", area / "x.tar"), "cut off", "nothing was restored")
        assert store("exists", "new").returncode == 1
