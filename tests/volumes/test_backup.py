"""Backups contain everything, GNU tar reads them, and a restore reproduces the original."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import subprocess
import sys
import sysconfig
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.cli_calls import REPOSITORY, UNIONFS, refused, wait_for
from tests.volumes import trees
from tests.volumes.conftest import Store
from unionfs.storage.archive.walk import data_segments

pytestmark = pytest.mark.usefixtures("as_root")


def _tree(store: Store, name: str = "data", *options: str) -> Path:
    data = store.create(*options, name)
    trees.fill(data)
    return data


class TestEverything:
    @pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.zst"])
    def test_a_volume_comes_back_as_it_was(self, store: Store, area: Path, ending: str) -> None:
        data = _tree(store)
        before = trees.value(data)
        archive = area / f"backup{ending}"
        assert store.ok("backup", "data", "-o", archive) == f"{archive}\n"
        assert trees.value(data) == before  # access times may change, but nothing else
        store.ok("rm", "data")
        data = store.create("data")
        assert store.ok("restore", "data", "-i", archive) == "data\n"
        assert trees.value(data) == before
        assert "as in its last backup" in store.ok("verify", "data")

    def test_gnu_tar_reads_it_whole(self, store: Store, area: Path) -> None:
        data = _tree(store)
        os.utime(data / "size 4096", ns=(0, 10**18))  # GNU tar warns about times before 1970
        os.utime(data / "empty", ns=(0, 10**18))
        before = trees.value(data)
        store.ok("backup", "data", "-o", area / "b.tar.gz")
        names = trees.tar("tzf", area / "b.tar.gz").splitlines()
        assert names[0] == ".unionfs-backup/info.json"
        assert names[-1] == ".unionfs-backup/manifest"
        assert "./dir/inner/second name" in names
        assert len(names) == len(before) + 2
        out = area / "out"
        out.mkdir()
        words = ("--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner", "-xzpf")
        trees.tar("-C", out, *words, area / "b.tar.gz", "--exclude=.unionfs-backup")
        after = trees.value(out)
        # GNU tar does not set xattrs of symlinks and pipes.
        for path in (b"absolute", b"pipe"):
            before[path]["xattrs"] = after[path]["xattrs"] = {}
        assert after == before

    def test_through_a_pipe(self, store: Store) -> None:
        data = _tree(store)
        before = trees.value(data)
        store.create("copy")
        environment = {**os.environ, "UNIONFS_ROOT": str(store.root)}
        first = subprocess.Popen(
            [*UNIONFS, "volume", "backup", "data", "-o", "-"], stdout=subprocess.PIPE, env=environment
        )
        second = subprocess.run(
            [*UNIONFS, "volume", "restore", "copy"],
            stdin=first.stdout,
            env=environment,
            capture_output=True,
            check=False,
        )
        assert first.stdout is not None
        first.stdout.close()
        assert (first.wait(), second.returncode) == (0, 0), second.stderr
        assert trees.value(store.data("copy")) == before

    def test_sockets_and_mountpoints_are_left_out_with_a_note(self, store: Store, area: Path) -> None:
        data = store.create("data")
        trees.add_socket(data / "socket")
        (data / "mnt").mkdir()
        (data / "file").touch()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", data / "mnt"], check=True)
        done = store("backup", "data", "-o", area / "b.tar")
        assert done.returncode == 0
        assert "socket is a socket" in done.stderr
        assert "mnt is a mountpoint" in done.stderr
        assert trees.tar("tf", area / "b.tar").split()[1:-1] == ["./", "./file"]

    def test_tarfile_of_python_reads_it(self, store: Store, area: Path) -> None:
        import tarfile

        data = _tree(store)
        store.ok("backup", "data", "-o", area / "b.tar")
        with tarfile.open(area / "b.tar") as read:
            found = {os.fsencode(member.name).removeprefix(b"./"): member for member in read.getmembers()}
        for path, entry in trees.value(data).items():
            if path:
                assert found[path].uid == entry["owner"][0]
                assert oct(found[path].mode) == oct(int(entry["mode"], 8) & 0o7777)

    def test_the_default_name_and_quiet_streams(self, store: Store, area: Path) -> None:
        store.create("data")
        done = store("backup", "data", cwd=area)
        name = done.stdout.strip()
        assert name.startswith("data-")
        assert name.endswith(".tar.zst")
        assert (area / name).stat().st_mode & 0o777 == 0o600  # private content of the volume stays private
        assert "\r" not in done.stderr  # progress is for terminals
        assert "\x1b" not in done.stderr

    def test_memory_does_not_grow_with_the_volume(self, store: Store, area: Path) -> None:
        data = store.create("data")
        for number in range(3):
            with (data / f"file {number}").open("wb") as file:
                for _ in range(100):
                    file.write(os.urandom(1 << 20))
        environment = {**os.environ, "UNIONFS_ROOT": str(store.root)}
        for words in (["backup", "data", "-o", area / "b.tar"], ["restore", "data", "-i", area / "b.tar"]):
            code = (
                "import resource, subprocess, sys\n"
                "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, "
                "stderr=subprocess.DEVNULL)\n"
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
            )
            done = subprocess.run(
                [sys.executable, "-c", code, *UNIONFS, "volume", *map(str, words)],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            assert int(done.stdout) < 150_000, words  # KiB, of which the interpreter has some 40,000


class TestClosedStreams:
    """A closed stream is neither read as an archive nor used as the place for one."""

    def test_a_backup_does_not_go_to_a_closed_standard_output(self, store: Store) -> None:
        store.create("data")
        done = store("backup", "data", "-o", "-", preexec_fn=lambda: os.close(1))
        refused(done, "standard output is closed")

    def test_nothing_is_restored_from_a_closed_standard_input(self, store: Store) -> None:
        data = store.create("data")
        (data / "file").write_text("content")
        refused(store("restore", "data", preexec_fn=lambda: os.close(0)), "standard input")
        assert (data / "file").read_text() == "content"

    def test_a_closed_standard_input_says_no_to_prune(self, store: Store) -> None:
        store.ok("create")
        done = store("prune", preexec_fn=lambda: os.close(0))
        assert (done.returncode, "nothing was removed" in done.stderr) == (1, True), done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("target", ["", "new/"])
def test_an_archive_needs_a_name(store: Store, area: Path, target: str) -> None:
    store.create("data")
    place = f"{area}/{target}" if target else ""
    refused(store("backup", "data", "-o", place), "is not a file name")
    assert not (area / "new").exists()


def test_a_volume_whose_directory_was_removed_is_restored(store: Store, area: Path) -> None:
    data = _tree(store)
    before = trees.value(data)
    store.ok("backup", "data", "-o", area / "b.tar")
    data.rename(area / "gone")
    refused(store("backup", "data", "-o", area / "c.tar"), "restore it from a backup")
    (area / "cut.tar").write_bytes((area / "b.tar").read_bytes()[:-4096])
    refused(store("restore", "data", "-i", area / "cut.tar"), "cannot be trusted")
    assert not data.exists()
    store.ok("restore", "data", "-i", area / "b.tar")
    assert trees.value(data) == before


@contextmanager
def _meanwhile(write: Callable[[threading.Event], None]) -> Iterator[None]:
    """Let a thread change files until the context ends."""
    stop = threading.Event()
    thread = threading.Thread(target=write, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class TestConsistency:
    def test_a_file_that_changes_all_the_time_is_said(self, store: Store, area: Path) -> None:
        data = store.create("data")
        (data / "log").write_bytes(bytes(40 << 20))
        (data / "quiet").write_text("x")

        def write(stop: threading.Event) -> None:
            with (data / "log").open("r+b") as file:
                turn = 0
                while not stop.is_set():
                    os.pwrite(file.fileno(), b"%d" % turn, turn * 4096 % (40 << 20))
                    turn += 1

        with _meanwhile(write):
            done = store("backup", "data", "-o", area / "b.tar")
        assert done.returncode == 0
        assert "log changed each time it was read" in done.stderr
        assert "complete and matches" in store.ok("verify", area / "b.tar")
        store.create("copy")
        store.ok("restore", "copy", "-i", area / "b.tar")
        assert (store.data("copy") / "log").stat().st_size == 40 << 20
        assert (store.data("copy") / "quiet").read_text() == "x"

    def test_a_file_that_grows_or_shrinks_meanwhile(self, store: Store, area: Path) -> None:
        data = store.create("data")
        (data / "log").write_bytes(bytes(20 << 20))

        def write(stop: threading.Event) -> None:
            while not stop.is_set():
                with (data / "log").open("ab") as file:
                    file.write(b"more" * 5000)
                os.truncate(data / "log", 15 << 20)
                os.truncate(data / "log", 20 << 20)

        with _meanwhile(write):
            done = store("backup", "data", "-o", area / "b.tar")
            assert done.returncode == 0, done.stderr
        assert "complete and matches" in store.ok("verify", area / "b.tar")
        trees.tar("tf", area / "b.tar")

    def test_a_file_that_is_cut_between_two_looks(self, area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = area / "log"
        path.write_bytes(bytes(1 << 20))
        lseek = os.lseek

        def cut(fd: int, offset: int, whence: int) -> int:
            if whence == os.SEEK_HOLE:
                os.truncate(path, 0)
            return lseek(fd, offset, whence)

        monkeypatch.setattr(os, "lseek", cut)
        with path.open("rb") as file:
            assert data_segments(file.fileno(), 1 << 20) == [(1 << 20, 0)]

    def test_a_volume_of_its_own_is_frozen_while_it_is_used(self, store: Store, area: Path) -> None:
        store.create("-o", "size=64m", "data")
        with store.volumes().used("data", "test") as path:
            for number in range(50):
                (Path(path) / f"file {number}").write_bytes(os.urandom(100_000))
            turns: list[int] = []

            def write(stop: threading.Event) -> None:
                while not stop.is_set():
                    # Two files that must be equal: a backup between the two steps would show a difference.
                    for name in ("file 0", "file 49"):
                        (Path(path) / name).write_text(str(len(turns)))
                    turns.append(1)

            with _meanwhile(write):
                done = store("backup", "data", "-o", area / "b.tar")
            assert done.returncode == 0, done.stderr
            assert "was frozen meanwhile" in done.stderr
            assert "changed" not in done.stderr
            before = len(turns)
            (Path(path) / "thawed").touch()  # would hang if it were still frozen
        assert before > 0

    def test_a_killed_backup_leaves_nothing_frozen(self, store: Store, area: Path) -> None:
        store.create("-o", "size=200m", "data")
        with store.volumes().used("data", "test") as path:
            for number in range(10):
                (Path(path) / f"file {number}").write_bytes(os.urandom(10_000_000))
            child = subprocess.Popen(
                [*UNIONFS, "volume", "backup", "data", "--compress", "gzip", "-o", area / "b"],
                env={**os.environ, "UNIONFS_ROOT": str(store.root)},
                stderr=subprocess.DEVNULL,
            )
            # It writes once it has frozen; a check before that would itself freeze.
            assert wait_for(lambda: _written(child.pid) > 1 << 20)
            assert _is_frozen(Path(path))
            child.kill()
            child.wait()
            assert wait_for(lambda: not _is_frozen(Path(path)))
            (Path(path) / "thawed").touch()
        assert [item.name for item in area.iterdir()] == ["root"]  # and no incomplete file

    def test_the_root_filesystem_is_never_frozen(self, store: Store, area: Path) -> None:
        from unionfs.storage.archive.freeze import own_filesystem

        assert not own_filesystem("/")
        assert not own_filesystem(str(store.create("data")))
        for mountpoint in ("/tmp", "/var", "/dev/shm", "/usr"):
            assert not own_filesystem(mountpoint)

    def test_on_a_reflink_filesystem_each_file_is_of_one_moment(
        self, filesystem: Callable[..., Path], area: Path
    ) -> None:
        store = Store(filesystem("xfs", 600 << 20) / "root")
        data = store.create("data")
        size = 32 << 20
        (data / "one").write_bytes(b"0" * size)

        def write(stop: threading.Event) -> None:
            with (data / "one").open("r+b") as file:
                while not stop.is_set():
                    for letter in b"123456789":
                        os.pwrite(file.fileno(), bytes([letter]) * size, 0)

        with store.volumes().used("data", "test"), _meanwhile(write):
            done = store("backup", "data", "-o", area / "b.tar")
        assert done.returncode == 0, done.stderr
        assert "changed" not in done.stderr
        store.create("copy")
        store.ok("restore", "copy", "-i", area / "b.tar")
        content = (store.data("copy") / "one").read_bytes()
        # FICLONE waits for a write in progress (xfs: the inode's lock), so at most one is incomplete.
        # done.
        assert len(content) == size
        assert len(set(content)) <= 2

    def test_a_volume_in_use_is_backed_up_and_not_restored(self, store: Store, area: Path) -> None:
        data = store.create("data")
        (data / "file").write_text("old")
        with store.volumes().used("data", "test"):
            store.ok("backup", "data", "-o", area / "b.tar")
            (data / "file").write_text("new")
            refused(
                store("restore", "data", "-i", area / "b.tar"), "data cannot be restored", "in use by a test"
            )
        assert (data / "file").read_text() == "new"


def _written(pid: int) -> int:
    """The number of bytes a process has written so far."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar:")).split()[1])


