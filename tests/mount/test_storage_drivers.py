"""Storage drivers of containers: real runs of each one, beside the same command in a copy of the lowers."""

from __future__ import annotations

import glob
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mount import cli_calls, user_calls
from tests.mount.cli_calls import gone, refused, wait_for
from tests.mount.run_calls import Life, lives
from tests.support import snapshot
from unionfs.errors import UserError
from unionfs.images.drivers import open_driver
from unionfs.settings.drivers import STORAGE_DRIVERS
from unionfs.sys import btrfs, loop

RUNTIME = "bubblewrap"
_SCRIPT = """
cd /dir
echo more >> file; echo new > new; rm gone; chmod 4711 mode
rm -r replaced; mkdir replaced; echo in > replaced/other
mv moved elsewhere; ln -s file link; ln new hard; mkdir -p made/deep
"""
_CHANGES = {
    "C /dir", "C /dir/file", "A /dir/new", "D /dir/gone", "C /dir/mode", "C /dir/replaced",
    "D /dir/replaced/old", "A /dir/replaced/other", "D /dir/moved", "A /dir/elsewhere",
    "A /dir/elsewhere/below", "A /dir/link", "A /dir/hard", "A /dir/made", "A /dir/made/deep",
}  # fmt: skip
_LOOK = """
busybox find /dir | busybox sort | busybox xargs busybox stat -c '%n %f %u:%g'
busybox find /dir -type f | busybox sort | busybox xargs busybox stat -c '%n %h %s'
cat /dir/file /dir/replaced/* /dir/elsewhere/*
"""
_LOOP = "echo up; while :; do sleep 0.05; done"
_BASED = ("btrfs", "devicemapper", "zfs")
_OWN_FILESYSTEM = ("btrfs", "zfs")
"""The drivers whose storage root is on the filesystem of their name."""


@dataclass
class Drivers:
    """Containers of one storage driver."""

    box: Life
    driver: str

    def run(self, *words: str | Path, base: bool = True) -> cli_calls.Done:
        return self.box.run("--storage-driver", self.driver, *words, lower=base)

    def say(self, *words: str | Path, base: bool = True) -> str:
        return cli_calls.succeed(self.run(*words, base=base))

    def detached(self, name: str, script: str, *words: str | Path) -> None:
        self.say("-d", "--name", name, *words, "--", "sh", "-c", f"{script}; {_LOOP}")
        assert wait_for(lambda: self.box.said(name, "up"))

    def changes(self, name: str) -> set[str]:
        return set(self.box.ok("container", "diff", name).splitlines())

    def bases(self) -> list[str]:
        return [str(one["name"]) for one in json.loads(self.box.ok("system", "df", "--json"))["bases"]]

    def size(self, name: str) -> int:
        found = json.loads(self.box.ok("system", "df", "--json"))["containers"]
        return int(next(one["size"] for one in found if one["name"] == name))

    def left(self) -> list[str]:
        """What is left of containers: directories, subvolumes, clones, mounts of any process, devices."""
        found = [str(path) for path in (self.box.root / "containers").glob("*")]
        for table in Path("/proc").glob("[0-9]*/mountinfo"):
            try:
                lines = table.read_text(errors="replace").splitlines()
            except OSError:
                continue
            found += [f"{table}: {line}" for line in lines if f"{self.box.root}/" in line]
        for file in (self.box.root / "drivers").glob("*/*data"):
            found += [device.path for device in loop.devices_of(str(file))]
        for path in glob.glob("/sys/block/dm-*/dm/name"):
            with suppress(OSError):  # EINVAL: it is just being removed
                found += [name for name in [Path(path).read_text()] if name.startswith("unionfs-")]
        if self.driver == "zfs":
            names = subprocess.run(["zfs", "list", "-H", "-o", "name"], capture_output=True, text=True).stdout
            found += [name for name in names.split() if "/container-" in name]
        if self.driver == "btrfs":
            for path, _, _ in os.walk(self.box.root):
                with suppress(FileNotFoundError):
                    if os.stat(path).st_ino == btrfs.FIRST_INODE and "/drivers/" not in path:
                        found.append(path)
        return found


