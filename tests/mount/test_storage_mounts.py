"""Volumes, bind mounts and tmpfs on a union: kernel mounts, in order, always undone in reverse."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests.mount.cli_calls import gone, listed, refused, succeed, wait_for
from tests.support import areas, syscalls
from tests.support.patience import patient
from tests.support.storage import Storage, storage, unmounted


def test_a_directory_above_a_volume_is_renamed(storing: Storage) -> None:
    """The volume is carried along, as any mount; its own directory is busy, as natively."""
    (storing.place.lower2 / "in/data").mkdir(parents=True)
    (storing.place.lower2 / "in/beside").write_text("beside")
    storing.mount("-v", "db:/in/data")
    merged = storing.merged
    (merged / "in/data/new").write_text("new\n")
    with pytest.raises(OSError, match="busy"):
        (merged / "in/data").rename(merged / "out")
    (merged / "in").rename(merged / "moved")
    assert (merged / "moved/data/new").read_text() == "new\n"
    assert (merged / "moved/beside").read_text() == "beside"
    assert not (merged / "in").exists()
    (merged / "moved").rename(merged / "in")
    storing.umount()


def test_all_kinds(storing: Storage) -> None:
    (storing.place.lower2 / "data").mkdir()
    (storing.place.lower2 / "data/seed").write_text("seed\n")
    single = storing.host / "file"
    storing.mount(
        "-v", "db:/data", "-v", "/anonymous", "-v", f"{storing.host}:/srv/host",
        "-v", f"{single}:/etc/conf:ro", "--tmpfs", "/run/secrets:size=1m",
        "--mount", "type=tmpfs,target=/t,tmpfs-mode=700",
    )  # fmt: skip
    merged = storing.merged
    assert {path for path, _ in storing.mounts()} == {
        "/", "/data", "/anonymous", "/t", "/srv/host", "/etc/conf", "/run/secrets",
    }  # fmt: skip
    assert (merged / "data/seed").read_text() == "seed\n"
    (merged / "data/new").write_text("new\n")
    assert (storing.volume("db") / "new").read_text() == "new\n"
    (merged / "srv/host/new").write_text("new\n")
    assert (storing.host / "new").read_text() == "new\n"
    assert (merged / "etc/conf").read_text() == "host\n"
    with pytest.raises(OSError, match="Read-only"):
        (merged / "etc/conf").write_text("x")
    assert stat.S_IMODE((merged / "run/secrets").stat().st_mode) == 0o1777
    assert stat.S_IMODE((merged / "t").stat().st_mode) == 0o700
    (anonymous,) = [name for name in storing.volumes() if name != "db"]
    assert len(anonymous) == 64
    assert set(anonymous) <= set("0123456789abcdef")
    # Only the targets were created in the upper.
    assert sorted(str(p.relative_to(storing.place.upper)) for p in storing.place.upper.rglob("*")) == [
        "anonymous", "etc", "etc/conf", "run", "run/secrets", "srv", "srv/host", "t",
    ]  # fmt: skip
    assert (storing.place.upper / "etc/conf").read_bytes() == b""
    shown = listed(storing.unionfs("inspect", "--json", merged))["settings"]["storage"]
    assert [(item["type"], item["target"]) for item in shown] == [
        ("volume", "/data"), ("volume", "/anonymous"), ("tmpfs", "/t"), ("bind", "/srv/host"),
        ("bind", "/etc/conf"), ("tmpfs", "/run/secrets"),
    ]  # fmt: skip
    assert shown[1]["name"] == anonymous
    text = succeed(storing.unionfs("inspect", merged))
    assert f"bind {single} at /etc/conf (read-only)" in text
    storing.umount()
    # The volume outlives the union, and is the same in the next.
    storing.mount("--mount", "source=db,target=/other,readonly")
    assert (merged / "other/new").read_text() == "new\n"
    with pytest.raises(OSError, match="Read-only"):
        (merged / "other/x").touch()
    assert not (merged / "run/secrets/x").exists()
    storing.umount()


def test_native_files_and_inotify(storing: Storage) -> None:
    """A change on the host is an event in the union, and files are the host's own."""
    storing.mount("-v", f"{storing.host}:/h")
    there, here = storing.host / "file", storing.merged / "h/file"
    assert (here.stat().st_dev, here.stat().st_ino) == (there.stat().st_dev, there.stat().st_ino)
    watcher = subprocess.Popen(
        ["python3", "-c", _WATCH, str(storing.merged / "h")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "ready\n"
        there.write_text("changed\n")
        assert watcher.stdout.readline() == "file\n"
    finally:
        watcher.kill()
        watcher.communicate()
    storing.umount()


_WATCH = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
fd = libc.inotify_init1(0)
assert libc.inotify_add_watch(fd, sys.argv[1].encode(), 0x2) >= 0
print("ready", flush=True)
event = os.read(fd, 4096)
print(event[16:].split(b"\\0")[0].decode(), flush=True)
"""


def test_read_only_is_recursive(one: Storage) -> None:
    (one.host / "below").mkdir()
    with _tmpfs(one.host / "below"):
        one.mount(
            "-v", f"{one.host}:/ro:ro", "-v", f"{one.host}:/rw",
            "--mount", f"type=bind,source={one.host},target=/top,readonly,bind-recursive=writable",
            "--mount", f"type=bind,source={one.host},target=/flat,bind-nonrecursive",
        )  # fmt: skip
        assert (one.host / "below/inner").exists()
        for path in ("ro/x", "ro/below/x", "top/x"):
            with pytest.raises(OSError, match="Read-only") as caught:
                (one.merged / path).touch()
            assert caught.value.errno == errno.EROFS
        (one.merged / "rw/below/written").touch()
        (one.merged / "top/below/written2").touch()
        assert sorted(os.listdir(one.host / "below")) == ["inner", "written", "written2"]
        assert os.listdir(one.merged / "flat/below") == []
        # The host's own mounts are unchanged.
        (one.host / "y").touch()
        (one.host / "below/y").touch()
        one.umount()


class _tmpfs:
    """A tmpfs on the host with the file `inner` in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        syscalls.mount("tmpfs", self.path, "tmpfs", 0, "size=1m")
        (self.path / "inner").touch()

    def __exit__(self, *_: object) -> None:
        syscalls.umount(self.path)


def test_propagation(one: Storage) -> None:
    """rprivate receives no later mounts of the host, rslave does; rshared shows the host the union's. The
    mounts below the source behave likewise."""
    subprocess.run(["mount", "--bind", one.host, one.host], check=True)
    subprocess.run(["mount", "--make-shared", one.host], check=True)
    try:
        (one.host / "below").mkdir()
        syscalls.mount("tmpfs", one.host / "below", "tmpfs", 0, "size=1m")
        subprocess.run(["mount", "--make-shared", one.host / "below"], check=True)
        for name in ("later", "mine", "below/later", "below/mine"):
            (one.host / name).mkdir()
        one.mount(
            "-v", f"{one.host}:/private", "-v", f"{one.host}:/slave:rslave",
            "--mount", f"type=bind,source={one.host},target=/shared,bind-propagation=rshared",
            "-v", f"{one.host}:/flat:slave",
        )  # fmt: skip
        for later in ("later", "below/later"):
            with _tmpfs(one.host / later):
                assert not (one.merged / "private" / later / "inner").exists()
                assert (one.merged / "slave" / later / "inner").exists()
                assert (one.merged / "shared" / later / "inner").exists()
        for mine in ("mine", "below/mine"):
            with _tmpfs(one.merged / "shared" / mine):
                assert (one.host / mine / "inner").exists()
            with _tmpfs(one.merged / "slave" / mine):
                assert not (one.host / mine / "inner").exists()
        with _tmpfs(one.merged / "flat/below/mine"):  # mounts below it keep their propagation
            assert (one.host / "below/mine/inner").exists()
        one.umount()
        syscalls.umount(one.host / "below")
    finally:
        syscalls.umount(one.host)


def test_targets_within_targets(one: Storage) -> None:
    """Mounted from the outside in, for any order of the options; missing parts are created."""
    one.mount("-v", f"{one.host}:/a/b/c", "--tmpfs", "/a/b", "-v", "vol:/a")
    assert {path for path, _ in one.mounts()} == {"/a/b/c", "/a/b", "/a", "/"}
    assert (one.merged / "a/b/c/file").read_text() == "host\n"
    # The second target was created in the volume, the third in the tmpfs.
    assert os.listdir(one.volume("vol")) == ["b"]
    one.umount()
    assert os.listdir(one.volume("vol")) == ["b"]
    assert os.listdir(one.volume("vol") / "b") == []


def test_symlinks_stay_inside(one: Storage) -> None:
    for name, target in {"abs": "/etc", "up": "../../../../../../tmp", "lock": "/run/lock"}.items():
        (one.place.lower / name).symlink_to(target)
    before = set(os.listdir("/etc")), set(os.listdir("/run"))
    one.mount("-v", "va:/abs/inner", "-v", "vb:/up/inner", "-v", f"{one.host}:/lock")
    assert {path for path, _ in one.mounts()} == {"/tmp/inner", "/etc/inner", "/run/lock", "/"}
    assert (one.merged / "run/lock/file").exists()
    assert (set(os.listdir("/etc")), set(os.listdir("/run"))) == before
    shown = listed(one.unionfs("inspect", "--json", one.merged))["settings"]["storage"]
    assert [item["target"] for item in shown] == ["/run/lock", "/etc/inner", "/tmp/inner"]
    one.umount()


def test_read_only_union(one: Storage) -> None:
    """Without an upper the targets must exist; the mounts are still writable."""
    (one.place.lower / "data").mkdir()
    layers = ("-l", one.place.lower, "-l", one.place.lower2)
    one.mount(*layers, "-v", "db:/data", layers=False)
    (one.merged / "data/x").touch()
    assert (one.volume("db") / "x").exists()
    one.umount()
    done = one.try_mount(*layers, "-v", "db:/missing", layers=False)
    refused(done, "target /missing does not exist", "read-only file system", "an upper")
    assert one.mounts() == []


def test_first_use_of_a_volume(storing: Storage) -> None:
    """Files of a lower, of the upper and behind whiteouts, through a target that is a symlink."""
    lower, upper = storing.place.lower2 / "var/lib", storing.place.upper / "var/lib"
    for path in (lower, upper):
        path.mkdir(parents=True)
    (lower / "low").write_text("low")
    os.link(lower / "low", lower / "hard")
    os.chown(lower / "low", 1000, 1001)
    os.utime(lower / "low", ns=(1, 1_234_567_890_123_456_789))
    (lower / "gone").touch()
    os.mknod(upper / "gone", stat.S_IFCHR, 0)
    (upper / "up").write_text("up")
    upper.chmod(0o751)
    os.chown(upper, 5, 6)
    (storing.place.lower / "link").symlink_to("/var/lib")
    storing.mount("-v", "copied:/link", "-v", "plain:/var/lib/low2:nocopy", "-v", "empty:/new")
    volume = storing.volume("copied")
    assert sorted(os.listdir(volume)) == ["hard", "low", "low2", "up"]
    found = (volume / "low").stat()
    assert (found.st_uid, found.st_gid, found.st_mtime_ns, found.st_nlink) == (
        1000, 1001, 1_234_567_890_123_456_789, 2,
    )  # fmt: skip
    assert (volume / "hard").stat().st_ino == found.st_ino
    assert (volume.stat().st_uid, volume.stat().st_gid, stat.S_IMODE(volume.stat().st_mode)) == (5, 6, 0o751)
    assert os.listdir(storing.volume("empty")) == []
    storing.umount()


def test_nocopy_and_filled_volumes(one: Storage) -> None:
    (one.place.lower / "seed").mkdir()
    (one.place.lower / "seed/x").write_text("image")
    one.mount("-v", "a1:/seed:nocopy", "--mount", "source=a2,target=/seed2,volume-nocopy")
    assert os.listdir(one.merged / "seed") == []
    one.umount()
    (one.volume("a1") / "mine").touch()
    one.mount("-v", "a1:/seed")
    assert os.listdir(one.merged / "seed") == ["mine"]
    one.umount()


def test_subpath(one: Storage) -> None:
    one.mount("-v", "vol:/v")
    (one.merged / "v/sub/dir").mkdir(parents=True)
    (one.merged / "v/sub/file").write_text("in the volume")
    (one.merged / "v/out").symlink_to("/etc")
    one.umount()
    one.mount(
        "--mount", "source=vol,target=/d,volume-subpath=sub/dir",
        "--mount", "source=vol,target=/f,volume-subpath=sub/file",
    )  # fmt: skip
    (one.merged / "d/new").touch()
    assert (one.volume("vol") / "sub/dir/new").exists()
    assert (one.merged / "f").read_text() == "in the volume"
    one.umount()
    for path in ("missing", "out"):
        done = one.try_mount("--mount", f"source=vol,target=/d,volume-subpath={path}")
        refused(done, f"volume-subpath {path} of volume vol")
        assert one.mounts() == []


def test_a_writer_and_a_reader_over_one_directory(root: None, area: Path) -> None:
    """Two unions with one bind source; the reader has it read-only."""
    (area / "a").mkdir()
    (area / "b").mkdir()
    with storage(area / "a") as writer, storage(area / "b") as reader:
        shared = writer.host
        writer.mount("-v", f"{shared}:/shared")
        reader.mount("-v", f"{shared}:/shared:ro")
        (writer.merged / "shared/message").write_text("hello")
        assert (reader.merged / "shared/message").read_text() == "hello"
        for change in (
            lambda: (reader.merged / "shared/message").write_text("no"),
            lambda: (reader.merged / "shared/message").unlink(),
            lambda: (reader.merged / "shared/other").mkdir(),
        ):
            with pytest.raises(OSError, match="Read-only") as caught:
                change()
            assert caught.value.errno == errno.EROFS
        reader.umount()
        writer.umount()


# -- ends ---------------------------------------------------------------------------------------------


def storage_options(one: Storage) -> list[str | Path]:
    return ["-v", "vol:/v", "--tmpfs", "/v/t", "-v", f"{one.host}:/h", "-v", f"{one.host}/file:/h2/file:ro"]


def test_sigterm(storing: Storage) -> None:
    pid = storing.mount(*storage_options(storing))
    guardian = storing.guardian()
    os.kill(pid, signal.SIGTERM)
    assert unmounted(storing)
    assert wait_for(lambda: gone(pid) and gone(guardian))


def test_sigterm_while_in_use(one: Storage) -> None:
    """It does not wait for the users of a mount: busy mounts are detached."""
    pid = one.mount(*storage_options(one))
    with (one.merged / "v/t/open").open("w") as held:
        os.kill(pid, signal.SIGTERM)
        assert unmounted(one)
        assert wait_for(lambda: gone(pid))
        held.write("still possible")
    assert os.listdir(one.volume("vol")) == ["t"]


def test_the_daemon_is_killed(storing: Storage) -> None:
    """No mount remains, without a call of `umount`; and the union can be mounted again at once."""
    pid = storing.mount(*storage_options(storing))
    guardian = storing.guardian()
    os.kill(pid, signal.SIGKILL)
    assert unmounted(storing), storing.mounts()
    assert wait_for(lambda: gone(guardian))
    assert not storing.is_listed()
    assert (storing.host / "file").read_text() == "host\n"
    storing.mount(*storage_options(storing))
    storing.umount()


def test_a_killed_daemons_volumes_are_given_back(one: Storage) -> None:
    """Also the storage of such a volume, without a later command."""
    succeed(one.unionfs("volume", "create", "-o", "type=tmpfs", "-o", "device=tmpfs", "vol"))
    pid = one.mount("-v", "vol:/v")
    assert len(areas.mounts_below(one.root)) == 1
    os.kill(pid, signal.SIGKILL)
    assert unmounted(one)
    assert wait_for(lambda: areas.mounts_below(one.root) == [])


def test_the_mountpoint_has_another_name(one: Storage) -> None:
    """A directory above the mountpoint is renamed during the mount."""
    above = one.place.root / "above"
    for end in ("umount", "kill"):
        (above / "point").mkdir(parents=True, exist_ok=True)
        succeed(one.unionfs("mount", *one.place.layers, "-v", "vol:/v", "--tmpfs", "/v/t", above / "point"))
        above.rename(one.place.root / "renamed")
        (pid,) = [
            item["pid"] for item in listed(one.unionfs("ls", "--json"))
            if item["mountpoint"] == str(above / "point")
        ]  # fmt: skip
        if end == "umount":
            succeed(one.unionfs("umount", one.place.root / "renamed/point"))
        else:
            os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: areas.mounts_below(one.place.root) == [])
        assert wait_for(lambda pid=pid: gone(pid))
        (one.place.root / "renamed").rename(above)


def test_sources_that_the_union_covers(one: Storage) -> None:
    """A source is resolved before the union is mounted: below its mountpoint, or above it."""
    (one.merged / "below").mkdir()
    (one.merged / "below/x").write_text("covered\n")
    one.mount("-v", f"{one.merged}/below:/shown", "-v", f"{one.place.root}:/all")
    assert (one.merged / "shown/x").read_text() == "covered\n"
    assert (one.merged / "all/merged/below/x").read_text() == "covered\n"
    assert not (one.merged / "below").exists()
    one.umount()
    assert (one.merged / "below/x").read_text() == "covered\n"


def test_the_daemon_is_killed_in_use(one: Storage) -> None:
    pid = one.mount(*storage_options(one))
    with (one.merged / "h/file").open() as held:
        os.kill(pid, signal.SIGKILL)
        assert unmounted(one)
        assert held.read() == "host\n"


@pytest.mark.parametrize("how", ["umount", "cleanup", "mount"])
def test_daemon_and_guardian_are_killed(one: Storage, how: str) -> None:
    pid, guardian = one.mount(*storage_options(one)), one.guardian()
    for number in (guardian, pid):
        os.kill(number, signal.SIGKILL)
        assert wait_for(lambda number=number: gone(number))
    before = one.mounts()
    assert before != []
    if how == "mount":
        one.mount(*storage_options(one))
        assert sorted(one.mounts()) == sorted(before)
        one.umount()
    else:
        succeed(one.unionfs(how, one.merged))
    assert one.mounts() == []
    assert not one.is_listed()


def test_the_guardian_alone_is_killed(one: Storage) -> None:
    one.mount(*storage_options(one))
    os.kill(one.guardian(), signal.SIGKILL)
    (one.merged / "h/x").touch()
    one.umount()


def test_unmounted_by_others(one: Storage) -> None:
    for command in (["umount", "-R"], ["umount", "-l"]):
        pid = one.mount(*storage_options(one))
        subprocess.run([*command, one.merged], check=True)
        assert unmounted(one)
        assert wait_for(lambda pid=pid: gone(pid))
        # The guardian received the end.
        assert not one.is_listed()


def test_a_mount_taken_away_by_hand_is_no_trouble(one: Storage) -> None:
    one.mount(*storage_options(one))
    syscalls.umount(one.merged / "h2/file")
    assert (one.merged / "h2/file").read_bytes() == b""
    one.umount()


def test_busy_storage_keeps_the_union_as_it_is(one: Storage) -> None:
    """`umount` refuses, names the user, and leaves everything mounted, including a tmpfs with its files."""
    one.mount(*storage_options(one))
    (one.merged / "v/t/secret").write_text("kept")
    before = one.mounts()
    with (one.merged / "h/file").open():
        sentence = refused(one.unionfs("umount", one.merged), "is busy", "used by", str(os.getpid()))
        assert "--lazy" in sentence
    assert sorted(one.mounts()) == sorted(before)
    assert (one.merged / "v/t/secret").read_text() == "kept"
    with pytest.raises(OSError, match="Read-only"):
        (one.merged / "h2/file").write_text("x")
    with (one.merged / "base").open():
        refused(one.unionfs("umount", one.merged), "is busy", str(os.getpid()))
    assert sorted(one.mounts()) == sorted(before)
    assert (one.merged / "v/t/secret").read_text() == "kept"
    one.umount()


def test_lazy(one: Storage) -> None:
    pid = one.mount(*storage_options(one))
    with (one.merged / "h/file").open() as held, (one.merged / "base").open():
        succeed(one.unionfs("umount", "--lazy", one.merged))
        assert one.mounts() == []
        assert held.read() == "host\n"
    assert wait_for(lambda: gone(pid))


def test_foreground_and_its_terminal(one: Storage) -> None:
    """Ctrl-C reaches the daemon and its guardian as one process group."""
    command = [*_command(), "mount", "-f", *map(str, one.place.layers), "-v", "vol:/v", str(one.merged)]
    daemon = subprocess.Popen(
        command, cwd="/", env={**os.environ, "UNIONFS_ROOT": str(one.root)}, start_new_session=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert wait_for(lambda: len(one.mounts()) == 2)
        os.killpg(daemon.pid, signal.SIGINT)
        began = time.monotonic()
        # The pipe ends with its last process: the guardian does not block the reader.
        assert daemon.communicate(timeout=patient(20))[1] is not None
        assert time.monotonic() - began < patient(15)
        assert daemon.returncode == 0
        assert one.mounts() == []
    finally:
        daemon.kill()
        daemon.wait()


def _command() -> list[str]:
    from tests.support import mounting

    return mounting.command()


# -- failures -----------------------------------------------------------------------------------------


def test_a_failure_undoes_what_came_before(storing: Storage) -> None:
    (storing.place.lower / "file").touch()
    before = storing.place.snapshot()
    done = storing.try_mount(
        "-v", f"{storing.host}:/new/a", "--tmpfs", "/new/b", "-v", f"{storing.place.root}/made/here:/new/c",
        "-v", "vol:/base/impossible",
    )  # fmt: skip
    refused(done, "target /base/impossible", "not a directory")
    assert storing.mounts() == []
    assert not storing.is_listed()
    after = storing.place.snapshot()
    # A created volume stays, as with Docker; union, host and upper are unchanged.
    new = {name for name in set(after) - set(before) if name.split("/")[0] != "storage"}
    assert new <= {"work/work", "work/index"}
    assert {name: after[name] for name in before} == before
    storing.mount("-v", "vol:/fine")
    storing.umount()


def test_missing_sources(one: Storage) -> None:
    missing = one.place.root / "not/there"
    done = one.try_mount("--mount", f"type=bind,source={missing},target=/x")
    refused(done, f"bind source {missing} does not exist", "-v or bind-create-src")
    assert not missing.exists()
    one.mount("-v", f"{missing}:/x", "--mount", f"type=bind,source={missing}2,target=/y,bind-create-src")
    assert missing.is_dir()
    assert Path(f"{missing}2").is_dir()
    one.umount()


def test_relative_sources(one: Storage) -> None:
    succeed(
        one.unionfs(
            "mount", *one.place.layers, "-v", "./host:/h", "--root", "elsewhere", "-v", "vol:/v", one.merged,
            cwd=one.place.root,
        )
    )  # fmt: skip
    assert (one.merged / "h/file").exists()
    assert (one.place.root / "elsewhere/volumes/vol/_data").is_dir()
    one.umount()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["-v", "vol:data"], ["target data is a relative path"]),
        (["-v", "vol:/"], ["union's root"]),
        (["-v", "vol:/a/../.."], ["union's root"]),
        (["-v", "vol:/toroot"], ["leads to the union's root"]),
        (["-v", "va:/x", "-v", "vb:/x/"], ["target /x is given twice"]),
        (["-v", "va:/x", "--tmpfs", "/x"], ["target /x is given twice"]),
        (["-v", "va:/real", "-v", "vb:/alias"], ["targets /real and /alias are the same place", "/real"]),
        (["--tmpfs", "/t:size=lots"], ["invalid size 'lots'", "64m"]),
        (["--mount", "type=tmpfs,target=/t,size=1"], ["unknown key size", "tmpfs-size"]),
        (["-v", "x:/t"], ["invalid volume name 'x'"]),
        (["-v", "v ol:/t"], ["invalid volume name 'v ol'"]),
        (["-v", "vol:/base"], ["target /base is a file in the union, but volume vol is a directory"]),
        (["-v", "/etc/hostname:/real"], ["/real is a directory in the union, but /etc/hostname is a file"]),
        (["--mount", "source=vol,target=/t,volume-driver=nfs"], ["driver nfs"]),
        (["--tmpfs", "/t:huge=perhaps"], ["tmpfs at /t cannot be made", "huge"]),
        (["-u", "tmpfs:size=64x"], ["size=64x"]),
        (["-u", "tmpfs", "-w", "/tmp"], ["work /tmp", "--work out"]),
        (["--root", "", "-v", "vol:/t"], ["--root", "name one"]),
        (["-v", "vol:/t", "--root", "/proc/nothing"], ["/proc/nothing", "--root"]),
    ],
)
def test_bad_input(one: Storage, options: list[str], parts: list[str]) -> None:
    (one.place.lower / "real").mkdir()
    (one.place.lower / "alias").symlink_to("real")
    (one.place.lower / "toroot").symlink_to("/")
    layers = () if "-u" in options else (*one.place.layers,)
    if "-u" in options:
        options = ["-l", str(one.place.lower), *options]
    refused(one.try_mount(*layers, *options, layers=False), *parts)
    assert one.mounts() == []
    assert os.listdir(one.place.upper) == []
    assert not one.is_listed()


def test_a_mountpoint_that_vanished(one: Storage) -> None:
    one.merged.rmdir()
    refused(one.try_mount("-v", "vol:/v"), "mountpoint", "does not exist")
    one.merged.mkdir()