def _is_frozen(path: Path) -> bool:
    """Whether a write would block: FIFREEZE of a frozen filesystem is EBUSY (fs/super.c, freeze_super)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, 0xC0045877, 0)
        fcntl.ioctl(fd, 0xC0045878, 0)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


class TestIncremental:
    def test_changes_and_deletions_come_back(self, store: Store, area: Path) -> None:
        data = _tree(store)
        states = []
        archives = []
        for number in range(4):
            if number:
                _change(data, number - 1)
            time.sleep(0.06)  # a change just before a backup counts once more
            name = area / f"{number}.tar.zst"
            store.ok("backup", "data", "-o", name, *(["--since", archives[-1]] if archives else []))
            archives.append(name)
            states.append(trees.value(data))
        sizes = [path.stat().st_size for path in archives]
        assert sizes[2] < sizes[0] / 5
        for archive, state in zip(archives, states, strict=True):
            store.create("copy")
            store.ok("restore", "copy", "-i", archive)
            assert trees.value(store.data("copy")) == state
            assert "as in its last backup" in store.ok("verify", "copy")
            store.ok("rm", "copy")

    def test_nothing_changed_makes_an_archive_without_entries(self, store: Store, area: Path) -> None:
        _tree(store)
        time.sleep(0.06)
        store.ok("backup", "data", "-o", area / "a.tar")
        store.ok("backup", "data", "-o", area / "b.tar", "--since", area / "a.tar")
        assert trees.tar("tf", area / "b.tar").split("\n")[:-1] == [
            ".unionfs-backup/info.json",
            ".unionfs-backup/deleted",
            ".unionfs-backup/manifest",
        ]

    def test_the_figures_are_those_of_the_volume(self, store: Store, area: Path) -> None:
        data = store.create("data")
        for name in "abcde":
            (data / name).write_text("12345")
        time.sleep(0.06)
        assert "6 entries, 25B" in store("backup", "data", "-o", area / "a.tar").stderr
        (data / "a").write_text("1")
        (data / "b").write_text("12")
        done = store("backup", "data", "-o", area / "b.tar", "--since", area / "a.tar")
        assert "2 entries, 3B; 4 unchanged in its base." in done.stderr
        done = store("restore", "data", "-i", area / "b.tar")
        assert "restored volume data: 6 entries, 18B; from 2 archives." in done.stderr

    def test_a_base_is_not_replaced(self, store: Store, area: Path) -> None:
        data = store.create("data")
        store.ok("backup", "data", "-o", area / "a.tar.zst")
        (data / "x").write_text("x")
        store.ok("backup", "data", "-o", area / "b.tar", "--since", area / "a.tar.zst")
        before = (area / "a.tar.zst").read_bytes()
        refused(
            store("backup", "data", "-o", area / "a.tar.zst"),
            f"{area}/a.tar.zst is the base of the incremental backup {area}/b.tar",
        )
        assert (area / "a.tar.zst").read_bytes() == before
        store.ok("backup", "data", "-o", area / "b.tar")
        store.ok("backup", "data", "-o", area / "a.tar.zst")

    def test_the_base_is_found_beside_it_or_named(self, store: Store, area: Path) -> None:
        data = store.create("data")
        (data / "a").write_text("a")
        store.ok("backup", "data", "-o", area / "a.tar")
        (data / "b").write_text("b")
        store.ok("backup", "data", "-o", area / "b.tar", "--since", area / "a.tar")
        (area / "elsewhere").mkdir()
        os.rename(area / "a.tar", area / "elsewhere/renamed.tar")
        message = refused(store("restore", "data", "-i", area / "b.tar"), "incremental", "a.tar", "--base")
        assert "not beside it" in message
        store.ok("restore", "data", "-i", area / "b.tar", "--base", area / "elsewhere/renamed.tar")
        assert {path.name for path in data.iterdir()} == {"a", "b"}
        store.ok(
            "restore", "data", "-i", area / "b.tar", "--base", area / "elsewhere/renamed.tar", "--verify-only"
        )

    def test_another_backup_under_the_base_s_name_is_no_base(self, store: Store, area: Path) -> None:
        data = store.create("data")
        (data / "a").write_text("a")
        store.ok("backup", "data", "-o", area / "a.tar")
        store.ok("backup", "data", "-o", area / "b.tar", "--since", area / "a.tar")
        store.ok("backup", "data", "-o", area / "other.tar")
        os.replace(area / "other.tar", area / "a.tar")
        refused(store("restore", "data", "-i", area / "b.tar"), "is not beside it")

    def test_a_base_with_the_same_id_and_other_content(
        self, store: Store, area: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = store.create("data")
        (data / "a").write_text("a")
        with monkeypatch.context() as patched:
            patched.setattr(uuid, "uuid4", lambda: uuid.UUID(int=7))
            store.ok("backup", "data", "-o", area / "a.tar")
            (data / "a").write_text("b")
            store.ok("backup", "data", "-o", area / "other.tar")
            (data / "a").write_text("a")
            time.sleep(0.06)  # a file changed just before the base is backed up again
            store.ok("backup", "data", "-o", area / "a.tar")
        store.ok("backup", "data", "-o", area / "b.tar", "--since", area / "a.tar")
        store.ok("restore", "data", "-i", area / "b.tar")
        os.rename(area / "other.tar", area / "a.tar")
        for words in ((), ("--verify-only",)):
            refused(store("restore", "data", "-i", area / "b.tar", *words), "its base does not hold a")
        assert (data / "a").read_text() == "a"

    def test_bad_bases_are_refused_when_the_backup_is_made(self, store: Store, area: Path) -> None:
        store.create("data")
        store.create("other")
        store.ok("backup", "other", "-o", area / "other.tar")
        refused(store("backup", "data", "-o", area / "b.tar", "--since", area / "other.tar"), "volume other")
        refused(store("backup", "data", "-o", area / "b.tar", "--since", area / "none.tar"), "none.tar")
        whole = (area / "other.tar").read_bytes()
        (area / "cut.tar").write_bytes(whole[:-1024])
        refused(store("backup", "data", "-o", area / "b.tar", "--since", area / "cut.tar"), "cut off")
        assert not (area / "b.tar").exists()

    def test_one_does_not_replace_what_it_is_built_on(self, store: Store, area: Path) -> None:
        data = _tree(store)
        full, first = area / "full.tar", area / "first.tar"
        store.ok("backup", "data", "-o", full)
        (data / "new").write_text("1")
        store.ok("backup", "data", "-o", first, "--since", full)
        before = full.read_bytes(), first.read_bytes()
        (area / "link.tar").symlink_to(full)
        for target, since in ((full, full), (full, first), (first, first), (area / "link.tar", full)):
            refused(store("backup", "data", "-o", target, "--since", since), "is needed to restore")
        assert (full.read_bytes(), first.read_bytes()) == before
        store.ok("backup", "data", "-o", area / "second.tar", "--since", first)
        store.ok("restore", "data", "-i", area / "second.tar")


def _change(data: Path, number: int) -> None:
    """The changes of a day: new, changed, renamed, removed names, and names of a new type."""
    if number == 0:
        (data / "new").write_text("new")
        with (data / "zeros").open("ab") as file:
            file.write(b"more")
        (data / "dir/file").unlink()  # two of three links are left
        os.removexattr(data / "dir", "trusted.mark")
        os.rename(data / "large", data / "larger")
        os.chmod(data / "size 512", 0o600)
    elif number == 1:
        subprocess.run(["rm", "-r", data / "dir"], check=True)
        (data / "dir").write_text("a file now")
        (data / "null").unlink()
        (data / "null").mkdir()
        (data / "null/inside").write_text("a directory now")
        os.setxattr(data / "empty", "user.only", b"an xattr")
        os.link(data / "zz third name", data / "0 first name")
    else:
        (data / "dir").unlink()
        os.symlink("null", data / "dir")
        subprocess.run(["rm", "-r", data / ("d" * 60)], check=True)
        os.removexattr(data, "user.root")
        (data / "size 1").write_bytes(b"2")


class TestVerify:
    def test_changes_are_told_and_damage_is_an_error(self, store: Store, area: Path) -> None:
        data = store.create("data")
        for name in ("a", "b", "c", "d"):
            (data / name).write_text(name * 10)
        refused(store("verify", "data"), "no manifest", "make a backup")
        store.ok("backup", "data", "-o", area / "b.tar")
        assert store.ok("verify", "data") == "data: 5 entries, as in its last backup.\n"
        (data / "a").write_text("changed")
        (data / "b").unlink()
        (data / "new").touch()
        out = store.ok("verify", "data").splitlines()
        assert out[:-1] == ["changed .", "changed a", "missing b", "added new"]
        status = (data / "c").stat()
        (data / "c").write_text("C" * 10)
        os.utime(data / "c", ns=(0, status.st_mtime_ns))
        done = store("verify", "data")
        assert done.returncode == 1
        assert "damaged c\n" in done.stdout
        assert "data is damaged" in done.stderr

    def test_a_file_of_a_volume_s_name(self, store: Store, area: Path) -> None:
        store.create("data")
        (area / "data").write_text("no archive")
        refused(store("verify", "data", cwd=area), "no manifest")
        refused(store("verify", "./data", cwd=area), "not a backup made by")
        refused(store("verify", "nothing", cwd=area), "no volume nothing")


class TestWhere:
    """Where an archive is written, and as what."""

    @pytest.mark.parametrize("name", ["x.tar.xz", "x.tar.bz2", "X.TXZ", "x.zip"])
    def test_a_name_of_another_compression(self, store: Store, area: Path, name: str) -> None:
        store.create("data")
        refused(store("backup", "data", "-o", area / name), "not supported", ".tar.zst", "--compress")
        assert not (area / name).exists()
        store.ok("backup", "data", "--compress", "none", "-o", area / name)
        assert trees.tar("tf", area / name).startswith(".unionfs-backup/info.json")

    def test_not_into_the_volume_itself(self, store: Store, area: Path) -> None:
        data = store.create("data")
        (data / "below").mkdir()
        (area / "link").symlink_to(data / "below")
        for place in (data, data / "below", area / "link"):
            refused(store("backup", "data", "-o", place / "x.tar"), "into the volume itself")
        assert sorted(os.listdir(data)) == ["below"]
        assert os.listdir(data / "below") == []

    def test_an_idle_volume_in_memory(self, root: None, store: Store, area: Path) -> None:
        store.create("-o", "tmpfs", "data")
        done = store("backup", "data", "-o", area / "x.tar")
        assert done.returncode == 0
        assert "volume data is in memory and not in use, so it is empty" in done.stderr

    def test_a_damaged_archive_is_called_damaged(self, store: Store, area: Path) -> None:
        data = store.create("data")
        (data / "x").write_bytes(os.urandom(1000))
        store.ok("backup", "data", "-o", area / "x.tar.zst")
        whole = (area / "x.tar.zst").read_bytes()
        for at in (100, len(whole) // 2):
            (area / "x.tar.zst").write_bytes(whole[:at] + b"damaged" + whole[at + 7 :])
            said = refused(store("verify", area / "x.tar.zst"), "damaged", "use another copy of it")
            assert "restored" not in said
            assert "is not a backup" not in said
            refused(store("restore", "data", "-i", area / "x.tar.zst"), "damaged", "nothing was restored")


class TestClone:
    @pytest.mark.parametrize("kind", [None, "xfs", "btrfs"])
    def test_a_clone_is_the_same(
        self, store: Store, filesystem: Callable[..., Path], kind: str | None
    ) -> None:
        if kind is not None:
            store = Store(filesystem(kind, 600 << 20) / "root")
        data = store.create("--label", "a=1", "data")
        if kind is None:
            trees.fill(data)
        else:
            (data / "large").write_bytes(os.urandom(100 << 20))
            (data / "dir").mkdir()
        os.sync()
        free = os.statvfs(store.root).f_bavail * os.statvfs(store.root).f_frsize
        done = store("clone", "data", "copy")
        assert (done.returncode, done.stdout) == (0, "copy\n"), done.stderr
        assert trees.value(store.data("copy")) == trees.value(data)
        (found,) = json.loads(store.ok("inspect", "copy"))
        assert found["Labels"] == {"a": "1"}
        if kind is not None:
            os.sync()
            assert free - os.statvfs(store.root).f_bavail * os.statvfs(store.root).f_frsize < 20 << 20
            assert "sharing blocks" in done.stderr

    def test_of_a_volume_with_a_size(self, store: Store) -> None:
        store.create("-o", "size=32m", "data")
        with store.volumes().used("data", "test") as path:
            (Path(path) / "file").write_text("x")
            store.ok("clone", "data", "copy")
        with store.volumes().used("copy", "test") as path:
            assert (Path(path) / "file").read_text() == "x"
            assert os.path.ismount(path)

    def test_bad_calls(self, store: Store) -> None:
        store.create("data")
        store.create("other")
        refused(store("clone", "data", "other"), "other already exists")
        refused(store("clone", "data", "data"), "already exists")
        refused(store("clone", "none", "copy"), "no volume none")
        refused(store("clone", "data", "a/b"), "invalid volume name")

    def test_a_clone_that_does_not_fit_is_not_there(self, filesystem: Callable[..., Path]) -> None:
        store = Store(filesystem("tmpfs", 8 << 20) / "root")
        (store.create("data") / "file").write_bytes(os.urandom(5 << 20))
        refused(store("clone", "data", "copy"), "copy cannot be cloned", "no space left")
        assert store.ok("ls", "-q") == "data\n"
        assert [path.name for path in (store.root / "volumes").iterdir()] == ["data"]




@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_a_full_target_is_no_unreadable_file(
    store: Store, filesystem: Callable[..., Path], size: int
) -> None:
    data = store.create("data")
    for number in range((4 << 20) // size):
        (data / f"{number}").write_bytes(os.urandom(size))
    target = filesystem("tmpfs", 1 << 20) / "b.tar"
    done = store("backup", "data", "--compress", "none", "-o", target)
    message = refused(done, "the backup cannot be written", "no space left on device")
    assert "cannot be read" not in message


def test_a_small_file_that_cannot_be_read_is_named(store: Store, area: Path) -> None:
    (store.create("data") / "file").write_text("x")
    script = (
        "import errno, os, sys; pread = os.pread\n"
        "def broken(fd, *more):\n"
        "    if os.readlink(f'/proc/self/fd/{fd}').endswith('/file'): raise OSError(errno.EIO, 'broken')\n"
        "    return pread(fd, *more)\n"
        "os.pread = broken\n"
        "from unionfs.cli.common import run; from unionfs.cli.main import cli\n"
        "sys.exit(run(cli, sys.argv[1:], 'unionfs'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "volume", "backup", "data", "-o", area / "b.tar"],
        env={**os.environ, "UNIONFS_ROOT": str(store.root), "PYTHONPATH": REPOSITORY},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "file in" in done.stderr
    assert "cannot be read" in done.stderr


class TestOrdinaryUser:
    def test_backup_and_restore_without_root(self, area: Path) -> None:
        home = area / "home"
        home.mkdir()
        os.chown(home, 1000, 1000)
        store = Store(home / "root")

        path = f"{REPOSITORY}:{sysconfig.get_path('purelib')}"
        environment = {**os.environ, "HOME": str(home), "UNIONFS_ROOT": str(store.root), "PYTHONPATH": path}
        as_user = ("setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "--")

        def call(python: str, *arguments: str | Path) -> tuple[int, str, str]:
            done = subprocess.run(
                [*as_user, python, "-m", "unionfs", "volume", *map(str, arguments)],
                text=True,
                env=environment,
                cwd="/",
                capture_output=True,
                check=False,
            )
            return done.returncode, done.stdout, done.stderr

        # A virtual environment may be in root's home.
        pythons = [python for python in (sys.executable, "/usr/bin/python3") if call(python, "ls")[0] == 0]
        if not pythons:
            pytest.skip("no Python that an ordinary user may run")

        def run(*arguments: str | Path) -> tuple[int, str, str]:
            return call(pythons[0], *arguments)

        assert run("create", "data")[0] == 0
        data = store.data("data")
        (data / "file").write_text("x")
        (data / "dir").mkdir()
        (data / "dir/closed").write_text("y")
        for path in (data / "file", data / "dir", data / "dir/closed"):
            os.chown(path, 1000, 1000)
        os.setxattr(data / "file", "user.a", b"b")
        os.chmod(data / "file", 0o444)  # setting such an xattr requires write permission
        os.chmod(data / "dir", 0o500)
        before = trees.value(data)
        assert run("backup", "data", "-o", home / "b.tar")[0] == 0
        assert run("restore", "data", "-i", home / "b.tar") == (0, "data\n", run_told("data", 4, 2))
        assert trees.value(data) == before
        assert sorted(os.listdir(data.parent)) == ["_data", "manifest", "spare", "volume.json"]
        # entries that an ordinary user cannot restore
        code, _, err = run("create", "-o", "size=50m", "sized")
        assert code == 1
        assert "needs root" in err
        roots = Store(area / "root")
        os.mknod(roots.create("data") / "null", 0o20666, os.makedev(1, 3))
        roots.ok("backup", "data", "-o", home / "device.tar")
        os.chown(home / "device.tar", 1000, 1000)
        code, _, err = run("restore", "data", "-i", home / "device.tar")
        assert code == 1
        assert "null is a device file, which only root can make" in err
        os.chmod(data / "file", 0)
        os.chown(data / "file", 0, 0)
        code, _, err = run("backup", "data", "-o", home / "c.tar")
        assert code == 1
        assert "file in" in err
        assert "permission denied" in err
        assert not (home / "c.tar").exists()


def run_told(name: str, entries: int, size: int) -> str:
    """The report of a restore on stderr."""
    return f"unionfs: restored volume {name}: {entries} entries, {size}B.\n"


def test_the_limit_of_open_files_does_not_limit_depth(store: Store, area: Path) -> None:
    data = store.create("data")
    fd = os.open(data, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    with open(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=fd), "w") as file:
        file.write("deep")
    os.close(fd)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))

    done = store("backup", "data", "-o", area / "b.tar", preexec_fn=limit)
    assert done.returncode == 0, done.stderr
    store.create("copy")
    done = store("restore", "copy", "-i", area / "b.tar", preexec_fn=limit)
    assert done.returncode == 0, done.stderr
    assert "1502 entries" in done.stderr
    assert "as in its last backup" in store.ok("verify", "copy")
