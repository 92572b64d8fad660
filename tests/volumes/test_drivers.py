"""Drivers: mounts by mount(8), unions, and programs for storage on other machines."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.cli_calls import refused, succeed, unionfs, wait_for
from tests.volumes import trees
from tests.volumes.bricks import Brick, need
from tests.volumes.conftest import Store
from unionfs.errors import UserError
from unionfs.storage import mounts
from unionfs.storage.mounts import mount_call
from unionfs.sys.capabilities import CAP_SYS_RESOURCE, has_capability
from unionfs.sys.mountinfo import read_mountinfo

pytestmark = pytest.mark.usefixtures("as_root")


def _mounts_below(path: Path) -> list[str]:
    return [entry.mountpoint for entry in read_mountinfo() if entry.mountpoint.startswith(f"{path}/")]


class TestMounted:
    def test_a_tmpfs_in_short(self, store: Store) -> None:
        words = ("-o", "tmpfs=mode=700,uid=7", "-o", "size=2m")
        data = store.create(*words, "data")
        assert store.create(*words, "data") == data
        refused(store("create", "-o", "tmpfs", "-o", "size=3m", "data"), "already exists")
        with store.volumes().used("data", "test") as path:
            assert path == str(data)
            status = os.stat(path)
            assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, 7)
            assert os.statvfs(path).f_blocks * os.statvfs(path).f_frsize == 2 << 20
        assert os.listdir(data) == []
        long = ("-o", "type=tmpfs", "-o", "device=tmpfs", "-o", "o=mode=700,uid=7,size=2097152")
        assert store.create(*long, "data") == data

    def test_tmpfs(self, store: Store) -> None:
        data = store.create("-o", "type=tmpfs", "-o", "device=tmpfs", "-o", "o=size=2m,mode=700", "data")
        assert not os.path.ismount(data)
        volumes = store.volumes()
        first, second = "mount:1:1:/a", "a user without a process"
        volumes.attach("data", f"mount:{os.getpid()}:0:/gone")
        with volumes.used("data", "test") as path:
            assert (Path(path), os.path.ismount(path)) == (data, True)
            assert oct(os.stat(path).st_mode) == "0o40700"
            volumes.attach("data", second)
            with pytest.raises(OSError, match="No space left"):
                (data / "file").write_bytes(bytes(3 << 20))
        assert os.path.ismount(data)  # the second user remains
        refused(store("rm", "data"), "in use by a user without a process")
        volumes.detach("data", second)
        assert not os.path.ismount(data)
        assert list(data.iterdir()) == []
        assert first not in [user.text for user in volumes.users("data")]
        refused(store("restore", "data", "-i", "/dev/null"), "tmpfs")

    def test_the_mount_of_users_that_died_goes_with_the_next_call(self, store: Store) -> None:
        data = store.create("-o", "type=tmpfs", "-o", "device=tmpfs", "data")
        child = subprocess.Popen(["sleep", "100"])
        from unionfs.sys.process import start_time

        store.volumes().attach("data", f"mount:{child.pid}:{start_time(child.pid)}:/x")
        child.kill()
        child.wait()
        assert os.path.ismount(data)
        assert store.ok("rm", "data") == "data\n"
        assert not data.exists()

    def test_bind(self, store: Store, area: Path) -> None:
        (area / "host").mkdir()
        (area / "host/file").write_text("x")
        words = ("-o", "type=none", "-o", "o=bind", "-o", f"device={area}/host")
        data = store.create(*words, "data")
        with store.volumes().used("data", "test") as path:
            assert (Path(path) / "file").read_text() == "x"
            (data / "new").write_text("y")
        assert (area / "host/new").read_text() == "y"
        refused(store("clone", "data", "copy"), "cannot be cloned")
        store.ok("backup", "data", "-o", area / "b.tar")
        before = trees.value(area / "host")
        (area / "host/more").mkdir()
        (area / "host/file").write_text("changed")
        store.ok("restore", "data", "-i", area / "b.tar")
        assert trees.value(area / "host") == before
        store.ok("rm", "data")
        assert (area / "host/file").read_text() == "x"  # the bound directory stays

    def test_bind_read_only_and_bind_to_nothing(self, store: Store, area: Path) -> None:
        (area / "host").mkdir()
        store.create("-o", "type=none", "-o", "o=bind,ro", "-o", f"device={area}/host", "data")
        with store.volumes().used("data", "test") as path, pytest.raises(OSError, match="Read-only"):
            (Path(path) / "x").touch()
        store.create("-o", "type=none", "-o", "o=bind", "-o", f"device={area}/none", "other")
        with pytest.raises(UserError, match=r"other cannot be mounted: mount: .*none"):
            store.volumes().attach("other", "user")
        assert store.volumes().users("other") == []

    def test_a_device(self, store: Store, area: Path) -> None:
        image = area / "image"
        with image.open("wb") as file:
            file.truncate(16 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        loop = subprocess.run(["losetup", "--show", "-f", image], check=True, capture_output=True, text=True)
        device = loop.stdout.strip()
        try:
            store.create("-o", "type=ext4", "-o", f"device={device}", "-o", "o=noatime", "data")
            with store.volumes().used("data", "test") as path:
                (Path(path) / "file").write_text("x")
                entry = next(entry for entry in read_mountinfo() if entry.mountpoint == path)
                assert (entry.fstype, entry.source) == ("ext4", device)
                assert "noatime" in entry.options
            with store.volumes().used("data", "test") as path:
                assert (Path(path) / "file").read_text() == "x"
            store.ok("backup", "data", "-o", area / "b.tar")
            store.ok("restore", "data", "-i", area / "b.tar")
            store.ok("rm", "data")
        finally:
            subprocess.run(["losetup", "-d", device], check=True)

    @pytest.mark.parametrize(
        ("words", "parts"),
        [
            (["device=/x"], ["type is missing"]),
            (["type=nfs"], ["device is missing"]),
            (["type=none", "device=/x"], ["o=bind"]),
            (["type=none", "o=bind", "device=x"], ["relative"]),
            (["type=ext4", "device=/x", "size=1g"], ["size and type exclude"]),
            (["fs=xfs"], ["needs the option size"]),
            (["size=lots"], ["invalid size 'lots'"]),
            (["size=-5"], ["invalid size '-5'"]),
            (["size=0"], ["size=0"]),
            (["size=1k"], ["too small for ext4"]),
            (["size=100m", "fs=xfs"], ["too small for xfs"]),
            (["size=1g", "fs=ntfs"], ["ext4 or xfs"]),
            (["type=--bind", "device=/x"], ["not a filesystem type"]),
        ],
    )
    def test_options_that_make_no_sense(self, store: Store, words: list[str], parts: list[str]) -> None:
        arguments = [text for word in words for text in ("-o", word)]
        refused(store("create", *arguments, "data"), *parts)
        assert store.ok("ls", "-q") == ""


class TestCommandLines:
    """Network filesystems: this kernel has no client, so only the call of mount(8) is compared."""

    @pytest.fixture(autouse=True)
    def _helpers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mounts, "program_path", lambda name: f"/sbin/{name}")

    @pytest.mark.parametrize(
        ("given", "command", "environment"),
        [
            (("nfs", ":/path", "addr=10.0.0.5,rw"), "-t nfs -o rw -- 10.0.0.5:/path /t", {}),
            (("nfs", ":/path", "addr=fe80::1,nfsvers=4"), "-t nfs -o nfsvers=4 -- [fe80::1]:/path /t", {}),
            (("nfs4", ":/", "addr=host"), "-t nfs4 -- host:/ /t", {}),
            (("nfs", "host:/path", "rw,soft"), "-t nfs -o rw,soft -- host:/path /t", {}),
            (
                ("cifs", "//host/share", "username=u,password=s3cret,file_mode=0777"),
                "-t cifs -o username=u,file_mode=0777 -- //host/share /t",
                {"PASSWD": "s3cret"},
            ),
            (("tmpfs", "tmpfs", "size=100m,,uid=1000"), "-t tmpfs -o size=100m,uid=1000 -- tmpfs /t", {}),
            (("none", "/src", "bind"), "-t none -o bind -- /src /t", {}),
            (("ext4", "/dev/sdz1", ""), "-t ext4 -- /dev/sdz1 /t", {}),
            (("btrfs", "-weird", ""), "-t btrfs -- -weird /t", {}),
        ],
    )
    def test_as_docker_s_words_mean_it(
        self, given: tuple[str, str, str], command: str, environment: dict[str, str]
    ) -> None:
        call = mount_call(*given, "/t")
        assert " ".join(call.command) == f"mount {command}"
        assert call.environment == environment

    def test_an_nfs_device_without_a_server(self) -> None:
        with pytest.raises(UserError, match="addr=SERVER"):
            mount_call("nfs", ":/path", "rw", "/t")


@pytest.mark.parametrize(("kind", "package"), [("nfs", "nfs-common"), ("cifs", "cifs-utils")])
def test_a_missing_helper_gives_the_package(
    store: Store, kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create("-o", f"type={kind}", "-o", "device=//host/path", "-o", "o=addr=127.0.0.1", "data")
    monkeypatch.setattr(mounts, "program_path", lambda name: None)
    with pytest.raises(UserError, match=f"install the package {package}"):
        store.volumes().attach("data", "user")
    assert store.volumes().users("data") == []


def _fill_up(path: Path) -> None:
    with path.open("wb") as file:
        for _ in range(400):
            file.write(bytes(1 << 20))


class TestSize:
    @pytest.mark.parametrize(("fs", "size", "more"), [("ext4", "24m", "48m"), ("xfs", "320m", "400m")])
    def test_it_is_enforced_and_can_grow(self, store: Store, fs: str, size: str, more: str) -> None:
        data = store.create("-o", f"size={size}", "-o", f"fs={fs}", "data")
        image = data.parent / "image"
        assert image.stat().st_blocks * 512 < image.stat().st_size / 2  # sparse
        with store.volumes().used("data", "test") as path:
            assert os.listdir(path) == []
            with pytest.raises(OSError, match="No space left"):
                _fill_up(Path(path) / "fill")
            held = (Path(path) / "fill").stat().st_size
            assert held < image.stat().st_size
            if fs == "xfs":  # online; ext4 requires CAP_SYS_RESOURCE, which not every root has
                assert store.ok("resize", "data", more) == "data\n"
        if fs == "ext4":
            assert store.ok("resize", "data", more) == "data\n"
        with store.volumes().used("data", "test") as path:
            with (Path(path) / "fill").open("ab") as file:
                file.write(bytes(10 << 20))
            assert (Path(path) / "fill").stat().st_size == held + (10 << 20)
            assert "lost+found" not in os.listdir(path)
        (found,) = json.loads(store.ok("inspect", "data"))
        assert found["Options"] == {"size": more, "fs": fs}
        assert not os.path.ismount(data)

    def test_shrinking(self, store: Store) -> None:
        store.create("-o", "size=64m", "data")
        with store.volumes().used("data", "test") as path:
            (Path(path) / "file").write_bytes(bytes(range(256)) * 4096)
            refused(store("resize", "data", "32m"), "cannot shrink while it is in use")
            if not has_capability(CAP_SYS_RESOURCE):
                refused(store("resize", "data", "80m"), "CAP_SYS_RESOURCE", "stop whatever uses it first")
                assert (store.data("data").parent / "image").stat().st_size == 64 << 20
        store.ok("resize", "data", "32m")
        with store.volumes().used("data", "test") as path:
            assert (Path(path) / "file").read_bytes() == bytes(range(256)) * 4096
            assert os.statvfs(path).f_blocks * os.statvfs(path).f_frsize < 32 << 20
            (Path(path) / "big").write_bytes(os.urandom(20 << 20))
        refused(store("resize", "data", "10m"), "cannot be resized", "does not fit into 10.49MB")
        with store.volumes().used("data", "test") as path:
            assert (Path(path) / "big").stat().st_size == 20 << 20
        store.create("plain")
        refused(store("resize", "plain", "32m"), "has no size")
        refused(store("resize", "data", "much"), "invalid size 'much'")
        refused(store("resize", "none", "1g"), "no volume none")

    def test_an_image_that_is_still_mounted_elsewhere(self, store: Store, area: Path) -> None:
        """As after killing a union whose files are still open."""
        store.create("-o", "size=16m", "data")
        (area / "elsewhere").mkdir()
        volumes = store.volumes()
        with volumes.used("data", "test") as path:
            (Path(path) / "file").write_text("x")
            subprocess.run(["mount", "--bind", path, area / "elsewhere"], check=True)
        try:
            assert not os.path.ismount(store.data("data"))
            refused(store("resize", "data", "32m"), "still mounted in another mount namespace")
            with volumes.used("data", "test") as path:
                # One filesystem, not two on one image
                assert os.stat(path).st_dev == (area / "elsewhere").stat().st_dev
                (Path(path) / "more").write_text("y")
                assert (area / "elsewhere/more").read_text() == "y"
        finally:
            subprocess.run(["umount", area / "elsewhere"], check=True)
        store.ok("resize", "data", "32m")

    def test_a_volume_that_was_unmounted_by_hand_is_mounted_again(self, store: Store) -> None:
        data = store.create("-o", "size=8m", "data")
        with store.volumes().used("data", "test"):
            subprocess.run(["umount", data], check=True)
            with store.volumes().used("data", "other"):
                assert os.path.ismount(data)

    def test_backup_restore_and_removal(self, store: Store, area: Path) -> None:
        store.create("-o", "size=100m", "data")
        with store.volumes().used("data", "test") as path:
            trees.fill(Path(path))
            before = trees.value(Path(path))
        store.ok("backup", "data", "-o", area / "b.tar.zst")
        with store.volumes().used("data", "test") as path:
            (Path(path) / "later").touch()
        store.ok("restore", "data", "-i", area / "b.tar.zst")
        with store.volumes().used("data", "test") as path:
            assert trees.value(Path(path)) == before

        def loops() -> str:
            return subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True).stdout

        assert wait_for(lambda: str(store.root) not in loops())  # the kernel releases them a little later
        store.ok("rm", "data")


class TestUnion:
    @pytest.fixture
    def lowers(self, area: Path) -> str:
        for name in ("top", "bottom"):
            (area / name / "dir").mkdir(parents=True)
            (area / name / "dir" / name).write_text(name)
        (area / "top/both").write_text("top")
        (area / "bottom/both").write_text("bottom")
        return f"{area}/top:{area}/bottom"

    def test_a_view_each(self, store: Store, area: Path, lowers: str) -> None:
        store.ok("create", "-d", "union", "-o", f"lower={lowers}", "data")
        volumes = store.volumes()
        try:
            one, two = volumes.attach("data", "one"), volumes.attach("data", "two")
            assert one != two
            (Path(one) / "both").write_text("changed")
            (Path(one) / "dir/bottom").unlink()
            assert (Path(two) / "both").read_text() == "top"
            assert sorted(os.listdir(Path(two) / "dir")) == ["bottom", "top"]
            assert volumes.attach("data", "one") == one
            refused(store("rm", "data"), "in use by one, two")
            volumes.detach("data", "one")
            again = volumes.attach("data", "one")
            assert (Path(again) / "both").read_text() == "top"  # its changes were removed with it
        finally:
            volumes.detach("data", "one")
            volumes.detach("data", "two")
        assert _mounts_below(store.root) == []
        store.ok("backup", "data", "-o", area / "b.tar")
        assert "./dir/bottom" in trees.tar("tf", area / "b.tar").split()
        refused(store("restore", "data", "-i", area / "b.tar"), "discarded afterwards")
        refused(store("clone", "data", "copy"), "no content of its own")
        assert store.ok("rm", "data") == "data\n"
        assert (area / "bottom/dir/bottom").read_text() == "bottom"

    def test_one_view_for_all(self, store: Store, area: Path, lowers: str) -> None:
        store.ok("create", "-d", "union", "-o", f"lower={lowers}", "-o", "shared", "data")
        volumes = store.volumes()
        with volumes.used("data", "test") as one, volumes.used("data", "other") as two:
            assert one == two == str(store.data("data"))
            (Path(one) / "both").write_text("changed")
            (Path(one) / "dir/bottom").unlink()
            (Path(one) / "new").write_text("new")
        assert _mounts_below(store.root) == []
        with volumes.used("data", "test") as path:
            before = trees.value(Path(path))
            assert (Path(path) / "both").read_text() == "changed"
        store.ok("backup", "data", "-o", area / "b.tar")
        with volumes.used("data", "test") as path:
            subprocess.run(["rm", "-r", f"{path}/dir", f"{path}/new"], check=True)
            (Path(path) / "both").write_text("worse")
        store.ok("restore", "data", "-i", area / "b.tar")
        with volumes.used("data", "test") as path:
            assert trees.value(Path(path)) == before
        store.ok("clone", "data", "copy")
        with volumes.used("copy", "test") as path:
            assert trees.value(Path(path)) == before
        assert sorted(os.listdir(area / "bottom/dir")) == ["bottom"]
        assert _mounts_below(store.root) == []
        store.ok("rm", "data", "copy")

    def test_its_size_and_the_space_it_takes(self, store: Store, lowers: str) -> None:
        store.ok("create", "-d", "union", "-o", f"lower={lowers}", "-o", "shared", "data")
        with store.volumes().used("data", "test") as path:
            before = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
            (Path(path) / "new").write_bytes(b"x" * 10_000)
        (listed,) = json.loads(store.ok("ls", "--size", "--json"))
        assert listed["Size"] == before + 10_000
        told = succeed(unionfs("system", "df", "--json", env={"UNIONFS_ROOT": str(store.root)}))
        (used,) = json.loads(told)["volumes"]
        assert used["size"] == 10_000

    def test_it_is_unmounted_without_a_program_of_its_own(
        self, store: Store, lowers: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A child that cleans up for another user may not be able to read this program."""
        from unionfs.daemon import live

        store.ok("create", "-d", "union", "-o", f"lower={lowers}", "-o", "shared", "data")
        volumes = store.volumes()
        path = volumes.attach("data", "test")
        daemon = next(entry for entry in live.entries() if entry.settings.mountpoint == path)

        def unavailable(*_: object, **__: object) -> None:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(subprocess, "run", unavailable)
        monkeypatch.setattr(subprocess, "Popen", unavailable)
        volumes.detach("data", "test")
        assert not daemon.is_alive()
        assert _mounts_below(store.root) == []

    def test_who_keeps_it_busy_is_named(self, store: Store, lowers: str) -> None:
        store.ok("create", "-d", "union", "-o", f"lower={lowers}", "-o", "shared", "data")
        volumes = store.volumes()
        path = volumes.attach("data", "test")
        with subprocess.Popen(["sleep", "100"], cwd=path) as user:
            with pytest.raises(UserError, match=rf"busy: used by sleep \(pid {user.pid}, cwd\)"):
                volumes.detach("data", "test")
            user.kill()
        volumes.detach("data", "test")
        assert volumes.users("data") == []

    def test_a_view_whose_daemon_died_comes_again(self, store: Store, lowers: str) -> None:
        from unionfs.daemon import live

        store.ok("create", "-d", "union", "-o", f"lower={lowers}", "-o", "shared=true", "data")
        volumes = store.volumes()
        with volumes.used("data", "test") as path:
            (Path(path) / "new").write_text("new")
            daemon = next(entry for entry in live.entries() if entry.settings.mountpoint == path)
            os.kill(daemon.pid, 9)
            assert wait_for(lambda: not daemon.is_alive())
        with volumes.used("data", "test") as path:
            assert (Path(path) / "new").read_text() == "new"

    def test_bad_options(self, store: Store, area: Path) -> None:
        refused(store("create", "-d", "union", "data"), "lower is missing")
        refused(store("create", "-d", "union", "-o", "lower=relative", "data"), "relative")
        refused(store("create", "-d", "union", "-o", f"lower={area}/none", "data"), "not a directory")
        refused(
            store("create", "-d", "union", "-o", f"lower={area}", "-o", "shared=perhaps", "data"),
            "shared=perhaps",
        )
        refused(
            store("create", "-d", "union", "-o", f"lower={area}", "-o", "upper=/x", "data"), "option upper"
        )


