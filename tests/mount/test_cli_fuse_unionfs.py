"""`fuse-unionfs` as called by podman, and mount(8) with its helpers and /etc/fstab."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import (
    FUSE_UNIONFS,
    Done,
    Place,
    call,
    gone,
    mounts_at,
    refused,
    succeed,
    unionfs,
    wait_for,
)
from tests.mount.launcher_calls import LAUNCHER, need_launcher
from unionfs.daemon.resident import SETTING

_command: tuple[str, ...] = FUSE_UNIONFS


@pytest.fixture(params=["launcher", "itself"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the launcher and its resident, and in a process of its own."""
    if request.param == "launcher":
        need_launcher()
        monkeypatch.setattr(sys.modules[__name__], "_command", (str(LAUNCHER),))


def _fuse_unionfs(*arguments: str | Path, cwd: Path | None = None) -> Done:
    return call(_command, *arguments, cwd=cwd, env={SETTING: "60"})


def _line(path: Path) -> list[str]:
    return next(
        line.split() for line in Path("/proc/mounts").read_text().splitlines() if line.split()[1] == str(path)
    )


def _write_script(path: Path, module: str) -> Path:
    """A console script like pip's."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(cli_calls.REPOSITORY)!r})\n"
        f"from {module} import main\nmain()\n"
    )
    path.chmod(0o755)
    return path


def test_as_podman_calls_it(place: Place) -> None:
    """One -o, layers named by symlinks, empty options, the caller reads stderr to its end."""
    links = place.root / "l"
    links.mkdir()
    (links / "A").symlink_to("../lower")
    (links / "B").symlink_to("../lower2")
    for tail in ("", ",volatile", ",,volatile", ","):
        data = f"lowerdir={links}/A:{links}/B,upperdir={place.upper},workdir={place.work}{tail}"
        assert succeed(_fuse_unionfs("-o", data, place.merged, cwd=place.root)) == ""
        assert sorted(os.listdir(place.merged)) == ["base", "deep"]
        pid = place.pid()
        subprocess.run(["fusermount3", "-u", place.merged], check=True)
        assert wait_for(lambda pid=pid: gone(pid))


def test_as_podman_calls_it_for_a_volume_overlay(place: Place) -> None:
    succeed(
        _fuse_unionfs("-o", "lowerdir=lower,upperdir=upper,workdir=work,private", "merged", cwd=place.root)
    )
    assert os.listdir(place.merged) == ["base"]


def test_read_only_as_podman_calls_it(place: Place) -> None:
    succeed(_fuse_unionfs("-o", f"lowerdir={place.lower}:{place.lower2}", place.merged))
    assert "ro" in _line(place.merged)[3].split(",")


def test_an_image_as_rootless_podman_mounts_it(place: Place) -> None:
    """With `ro`, and an empty directory as the lowest layer."""
    (place.root / "empty").mkdir()
    layers = f"lowerdir={place.lower}:{place.lower2}:{place.root}/empty"
    succeed(_fuse_unionfs("-o", f"{layers},ro", place.merged))
    assert "ro" in _line(place.merged)[3].split(",")
    assert sorted(os.listdir(place.merged)) == ["base", "deep"]
    with pytest.raises(OSError, match="Read-only"):
        (place.merged / "new").touch()


def test_a_force_mask_as_podman_passes_it(place: Place) -> None:
    os.setxattr(place.lower, "user.containers.override_stat", b"0:0:0555:dir")
    os.setxattr(place.lower / "base", "user.containers.override_stat", b"5:6:04755:file")
    succeed(_fuse_unionfs("-o", f"{place.data},xattr_permissions=2,volatile", place.merged))
    st = (place.merged / "base").stat()
    assert (st.st_uid, st.st_gid, st.st_mode) == (5, 6, 0o104755)
    assert place.merged.stat().st_mode == 0o040555


@pytest.mark.parametrize("more", ["", ",index=on"])
def test_hard_links_as_for_container_engines(place: Place, more: str) -> None:
    """A change of one name changes no other, as on overlayfs without an index; the names have one number."""
    os.link(place.lower / "base", place.lower / "other")
    succeed(_fuse_unionfs("-o", place.data + more, place.merged))
    first, second = (place.merged / name for name in ("base", "other"))
    assert first.stat().st_ino == second.stat().st_ino
    first.chmod(0o600)
    assert (second.stat().st_mode == first.stat().st_mode) is bool(more)
    assert (place.work / "index").exists() is bool(more)


def test_version_as_podman_info_shows_it() -> None:
    lines = succeed(_fuse_unionfs("--version")).splitlines()
    assert lines[0].startswith("fuse-unionfs: version ")
    assert any(line.startswith("FUSE library version") for line in lines)
    assert any(line.startswith("using FUSE kernel interface version") for line in lines)
    assert succeed(_fuse_unionfs("-V")).splitlines() == lines


def test_help() -> None:
    assert "Example:" in succeed(_fuse_unionfs("--help"))
    assert succeed(_fuse_unionfs("-h")).startswith("usage: fuse-unionfs")


def test_foreground(place: Place) -> None:
    for flag in ("-f", "-d"):
        process = subprocess.Popen(
            [*_command, flag, "-o", place.data, str(place.merged)],
            stderr=subprocess.DEVNULL,
            cwd=cli_calls.REPOSITORY,
        )
        try:
            assert wait_for(lambda: bool(mounts_at(place.merged)), 20)
            assert os.listdir(place.merged)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.wait()


def test_usage_errors(place: Place) -> None:
    def wrong(*arguments: str | Path) -> str:
        return refused(_fuse_unionfs(*arguments), program="fuse-unionfs")

    assert "no mountpoint" in wrong("-o", place.data)
    assert "no lower" in wrong(place.merged)
    assert "--nonsense" in wrong("--nonsense", place.merged)
    assert "-x" in wrong("-x", place.merged)
    assert "-o needs a value" in wrong(place.merged, "-o")
    assert "unexpected argument b;" in wrong("a", place.merged, "b")
    assert "unknown option nonsense" in wrong("-o", f"{place.data},nonsense", place.merged)


@pytest.mark.parametrize(
    "arguments",
    [
        ["SOURCE", "MOUNTPOINT", "-o", "OPTIONS"],
        ["SOURCE", "MOUNTPOINT", "-o", "OPTIONS", "-t", "fuse.unionfs"],
        ["SOURCE", "MOUNTPOINT", "-sv", "-n", "-o", "OPTIONS"],
        ["-o", "OPTIONS", "SOURCE", "MOUNTPOINT"],
        ["SOURCE", "MOUNTPOINT", "-o", "rw,noexec", "-oOPTIONS"],
    ],
)
def test_as_a_mount_helper(place: Place, arguments: list[str]) -> None:
    words = {"SOURCE": "ls", "MOUNTPOINT": str(place.merged), "OPTIONS": f"{place.data},dev,suid"}
    filled = [
        words.get(word, word.replace("OPTIONS", words["OPTIONS"]) if word.startswith("-o") else word)
        for word in arguments
    ]
    succeed(_fuse_unionfs(*filled))
    assert _line(place.merged)[:3] == ["ls", str(place.merged), "fuse.unionfs"]
    succeed(unionfs("umount", place.merged))
    if not arguments[0].startswith("-"):
        succeed(unionfs(*filled))
        assert _line(place.merged)[:3] == ["ls", str(place.merged), "fuse.unionfs"]


def test_fake_mount_of_a_helper(place: Place) -> None:
    """mount -f: every step except the mount itself."""
    succeed(unionfs("source", place.merged, "-f", "-o", place.data))
    refused(unionfs("source", place.merged, "-f", "-o", "lowerdir=/nowhere"), "/nowhere")
    assert mounts_at(place.merged) == []
    assert os.listdir(place.work) == []


class Mounter:
    """mount(8) in a separate mount namespace, where /sbin and /etc can be changed."""

    def __init__(self, place: Place, *, link: bool) -> None:
        self.bin = place.root / "bin"
        script = _write_script(self.bin / "unionfs", "unionfs.cli.main")
        _write_script(self.bin / "fuse-unionfs", "unionfs.cli.fuse_unionfs")
        self.holder = subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo; exec sleep 300"],
            stdout=subprocess.PIPE,
        )
        assert self.holder.stdout is not None
        self.holder.stdout.readline()
        # mount(8) and mount.fuse(8) search programs in the system's directories only.
        self.run("mount", "--bind", str(self.bin), "/usr/local/bin")
        if link:
            # mount(8) searches helpers in /sbin and a few other directories.
            extra = place.root / "sbin"
            extra.mkdir()
            for name in os.listdir("/sbin"):
                if name.startswith("mount."):
                    (extra / name).symlink_to(f"/usr/local/real-sbin/{name}")
            (extra / "mount.fuse.unionfs").symlink_to(script)
            self.run("mount", "--bind", str(extra), "/sbin")

    def run(self, *command: str | Path) -> Done:
        path = f"{self.bin}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        return call(("nsenter", "-t", str(self.holder.pid), "-m", "env", f"PATH={path}"), *command)

    def close(self) -> None:
        self.holder.kill()
        self.holder.communicate()


@pytest.fixture(params=[False, True], ids=["through mount.fuse", "mount.fuse.unionfs"])
def mounter(place: Place, request: pytest.FixtureRequest) -> Iterator[Mounter]:
    if not request.param and not any(
        os.path.exists(f"/sbin/{name}") for name in ("mount.fuse", "mount.fuse3")
    ):
        pytest.skip("mount.fuse of the package fuse3 is missing")
    found = Mounter(place, link=request.param)
    try:
        yield found
    finally:
        found.close()


def test_mount_by_type(place: Place, mounter: Mounter) -> None:
    succeed(mounter.run("mount", "-t", "fuse.unionfs", "-o", place.data, "my source", place.merged))
    line = mounter.run("grep", str(place.merged), "/proc/mounts").stdout.split()
    assert line[0] == "my\\040source"
    assert line[2] == "fuse.unionfs"
    assert not {"nodev", "nosuid"} & set(line[3].split(","))
    assert mounter.run("cat", place.merged / "base").stdout == "base\n"
    pid = place.pid()
    succeed(mounter.run("umount", place.merged))
    assert wait_for(lambda: gone(pid))


def test_mount_by_type_with_flags(place: Place, mounter: Mounter) -> None:
    data = f"{place.data},nodev,nosuid,noexec,ro,nofail,x-systemd.automount"
    succeed(mounter.run("mount", "-t", "fuse.unionfs", "-o", data, "source", place.merged))
    options = mounter.run("grep", str(place.merged), "/proc/mounts").stdout.split()[3]
    assert {"nodev", "nosuid", "noexec", "ro"} <= set(options.split(","))
    succeed(mounter.run("umount", place.merged))


def _flags(place: Place, mounter: Mounter) -> set[str]:
    """The flags of the mount and of its filesystem."""
    line = mounter.run("grep", f" {place.merged} ", "/proc/self/mountinfo").stdout
    left, right = line.split(" - ")
    return set(left.split()[5].split(",")) | {f"filesystem {word}" for word in right.split()[2].split(",")}


def test_remount(place: Place, mounter: Mounter) -> None:
    """As of overlayfs beside it: all flags, also of what is open."""
    kernel = place.root / "kernel"
    for name in ("kernel", "up", "wk"):
        (place.root / name).mkdir()
    (place.lower / "tool").write_text("#!/bin/sh\n")
    (place.lower / "tool").chmod(0o4755)
    data = f"lowerdir={place.lower}:{place.lower2},upperdir={place.root}/up,workdir={place.root}/wk"
    succeed(mounter.run("mount", "-t", "overlay", "-o", data, "overlay", kernel))
    succeed(mounter.run("mount", "-t", "fuse.unionfs", "-o", place.data, "source", place.merged))
    commands = ["touch base", "rm -f new; echo > new", "./tool", "test -w base", "mkdir d; rmdir d"]
    several = "ro,noexec,nosuid,nodev", "rw,exec,suid,dev"
    for words in ("ro", "rw", "noexec", "exec", *several, "sync", "async", "ro", "rw"):
        seen = []
        for root in (kernel, place.merged):
            done = mounter.run("mount", "-o", f"remount,{words}", root)
            assert done.returncode == 0, done.stderr
            codes = [mounter.run("sh", "-c", f"cd {root} && {command}").returncode for command in commands]
            line = mounter.run("grep", f" {root} ", "/proc/self/mountinfo").stdout.split()
            seen.append((codes, line[5]))
        assert seen[1] == seen[0], words
    succeed(mounter.run("umount", kernel))
    succeed(mounter.run("umount", place.merged))


def test_remount_while_a_file_is_open_for_writing(place: Place, mounter: Mounter) -> None:
    succeed(mounter.run("mount", "-t", "fuse.unionfs", "-o", place.data, "source", place.merged))
    hold = f"exec 9>>{place.merged}/base; mount -o remount,ro {place.merged}"
    done = mounter.run("sh", "-c", hold)
    assert done.returncode != 0
    assert "busy" in done.stderr
    assert "Traceback" not in done.stderr
    assert "ro" not in _flags(place, mounter)
    succeed(mounter.run("umount", place.merged))


def test_remount_of_a_union_that_cannot_be_written(place: Place, mounter: Mounter) -> None:
    data = f"lowerdir={place.lower}:{place.lower2}"
    succeed(mounter.run("mount", "-t", "fuse.unionfs", "-o", data, "source", place.merged))
    done = mounter.run("mount", "-o", "remount,rw", place.merged)
    assert done.returncode != 0
    assert "it has no upper" in done.stderr
    succeed(mounter.run("mount", "-o", "remount,noexec", place.merged))
    assert _flags(place, mounter) >= {"ro", "noexec", "filesystem ro"}
    succeed(mounter.run("umount", place.merged))


def test_remount_of_what_is_mounted_read_only(place: Place, mounter: Mounter) -> None:
    """Its upper then takes changes."""
    data = f"{place.data},ro"
    succeed(mounter.run("mount", "-t", "fuse.unionfs", "-o", data, "source", place.merged))
    assert mounter.run("touch", place.merged / "new").returncode != 0
    succeed(mounter.run("mount", "-o", "remount,rw", place.merged))
    succeed(mounter.run("sh", "-c", f"echo more >> {place.merged}/base"))
    assert (place.upper / "base").read_text() == "base\nmore\n"
    succeed(mounter.run("mount", "-o", "remount,ro", place.merged))
    assert mounter.run("touch", place.merged / "new").returncode != 0
    succeed(mounter.run("umount", place.merged))


def test_remount_with_an_upper_in_memory(place: Place, mounter: Mounter) -> None:
    data = f"lowerdir={place.lower},upperdir=tmpfs,ro"
    succeed(mounter.run("mount", "-t", "fuse.unionfs", "-o", data, "source", place.merged))
    assert mounter.run("touch", place.merged / "new").returncode != 0
    succeed(mounter.run("mount", "-o", "remount,rw", place.merged))
    succeed(mounter.run("touch", place.merged / "new"))
    succeed(mounter.run("umount", place.merged))


def test_remount_of_something_else(place: Place, mounter: Mounter) -> None:
    done = _fuse_unionfs("source", place.merged, "-o", "remount,ro")
    refused(done, "is not a unionfs mount", program="fuse-unionfs")


def test_storage_in_fstab(place: Place, mounter: Mounter) -> None:
    """With colons where -v and --tmpfs have commas, and as mount(8) leaves escaped commas."""
    (place.lower / "data").mkdir()
    (place.lower / "data/seed").write_text("seed")
    host, store, fstab = (place.root / name for name in ("host", "store", "fstab"))
    host.mkdir()
    (host / "file").write_text("of the host")
    fstab.write_text(
        f"source {place.merged} fuse.unionfs {place.data},volume=vol:/data,volume={host}:/host:ro:rprivate,"
        "tmpfs=/run:size=1m:mode=0700,noauto 0 0\n"
    )
    succeed(mounter.run("env", f"UNIONFS_ROOT={store}", "mount", "-T", fstab, place.merged))
    assert succeed(mounter.run("cat", place.merged / "data/seed")) == "seed"
    assert (store / "volumes/vol/_data/seed").read_text() == "seed"
    assert succeed(mounter.run("cat", place.merged / "host/file")) == "of the host"
    assert mounter.run("touch", place.merged / "host/file").returncode != 0
    space = succeed(mounter.run("stat", "-f", "-c", "%T %b %S", place.merged / "run")).split()
    assert (space[0], int(space[1]) * int(space[2])) == ("tmpfs", 1 << 20)
    assert succeed(mounter.run("stat", "-c", "%a", place.merged / "run")) == "700\n"
    succeed(mounter.run("env", f"UNIONFS_ROOT={store}", "unionfs", "umount", place.merged))


def test_fstab(place: Place, mounter: Mounter) -> None:
    fstab = place.root / "fstab"
    fstab.write_text(
        f"source {place.merged} fuse.unionfs "
        f"{place.data},defaults,noauto,user,nofail,_netdev,x-systemd.requires=/,comment=hello 0 0\n"
    )
    succeed(mounter.run("mount", "-T", fstab, place.merged))
    line = mounter.run("grep", str(place.merged), "/proc/mounts").stdout.split()
    assert line[:3] == ["source", str(place.merged), "fuse.unionfs"]
    succeed(mounter.run("umount", place.merged))


def test_error_through_mount(place: Place, mounter: Mounter) -> None:
    done = mounter.run("mount", "-t", "fuse.unionfs", "-o", "lowerdir=/nowhere", "source", place.merged)
    assert done.returncode != 0
    assert "unionfs: lower /nowhere does not exist" in done.stderr
    assert "Traceback" not in done.stderr