@pytest.fixture(params=STORAGE_DRIVERS)
def drivers(
    request: pytest.FixtureRequest, root: None, area: Path, filesystem: Callable[..., Path]
) -> Iterator[Drivers]:
    with lives(Life, area, RUNTIME) as box:
        if request.param in _OWN_FILESYSTEM:
            box.root = filesystem(request.param) / "storage"
        try:
            open_driver(request.param, str(box.root)).check()
        except UserError as refusal:
            pytest.skip(str(refusal))
        for name in ("file", "gone", "mode", "replaced/old", "moved/below"):
            (box.base / "dir" / name).parent.mkdir(parents=True, exist_ok=True)
            (box.base / "dir" / name).write_text(f"{name}\n")
        found = Drivers(box, request.param)
        yield found
        box.call("rm", "-f", *box.kept())
        box.call("container", "prune", "-f")


def _native(box: Life, *scripts: str) -> str:
    """The output of the last script in a copy of the base, after the others."""
    copy = box.area / "copy"
    subprocess.run(["cp", "-a", box.base, copy], check=True)
    for script in scripts:
        words = ["chroot", copy, "/bin/sh", "-c", script]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    shutil.rmtree(copy)
    return done.stdout


def test_from_the_first_write_to_rm(drivers: Drivers) -> None:
    box = drivers.box
    before = snapshot.take(box.base)
    drivers.say("--name", "kept", "--", "sh", "-c", _SCRIPT)
    assert drivers.say("--name", "kept", "--", "sh", "-c", _LOOK, base=False) == _native(box, _SCRIPT, _LOOK)
    changes = {line for line in drivers.changes("kept") if "/dir" in line}
    # A renamed directory that the upper only refers to has its lower's names.
    assert changes in (_CHANGES, _CHANGES - {"D /dir/replaced/old"})
    assert drivers.size("kept") > 0
    assert box.state("kept")["driver"] == drivers.driver
    assert snapshot.take(box.base) == before
    assert box.ok("rm", "kept") == "kept\n"
    assert drivers.left() == []
    assert bool(drivers.bases()) == (drivers.driver in _BASED)
    box.ok("container", "prune", "-f")
    assert drivers.bases() == []


def test_the_size_is_that_of_the_changes(drivers: Drivers) -> None:
    (drivers.box.base / "large").write_bytes(os.urandom(1 << 20))
    drivers.say("--name", "kept", "--", "sh", "-c", "head -c 100000 /dev/urandom | cat - /data/seed > /new")
    copies = drivers.driver == "vfs"
    assert (drivers.size("kept") > 1 << 20) == copies
    assert drivers.size("kept") >= 100000


def test_two_containers_of_one_lower_do_not_see_each_other(drivers: Drivers) -> None:
    box = drivers.box
    for name in ("one", "two"):
        drivers.detached(name, f"echo {name} > /data/seed; echo {name} > /{name}")
    for name, other in (("one", "two"), ("two", "one")):
        assert box.ok("exec", name, "cat", "/data/seed", f"/{name}") == f"{name}\n{name}\n"
        assert box.ok("exec", name, "sh", "-c", f"test -e /{other} || echo none") == "none\n"
    assert (box.base / "data/seed").read_text() == "seed\n"
    assert {"A /one", "C /data/seed"} <= drivers.changes("one")
    refused(box.call("rm", "one"), "container one is running")
    assert box.ok("rm", "-f", "one") == "one\n"
    assert box.ok("exec", "two", "cat", "/data/seed") == "two\n"
    assert box.ok("rm", "-f", "two") == "two\n"
    assert drivers.left() == []