def _tutorial(store: Store, area: Path, *options: str, simple: bool = False, kept: bool = True) -> None:
    """Docker's tutorial: fill a volume, back it up, remove it, create it again, restore, compare."""
    store.ok("create", *options, "data")
    with store.volumes().used("data", "test") as path:
        root = Path(path)
        (root / "dir").mkdir()
        (root / "dir/file").write_text("content")
        (root / "large").write_bytes(os.urandom(3_000_000))
        os.utime(root / "dir/file", (1_000_000_000, 1_000_000_000))
        if not simple:
            os.symlink("dir/file", root / "link")
            os.chmod(root / "large", 0o640)
    store.ok("backup", "data", "-o", area / "backup.tar.gz")
    with store.volumes().used("data", "test") as path:
        before = _seen(Path(path))
        subprocess.run(["sh", "-c", f"rm -rf {path}/*"], check=True)
        (Path(path) / "later").write_text("x")
    store.ok("rm", "data")
    assert _mounts_below(store.root) == []
    store.ok("create", *options, "data")
    if kept:
        with store.volumes().used("data", "test") as path:
            assert os.listdir(path) == ["later"]  # its storage is elsewhere
    store.ok("restore", "data", "-i", area / "backup.tar.gz")
    with store.volumes().used("data", "test") as path:
        assert _seen(Path(path)) == before
        assert [name for name in os.listdir(path) if name.startswith(".")] == []
    store.ok("rm", "data")
    assert _mounts_below(store.root) == []


