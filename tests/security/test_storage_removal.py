"""Removal: names exchanged by another user during it, mounts, and files protected by chattr(1)."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mount.cli_calls import REPOSITORY, refused, unionfs
from tests.mount.test_run import Containers
from tests.security.storage_actors import SECONDS, Outside, meanwhile, swap_content
from tests.support import syscalls
from tests.support.worker import Worker
from tests.volumes.conftest import Store
from tests.volumes.conftest import store as store
from unionfs.sys.trees import find_locked, remove, remove_path

pytestmark = [pytest.mark.usefixtures("as_root"), pytest.mark.watchdog(200), pytest.mark.timeout(200)]


@pytest.fixture
def locking(area: Path) -> Iterator[None]:
    """Whether the filesystem supports the flags; clears them at the end."""
    probe = area / "probe"
    probe.touch()
    if subprocess.run(["chattr", "+i", probe], capture_output=True, check=False).returncode != 0:
        pytest.skip("the filesystem has no immutable files")
    yield
    subprocess.run(["chattr", "-R", "-f", "-i", "-a", area], capture_output=True, check=False)


def chattr(flags: str, path: Path) -> None:
    subprocess.run(["chattr", flags, path], check=True)


def flags(path: Path) -> set[str]:
    """The flags of a file, as shown by lsattr(1)."""
    shown = subprocess.run(["lsattr", "-d", path], capture_output=True, text=True, check=True).stdout
    return set(shown.split()[0]) & {"i", "a"}


class TestTrees:
    def test_a_deep_tree_with_few_files_open(self, area: Path) -> None:
        top = area / "top"
        top.mkdir()
        fd = os.open(top, os.O_RDONLY)
        for number in range(2000):
            os.close(os.open(f"file{number}", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
            os.mkdir("d", dir_fd=fd)
            below = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(fd)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, before[1]))
        try:
            remove_path(str(top))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert not top.exists()

    def test_symlinks_are_removed_and_not_followed(self, area: Path, outside: Outside) -> None:
        (area / "top").mkdir()
        (area / "top/link").symlink_to(outside.path)
        (area / "link").symlink_to(outside.path)
        remove_path(str(area / "top"))
        remove_path(str(area / "link"))
        remove_path(str(area / "missing"))
        assert not os.path.lexists(area / "top")
        assert not os.path.lexists(area / "link")

    @pytest.mark.parametrize("other", [False, True], ids=["bind", "tmpfs"])
    def test_what_is_mounted_inside_stays(self, area: Path, outside: Outside, other: bool) -> None:
        inner = area / "top/a/mounted"
        inner.mkdir(parents=True)
        (area / "top/b").touch()
        if other:
            syscalls.mount("tmpfs", inner, "tmpfs", 0, "")
            (inner / "kept").touch()
        else:
            syscalls.mount(str(outside.path), inner, "", 0x1000, "")  # MS_BIND
        try:
            with pytest.raises(OSError, match="mounted") as caught:
                remove_path(str(area / "top"))
            assert caught.value.errno == errno.EXDEV
            assert caught.value.filename == b"top/a/mounted"
            assert os.listdir(area / "top") == ["a"]
            assert os.listdir(inner)
        finally:
            syscalls.umount(str(inner), 0)

    def test_an_ordinary_user_removes_what_he_closed(self, area: Path) -> None:
        home = area / "home"
        (home / "top/a/b").mkdir(parents=True)
        (home / "top/a/b/file").touch()
        (home / "top/x").mkdir()
        for path in (home, *home.rglob("*")):
            os.chown(path, 1000, 1000)
        for path, mode in {"a/b": 0o555, "a": 0o000, "x": 0o111}.items():
            (home / "top" / path).chmod(mode)
        with Worker(1000, 1000, modules=["unionfs.sys.trees"]) as user:
            user.call(remove_path, str(home / "top"))
            assert os.listdir(home) == []
            # files of others stay, and everything else is removed
            (home / "top/theirs").mkdir(parents=True)
            (home / "top/theirs/file").touch()
            (home / "top/mine").touch()
            os.chown(home / "top", 1000, 1000)
            assert user.errno(remove_path, str(home / "top")) == errno.EACCES
        assert os.listdir(home / "top") == ["theirs"]

    def test_a_user_swaps_what_root_removes(self, area: Path, outside: Outside) -> None:
        rounds = 0
        pool = area / "pool"
        pool.mkdir()
        os.chown(pool, 1000, 1000)
        fd = os.open(pool, os.O_RDONLY)
        with meanwhile(swap_content, area / "stop", pool, outside.path):
            end = time.monotonic() + SECONDS
            while time.monotonic() < end or rounds < 1000:
                rounds += 1
                for name in os.listdir(pool):
                    with suppress(OSError):
                        remove(fd, os.fsencode(name))
        os.close(fd)
        assert rounds >= 1000
        remove_path(str(pool))
        assert not pool.exists()


@pytest.mark.usefixtures("locking")
class TestLocked:
    @pytest.mark.parametrize("flag", ["+i", "+a"])
    @pytest.mark.parametrize("name", ["dir/file", "dir", "."])
    def test_a_volume_with_it_is_refused_as_a_whole(self, store: Store, flag: str, name: str) -> None:
        """The command succeeded, and the files stayed for ever."""
        data = store.create("data")
        (data / "dir").mkdir()
        (data / "dir/file").touch()
        (data / "other").touch()
        chattr(flag, data / name)
        refused(store("rm", "data"), str(data / name), "chattr -i")
        refused_prune = store("prune", "-a", "-f")
        assert refused_prune.returncode == 1
        assert str(data / name) in refused_prune.stderr
        assert sorted(os.listdir(data)) == ["dir", "other"]
        assert flags(data / name) == {flag[1]}
        assert store.ok("ls", "-q") == "data\n"
        assert store.ok("rm", "--force", "data") == "data\n"
        assert os.listdir(store.root / "volumes") == []

    def test_another_name_of_the_file_keeps_its_flag(self, store: Store, area: Path) -> None:
        data = store.create("data")
        (data / "file").touch()
        os.link(data / "file", area / "other name")
        chattr("+i", data / "file")
        store.ok("rm", "--force", "data")
        assert flags(area / "other name") == {"i"}

    def test_what_force_cannot_remove_is_code_1_and_tried_again(self, store: Store) -> None:
        data = store.create("data")
        (data / "file").touch()
        (data / "free").touch()
        chattr("+i", data / "file")
        words = ["setpriv", "--bounding-set", "-linux_immutable", "--inh-caps", "-linux_immutable", "--"]
        done = subprocess.run(
            [*words, sys.executable, "-m", "unionfs", "volume", "rm", "--force", "data"],
            env={**os.environ, "UNIONFS_ROOT": str(store.root), "PYTHONPATH": str(REPOSITORY)},
            cwd="/", capture_output=True, text=True, check=False,
        )  # fmt: skip
        refused(done, "volume data is removed", "/_data/file cannot be removed", "not permitted")
        (left,) = os.listdir(store.root / "volumes")
        assert left.startswith(".gone-data-")
        assert os.listdir(store.root / "volumes" / left / "_data") == ["file"]
        assert store.ok("ls", "-q") == ""
        store.create("another")
        assert os.listdir(store.root / "volumes") == ["another"]

    def test_only_what_is_ours_is_swept(self, store: Store) -> None:
        store.create("data")
        theirs = ".gone-z-99999999-00"
        for name, uid in {".gone-x-99999999-00": 0, ".new-y-99999999-00": 0, theirs: 1000}.items():
            (store.root / "volumes" / name / "_data").mkdir(parents=True)
            os.chown(store.root / "volumes" / name, uid, uid)
        (store.root / "volumes/.gone-link-99999999-00").symlink_to(store.root / "volumes/data")
        store.create("another")
        assert sorted(os.listdir(store.root / "volumes")) == [
            ".gone-link-99999999-00", theirs, "another", "data",
        ]  # fmt: skip
        assert (store.root / "volumes/data/_data").is_dir()

    def test_a_container_with_it_is_refused(self, box: Containers) -> None:
        box.say("--name", "web", "--", "touch", "/locked", "/free")
        upper = box.root / "containers/web/upper"
        chattr("+i", upper / "locked")
        refused(unionfs("rm", "web", env=box.environment()), str(upper / "locked"), "chattr -i")
        assert {"locked", "free"} <= set(os.listdir(upper))
        chattr("-i", upper / "locked")
        (box.root / "containers/.removed-left/x").mkdir(parents=True)
        assert unionfs("rm", "web", env=box.environment()).stdout == "web\n"
        assert os.listdir(box.root / "containers") == []

    def test_finding_follows_nothing_and_leaves_no_mount(self, area: Path, outside: Outside) -> None:
        (area / "top").mkdir()
        (area / "top/link").symlink_to(outside.path)
        chattr("+i", outside.path / "journal")
        fd = os.open(area, os.O_RDONLY)
        assert find_locked(fd, b"top") is None
        assert find_locked(fd, b"outside") == b"outside/journal"
        os.close(fd)


def test_nothing_stays_open_after_a_failure(area: Path) -> None:
    """A file that cannot be removed keeps the directories above it, but none of their fds."""
    top = area / "top"
    (top / "a/b/mounted").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", top / "a/b/mounted"], check=True)
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(OSError, match="mounted"):
                remove_path(str(top))
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        subprocess.run(["umount", top / "a/b/mounted"], check=True)