def test_prune(drivers: Drivers) -> None:
    box = drivers.box
    drivers.say("--name", "ended", "--", "true")
    drivers.detached("runs", "true")
    pruned = json.loads(box.ok("container", "prune", "-f", "--json"))
    assert pruned == {"removed": ["ended"], "bases": []}
    assert box.ok("exec", "runs", "cat", "/data/seed") == "seed\n"
    box.ok("stop", "-t", "0", "runs")
    pruned = json.loads(box.ok("container", "prune", "-f", "--json"))
    assert (pruned["removed"], len(pruned["bases"])) == (["runs"], int(drivers.driver in _BASED))
    assert drivers.left() == []


@pytest.mark.parametrize("remove", [True, False])
def test_a_killed_run_leaves_nothing(drivers: Drivers, remove: bool) -> None:
    box = drivers.box
    words = ["--rm"] if remove else ["--name", "killed"]
    storage = ["-v", "vol:/data", "-v", "/anonymous", "--tmpfs", "/tmp", "-e", f"BOX={box.root}"]
    script = f"echo x > /new; echo y > /data/new; {_LOOP}"
    run = box.start("--storage-driver", drivers.driver, *words, *storage, "--", "sh", "-c", script)
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    inside = _processes_in(box)
    assert inside
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert wait_for(lambda: all(gone(pid) for pid in inside))
    if not remove:
        assert wait_for(lambda: box.state("killed")["state"] == "dead")
        assert wait_for(lambda: box.run("--name", "killed", "--", "true", lower=False).returncode == 0)
        assert drivers.say("--name", "killed", "--", "cat", "/new", base=False) == "x\n"
        assert box.ok("rm", "-v", "killed") == "killed\n"
    assert wait_for(lambda: drivers.left() == []), drivers.left()
    assert (box.root / "volumes/vol/_data/new").read_text() == "y\n"
    assert sorted(path.name for path in (box.root / "volumes").iterdir()) == ["vol"]
    assert box.ok("volume", "rm", "vol") == "vol\n"