def _seen(root: Path) -> dict[str, tuple[str, bytes, int]]:
    return {
        str(path.relative_to(root)): (
            oct(path.lstat().st_mode),
            b"" if path.is_dir() else os.readlink(path).encode() if path.is_symlink() else path.read_bytes(),
            0 if path.is_dir() or path.is_symlink() else int(path.lstat().st_mtime),
        )
        for path in root.rglob("*")
    }


def _sshfs(area: Path) -> tuple[str, ...]:
    """The options of a volume in `far`, whose server runs here without ssh."""
    script = area / "ssh"
    script.write_text("#!/bin/sh\nexec /usr/lib/openssh/sftp-server\n")
    script.chmod(0o755)
    return "-d", "sshfs", "-o", f"sshcmd=nobody@host:{area}/far", "-o", f"ssh_command={script}"


def _outside(area: Path) -> Path:
    """A file with another mtime, as the target of a volume's symlinks."""
    path = area / "outside"
    path.write_text("x")
    os.utime(path, (1_000_000_000, 1_000_000_000))
    return path


class TestElsewhere:
    def test_local(self, store: Store, area: Path) -> None:
        _tutorial(store, area, kept=False)

    def test_bind(self, store: Store, area: Path) -> None:
        (area / "host").mkdir()
        _tutorial(store, area, "-o", "type=none", "-o", "o=bind", "-o", f"device={area}/host")

    def test_sshfs(self, store: Store, area: Path) -> None:
        need("sshfs", "sftp-server")
        (area / "far").mkdir()
        outside = _outside(area)
        before = outside.stat()
        words = _sshfs(area)
        _tutorial(store, area, *words)
        assert sorted(os.listdir(area / "far")) == ["dir", "large", "link"]
        # SFTP changes a symlink's target
        os.symlink(outside, store.create("links") / "out")
        os.chown(store.data("links") / "out", 1, 1, follow_symlinks=False)
        store.ok("backup", "links", "-o", area / "links.tar")
        store.ok("create", *words, "data")
        store.ok("restore", "data", "-i", area / "links.tar")
        assert os.readlink(area / "far/out") == str(outside)
        after = outside.stat()
        assert (after.st_mtime, after.st_uid, after.st_gid) == (before.st_mtime, before.st_uid, before.st_gid)
        usage = subprocess.run(["sshfs", "-h"], capture_output=True, text=True)
        if "no_contain_symlinks" in usage.stdout + usage.stderr:
            done = store("backup", "data", "-o", area / "b.tar")
            refused(done, "out cannot be read", "no_contain_symlinks")
            store.ok("rm", "data")
            store.ok("create", *words, "-o", "o=no_contain_symlinks", "data")
        store.ok("backup", "data", "-o", area / "b.tar")
        store.ok("rm", "data")
        refused(store("create", "-d", "sshfs", "data"), "sshcmd is missing")
        refused(store("create", "-d", "sshfs", "-o", "sshcmd=host", "data"), "has no path")
        refused(store("create", "-d", "sshfs", "-o", "sshcmd=-oProxyCommand=x:y", "data"), "sshcmd=-o")
        store.ok(
            "create", "-d", "sshfs", "-o", "sshcmd=nobody@host:/none", "-o", "ssh_command=/bin/false", "bad"
        )
        with pytest.raises(UserError, match="bad cannot be mounted: sshfs: "):
            store.volumes().attach("bad", "user")

    def test_sshfs_is_filled(self, store: Store, area: Path) -> None:
        """With the union's content at the target. It has no xattrs; targets of symlinks are unchanged."""
        need("sshfs", "sftp-server")
        for name in ("far", "lower/x/dir", "upper", "work", "merged"):
            (area / name).mkdir(parents=True)
        outside = _outside(area)
        before = outside.stat()
        (area / "lower/x/dir/file").write_text("content")
        os.utime(area / "lower/x/dir/file", (1_000_000_001, 1_000_000_001))
        os.symlink(outside, area / "lower/x/out")
        os.chown(area / "lower/x/out", 1, 1, follow_symlinks=False)
        store.ok("create", *_sshfs(area), "data")
        words = ["-l", area / "lower", "-u", area / "upper", "-w", area / "work", "-v", "data:/x"]
        succeed(unionfs("mount", *words, area / "merged", env={"UNIONFS_ROOT": str(store.root)}))
        try:
            assert (area / "merged/x/dir/file").read_text() == "content"
            assert (area / "merged/x/dir/file").stat().st_mtime == 1_000_000_001
        finally:
            succeed(unionfs("umount", area / "merged", env={"UNIONFS_ROOT": str(store.root)}))
        after = outside.stat()
        assert (after.st_mtime, after.st_uid, after.st_gid) == (before.st_mtime, before.st_uid, before.st_gid)
        assert sorted(os.listdir(area / "far")) == ["dir", "out"]
        assert os.readlink(area / "far/out") == str(outside)

    def test_rclone(self, store: Store, area: Path) -> None:
        need("rclone")
        (area / "far").mkdir()
        (area / "rclone.conf").write_text(f"[far]\ntype = alias\nremote = {area}/far\n")
        words = (
            "-d",
            "rclone",
            "-o",
            "remote=far:",
            "-o",
            f"config={area}/rclone.conf",
            "-o",
            "o=dir-cache-time=1s",
        )
        _tutorial(store, area, *words, simple=True)
        assert (area / "far/dir/file").read_text() == "content"
        refused(store("create", "-d", "rclone", "-o", "remote=far:", "-o", "o=Bad Flag", "data"), "Bad Flag")
        # unsupported entries are refused, and the old content stays
        (store.create("links") / "link").symlink_to("x")
        store.ok("backup", "links", "-o", area / "links.tar")
        store.ok("create", *words, "data")
        refused(store("restore", "data", "-i", area / "links.tar"), "link cannot be made here")
        assert sorted(os.listdir(area / "far")) == ["dir", "large"]

    def test_glusterfs(self, store: Store, area: Path, brick: Brick) -> None:
        _tutorial(store, area, "-d", "glusterfs", "-o", "servers=127.0.0.1", "-o", f"volname={brick.name}")
        store.ok("create", "-d", "glusterfs", "-o", "servers=127.0.0.1", "-o", "volname=none", "bad")
        with pytest.raises(UserError, match="bad cannot be mounted"):
            store.volumes().attach("bad", "user")

    def test_a_missing_program_gives_the_package(self, store: Store, area: Path) -> None:
        for name in ("sshfs", "rclone", "glusterfs"):
            words = {
                "sshfs": ["sshcmd=h:/"],
                "rclone": ["remote=x"],
                "glusterfs": ["servers=h", "volname=v"],
            }[name]
            code = (
                "import sys; from unionfs.storage import mounts; mounts.program_path = lambda name: None\n"
                "from unionfs.cli.common import run; from unionfs.cli.main import cli\n"
                "sys.exit(run(cli, sys.argv[1:], 'unionfs'))"
            )
            arguments = [text for word in words for text in ("-o", word)]
            done = subprocess.run(
                [sys.executable, "-c", code, "volume", "create", "-d", name, *arguments, "data"],
                env={**os.environ, "UNIONFS_ROOT": str(store.root)},
                capture_output=True,
                text=True,
                check=False,
            )
            refused(done, "is not installed; install the package")