def _processes_in(box: Life) -> list[int]:
    """The processes of this test's container, by the environment that it was given."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"BOX={box.root}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def test_storage_is_filled_and_stays(drivers: Drivers) -> None:
    box = drivers.box
    script = "cat /data/seed; echo x > /data/x; echo y > /bound/y; echo z > /tmp/z; ls /tmp"
    words = ("-v", "vol:/data", "-v", f"{box.host}:/bound", "--tmpfs", "/tmp")
    assert drivers.say("--name", "kept", *words, "--", "sh", "-c", script) == "seed\nz\n"
    assert (box.host / "y").read_text() == "y\n"
    assert not {line for line in drivers.changes("kept") if line.endswith(("/x", "/y", "/z"))}
    assert drivers.say("--name", "kept", "--", "cat", "/data/seed", base=False) == "seed\n"
    box.ok("rm", "kept")
    assert drivers.say("--rm", *words, "--", "ls", "/bound", "/data") == "/bound:\ny\n\n/data:\nseed\nx\n"
    assert (box.host / "y").exists()
    assert sorted(os.listdir(box.root / "volumes/vol/_data")) == ["seed", "x"]
    words = ("--rm", "--read-only", "-v", "vol:/data", "--", "sh", "-c", "touch /data/ok; touch /no")
    done = drivers.run(*words)
    assert "Read-only file system" in done.stderr
    assert drivers.left() == []


def test_all_lowers_count(drivers: Drivers) -> None:
    """A whiteout, an opaque directory and an image among them."""
    box = drivers.box
    top = box.area / "top"
    (top / "dir/replaced").mkdir(parents=True)
    (top / "dir/replaced/new").write_text("new\n")
    os.setxattr(top / "dir/replaced", "trusted.overlay.opaque", b"y")
    os.mknod(top / "dir/gone", 0o020000, 0)
    words, shown = ["-l", top], "file\nmode\nmoved\nreplaced\n/dir/replaced:\nnew\n"
    if shutil.which("mksquashfs") and Path("/proc/filesystems").read_text().find("squashfs") > 0:
        image = box.area / "image"
        (box.area / "content").mkdir()
        (box.area / "content/from-image").write_text("x")
        subprocess.run(["mksquashfs", box.area / "content", image, "-quiet"], check=True, capture_output=True)
        words += ["-l", image]
    words += ["-l", box.base]
    script = "ls /dir; echo /dir/replaced:; ls /dir/replaced"
    assert drivers.say("--rm", *words, "--", "sh", "-c", script, base=False) == shown
    if len(words) > 4:
        assert drivers.say("--rm", *words, "--", "cat", "/from-image", base=False) == "x"
    assert drivers.left() == []


def test_an_image_of_the_store(drivers: Drivers) -> None:
    """Two layers, the upper one with a whiteout; the second container finds the base by their names."""
    box = drivers.box
    for name in ("upper", "work", "merged"):
        (box.area / name).mkdir()
    merged, archive = box.area / "merged", f"oci-archive:{box.area}/image.tar:web"
    box.ok("mount", "-l", box.base, "-u", box.area / "upper", "--work", box.area / "work", merged)
    (merged / "dir/gone").unlink()
    (merged / "dir/new").write_text("new\n")
    box.ok("commit", merged, "--image", archive)
    box.ok("umount", merged)
    words = ("--rm", "--image", archive, "--", "ls", "/dir")
    for _ in range(2):
        assert drivers.say(*words, base=False) == "file\nmode\nmoved\nnew\nreplaced\n"
        assert len(drivers.bases()) == int(drivers.driver in _BASED)
    drivers.say("--name", "kept", *words[1:3], "--", "rm", "/dir/new", base=False)
    assert "D /dir/new" in drivers.changes("kept")
    assert drivers.say("--name", "kept", "--", "ls", "/dir", base=False) == "file\nmode\nmoved\nreplaced\n"


def test_a_lower_may_hold_the_storage_root(drivers: Drivers) -> None:
    box = drivers.box
    if drivers.driver in _OWN_FILESYSTEM:
        shutil.copytree(box.base, box.root.parent / "base", symlinks=True)
        box.base = box.root.parent / "base"
        box.root = box.base / "store"
    else:
        box.root = box.base / "var/store"
        (box.base / "var").mkdir()
    inside = f"/{box.root.relative_to(box.base)}"
    script = f"ls -A {inside}; echo x > {inside}/new; cat /data/seed"
    assert drivers.say("--name", "kept", "--", "sh", "-c", script) == "seed\n"
    assert not (box.root / "new").exists()
    assert f"A {inside}/new" in drivers.changes("kept")
    assert not {line for line in drivers.changes("kept") if line.startswith("D ")}
    assert drivers.say("--rm", "--", "ls", "-A", inside) == ""
    box.ok("rm", "kept")
    assert drivers.left() == []


def test_a_base_serves_until_its_lowers_change(drivers: Drivers) -> None:
    box = drivers.box
    if drivers.driver not in _BASED:
        pytest.skip(f"storage driver {drivers.driver} has no bases: it takes the lowers as they are")
    drivers.say("--name", "first", "--", "true")
    (old,) = drivers.bases()
    drivers.say("--rm", "--", "true")
    assert drivers.bases() == [old]
    (box.base / "data/seed").write_text("other\n")
    assert drivers.say("--name", "second", "--", "cat", "/data/seed") == "other\n"
    assert old in drivers.bases()  # the first container has it
    assert drivers.say("--name", "first", "--", "cat", "/data/seed", base=False) == "seed\n"
    box.ok("rm", "first")
    (box.base / "data/seed").chmod(0o600)
    drivers.say("--rm", "--", "true")
    assert old not in drivers.bases()
    assert len(drivers.bases()) == 2


@pytest.mark.parametrize("driver", ["vfs", "btrfs"])
def test_a_creation_that_was_killed_is_made_again(
    root: None, area: Path, filesystem: Callable[..., Path], driver: str
) -> None:
    with lives(Life, area, RUNTIME) as box:
        box.root = filesystem("btrfs") / "storage"
        for number in range(3000):
            (box.base / "data" / str(number)).write_text("x" * 100)
        run = box.start("--storage-driver", driver, "--name", "kept", "--", "true")
        made = ("drivers/btrfs/*/tree/data", "containers/kept/new/data")
        assert wait_for(lambda: any(list(box.root.glob(pattern)) for pattern in made))
        run.send_signal(signal.SIGKILL)
        run.communicate()
        count = ("sh", "-c", "ls /data | busybox wc -l")
        assert box.say("--storage-driver", driver, "--name", "kept", "--", *count) == "3001\n"
        box.ok("rm", "kept")
        box.ok("container", "prune", "-f")
        assert Drivers(box, driver).left() == []
        assert list(box.root.glob("drivers/btrfs/*/tree")) == []


def test_subvolumes_of_the_command_are_removed(
    root: None, area: Path, filesystem: Callable[..., Path]
) -> None:
    with lives(Life, area, RUNTIME) as box:
        box.root = filesystem("btrfs") / "storage"
        box.ok("run", "--storage-driver", "btrfs", "--name", "kept", "-l", box.base, "--", "true")
        tree = box.root / "containers/kept/tree"
        btrfs.create(str(tree / "data/inner"))
        btrfs.create(str(tree / "data/inner/most"))
        btrfs.snapshot(str(tree / "data/inner"), str(tree / "snapshot"))
        (tree / "data/inner/most/file").touch()
        assert box.ok("rm", "kept") == "kept\n"
        assert Drivers(box, "btrfs").left() == []


def test_a_kept_container_remembers_its_driver(root: None, area: Path) -> None:
    with lives(Life, area, RUNTIME) as box:
        configuration = area / "configuration"
        environment = {"XDG_CONFIG_HOME": str(configuration)}
        (configuration / "unionfs").mkdir(parents=True)
        file = configuration / "unionfs/config.toml"
        file.write_text('storage-driver = "vfs"\n')
        shown = cli_calls.succeed(box.call("config", "show", **environment))
        assert ["storage-driver", "vfs", str(file)] in [line.split() for line in shown.splitlines()]
        assert box.run("--name", "kept", "--", "touch", "/new", **environment).returncode == 0
        assert box.state("kept")["driver"] == "vfs"
        # Without the configuration, and with another one.
        assert box.say("--name", "kept", "--", "ls", "/new", lower=False) == "/new\n"
        done = box.run("--name", "kept", "--storage-driver", "union", "--", "true", lower=False)
        refused(done, "container kept was created with the storage driver vfs", "omit --storage-driver union")
        assert done.returncode == 125
        # An upper of the caller's own needs the union.
        assert box.run("--rm", "-u", "tmpfs", "--", "touch", "/x", **environment).returncode == 0
        file.write_text('storage-driver = "overlay"\n')
        done = box.run("--rm", "--", "true", **environment)
        assert done.stderr == f"unionfs: {file}: invalid storage-driver = 'overlay'; did you mean overlay2?\n"
        assert done.returncode == 125
        assert box.kept() == ["kept"]


def test_what_cannot_be(root: None, area: Path) -> None:
    with lives(Life, area, RUNTIME) as box:
        done = box.run("--rm", "--storage-driver", "overlay", "--", "true")
        assert done.stderr == "unionfs: unknown storage driver overlay; did you mean overlay2?\n"
        for words, *parts in (
            (["aufs"], "unknown storage driver aufs; the known ones are union, overlay2, btrfs,"),
            (["vfs", "-u", "tmpfs"], "-u tmpfs needs the storage driver union"),
            (["btrfs"], f"btrfs needs the storage root on btrfs, and {box.root} is on", "give a --root"),
        ):
            refused(box.run("--rm", "--storage-driver", *words, "--", "true"), *parts)
        assert box.kept() == []


@pytest.mark.parametrize(
    ("driver", "part"),
    [("zfs", "this kernel has no ZFS; load the module zfs"),
     ("devicemapper", "this kernel has no device-mapper; load the modules dm_mod")],
)  # fmt: skip
def test_a_missing_module_is_named(root: None, area: Path, driver: str, part: str) -> None:
    with lives(Life, area, RUNTIME) as box:
        done = box.run("--rm", "--storage-driver", driver, "--", "true")
        if done.returncode == 0 or "this kernel has no" not in done.stderr:
            pytest.skip(f"this kernel has what {driver} needs")
        refused(done, part, "choose another driver")
        assert box.kept() == []


def test_without_root(root: None, area: Path) -> None:
    """vfs works for an ordinary user; the others need root."""
    with lives(Life, area, RUNTIME) as box:
        home = area / "home"
        home.mkdir()
        for path in (home, *box.base.rglob("*"), box.base):
            os.chown(path, user_calls.UID, user_calls.UID, follow_symlinks=False)
        python = _python_of_all()
        uid = str(user_calls.UID)
        user = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "--inh-caps=-all"]
        store = home / "store"

        def run(*words: str | Path) -> cli_calls.Done:
            environment = {"HOME": str(home), "XDG_RUNTIME_DIR": str(home), "UNIONFS_ROOT": str(store)}
            return cli_calls.call([*user, python, "-m", "unionfs"], *words, env=environment)

        script = "echo x > /new; rm /data/seed; ls /new /data"
        words = ("-l", box.base, "--name", "kept", "--", "sh", "-c")
        assert cli_calls.succeed(run("run", "--storage-driver", "vfs", *words, script)) == "/new\n\n/data:\n"
        assert run("run", "--name", "kept", "--", "cat", "/new").stdout == "x\n"
        assert {"A /new", "D /data/seed"} <= set(run("container", "diff", "kept").stdout.splitlines())
        done = run("run", "--name", "kept", "-v", "/data", "--", "true")
        refused(done, "vfs cannot mount volumes without root")
        assert cli_calls.succeed(run("rm", "kept")) == "kept\n"
        for driver in ("overlay2", "btrfs", "zfs", "devicemapper"):
            done = run("run", "--rm", "--storage-driver", driver, "-l", box.base, "--", "true")
            refused(done, f"storage driver {driver} ", "needs root", "as root")
        assert os.listdir(store / "containers") == []


@pytest.mark.parametrize("driver", ["overlay2", "vfs"])
def test_in_a_user_namespace(root: None, area: Path, driver: str) -> None:
    with lives(Life, area, RUNTIME) as box:
        own = ["unshare", "-rm", sys.executable, "-m", "unionfs"]
        if cli_calls.call(["unshare", "-rm", "true"]).returncode != 0:
            pytest.skip("user namespaces cannot be created here")

        def run(*words: str | Path) -> str:
            return cli_calls.succeed(cli_calls.call(own, *words, env=box.environment()))

        script = "echo x > /new; rm /data/seed; echo y > /tmp/y; ls /new /data"
        words = ("-l", box.base, "-v", "vol:/tmp", "--name", "kept", "--", "sh", "-c")
        assert run("run", "--storage-driver", driver, *words, script) == "/new\n\n/data:\n"
        assert run("run", "--name", "kept", "--", "cat", "/new") == "x\n"
        assert {"A /new", "D /data/seed"} <= set(run("container", "diff", "kept").splitlines())
        assert run("rm", "kept") == "kept\n"
        assert (box.root / "volumes/vol/_data/y").read_text() == "y\n"
        assert Drivers(box, driver).left() == []
        words = ("run", "--rm", "--storage-driver", "btrfs", "-l", box.base, "--", "true")
        done = cli_calls.call(own, *words, env=box.environment())
        refused(done, "storage driver btrfs needs root, and that of a user namespace has too few rights")


def _python_of_all() -> str:
    """A Python with the package's requirements that an ordinary user may run."""
    probe = ["setpriv", "--reuid", str(user_calls.UID), "--clear-groups"]
    for python in (sys.executable, "/usr/bin/python3"):
        done = cli_calls.call([*probe, python], "-c", "import unionfs.cli.main, unionfs.core.places")
        if done.returncode == 0:
            return python
    pytest.skip("an ordinary user cannot run this Python")