def test_a_driver_of_another_package(store: Store, area: Path) -> None:
    package = area / "site"
    (package / "mine-1.0.dist-info").mkdir(parents=True)
    (package / "mine-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    points = "[unionfs.volume_drivers]\nmine = mine:Mine\nbroken = mine:Nothing\nwrong = mine:Wrong\n"
    (package / "mine-1.0.dist-info/entry_points.txt").write_text(points)
    (package / "mine.py").write_text(
        "import os\nfrom unionfs.storage.drivers import Driver\n"
        "class Wrong: pass\n"
        "class Mine(Driver):\n"
        "    name = 'mine'\n    known_options = {'colour': 'any'}\n"
        "    def create(self, volume): os.mkdir(volume.directory + '/_data')\n"
        "    def mount(self, volume, user): return volume.directory + '/_data'\n"
        "    def unmount(self, volume, user): pass\n"
    )
    store.env = {"PYTHONPATH": f"{package}:{Path(__file__).resolve().parents[2]}"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "UNIONFS_ROOT": str(store.root), **store.env}
        return subprocess.run(
            [sys.executable, "-m", "unionfs", "volume", *words],
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )

    assert run("create", "-d", "mine", "-o", "colour=blue", "data").stdout == "data\n"
    refused(run("create", "-d", "mine", "-o", "color=blue", "data2"), "option color", "colour")
    refused(run("create", "-d", "broken", "data2"), "cannot be loaded")
    refused(run("create", "-d", "wrong", "data2"), "is not a unionfs.storage.drivers.Driver")
    assert run("backup", "data", "-o", str(area / "b.tar")).returncode == 0
    refused(run("restore", "data", "-i", str(area / "b.tar")), "does not support replacing")
    # without the package
    refused(store("rm", "data", env={"PYTHONPATH": str(Path(__file__).resolve().parents[2])}), "driver mine")
    assert (
        store.ok("rm", "-f", "data", env={"PYTHONPATH": str(Path(__file__).resolve().parents[2])}) == "data\n"
    )


def test_a_volume_that_is_mounted_elsewhere_is_not_removed(root: None, store: Store, area: Path) -> None:
    """As after killing a daemon together with its guardian."""
    data = store.create("data")
    (data / "f").write_text("kept")
    place = area / "bound"
    place.mkdir()
    subprocess.run(["mount", "--bind", data, place], check=True)
    refused(store("rm", "-f", "data"), "volume data cannot be removed", f"still mounted at {place}")
    assert (place / "f").read_text() == "kept"
    subprocess.run(["umount", place], check=True)
    store.ok("rm", "data")


def test_what_is_mounted_below_a_volume_is_never_removed(
    store: Store, area: Path, filesystem: Callable[..., Path]
) -> None:
    data = store.create("data")
    (area / "precious").mkdir()
    (area / "precious/file").write_text("x")
    (data / "mnt").mkdir()
    subprocess.run(["mount", "--bind", area / "precious", data / "mnt"], check=True)
    refused(store("rm", "data"), "is still mounted")
    assert (area / "precious/file").read_text() == "x"
