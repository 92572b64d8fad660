"""`mount --image`, `commit` and `run --image` through the command line."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.mount import cli_calls
from tests.mount.cli_calls import Done, Place, listed, refused, session_words, succeed
from tests.mount.run_calls import BUSYBOX
from tests.mount.user_calls import UID, Host
from tests.support import areas, mounting
from tests.support.edits import OPERATIONS, apply, build
from tests.support.layers import (
    Layout,
    device,
    difference,
    directory,
    file,
    hard_link,
    nothing_left,
    opaque,
    saved,
    shown,
    symlink,
    tar,
    whiteout,
)
from unionfs.images.layers import export_layer, import_layer
from unionfs.images.rules import DEFAULTS

BASE = tar([
    directory("d", uid=5), file("d/a", b"a" * 5000), file("d/b", b"b"), hard_link("d/link", "d/a"),
    directory("gone"), file("gone/x", b"x"), file("f", b"f", mode=0o4755), symlink("s", "d/a"),
])  # fmt: skip
MIDDLE = tar([directory("d", uid=6), whiteout("d/b"), whiteout("gone"), file("d/c", b"c" * 100_000)])
TOP = tar([directory("d", uid=7), opaque("d"), file("d/only", b"1"), file("f", b"2")])


class Images:
    """An area with a storage root of its own."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.root = place.root / "storage"

    def call(self, *words: str | Path) -> Done:
        return cli_calls.unionfs(*words, env={"UNIONFS_ROOT": str(self.root)})

    def archive(self, *layers: bytes, name: str = "image.tar", **config: object) -> str:
        return Layout(*layers, config=config).archive(self.place.root / name)

    def layers(self, image: str) -> list[Path]:
        """The directories of an image's layers, topmost first."""
        (details,) = listed(self.call("image", "inspect", image))
        return [Path(layer["Paths"][0]) for layer in reversed(details["Layers"])]


@pytest.fixture
def images(place: Place) -> Images:
    return Images(place)


def test_a_mount_shows_what_the_kernel_shows(images: Images, kernel_overlay: None, session: str) -> None:
    reference = images.archive(BASE, MIDDLE, TOP)
    words = session_words(session)
    merged = images.place.merged
    for layers in (1, 2, 3):
        reference = images.archive(*(BASE, MIDDLE, TOP)[:layers], name=f"{layers}.tar")
        succeed(images.call("mount", *words, "--image", reference, merged))
        found = shown(merged)
        succeed(images.call("umount", merged))
        (image,) = listed(images.call("image", "ls", "--json"))[-1:]
        lowers = images.layers(image["Id"])
        with mounting.kernel_mounted(images.place.root, lowers=lowers) as kernel:
            assert difference(found, shown(kernel.mountpoint)) == {}


@pytest.mark.slow_on("direct-passthrough", "direct-cached")
def test_changes_are_committed_as_an_image(images: Images, kernel_overlay: None, session: str) -> None:
    place = images.place
    reference = images.archive(BASE, MIDDLE, Env=["A=1"])
    succeed(images.call(
        "mount", *session_words(session), "--image", reference, "-u", place.upper, "-w", place.work,
        place.merged,
    ))  # fmt: skip
    (place.merged / "d").rename(place.merged / "moved")
    (place.merged / "moved/a").unlink()
    (place.merged / "f").chmod(0o600)
    with open(place.merged / "new", "wb") as out:
        out.write(b"new" * 100_000)
        # Not closed: what the kernel has of it only in its cache belongs to the image, too.
        out.flush()
        done = images.call(
            "commit", place.merged, "--image", f"oci-archive:{place.root}/new.tar:v2", "-m", "changed"
        )
    identity = succeed(done).strip()
    wanted = shown(place.merged)
    succeed(images.call("umount", place.merged))
    succeed(images.call("mount", "--image", f"oci-archive:{place.root}/new.tar", place.merged))
    assert difference(shown(place.merged), wanted) == {}
    succeed(images.call("umount", place.merged))
    (details,) = listed(images.call("image", "inspect", identity))
    assert details["Names"] == ["v2"]
    assert details["Config"]["config"] == {"Env": ["A=1"]}
    assert details["Config"]["history"][-1]["comment"] == "changed"
    # The layers below are the old ones, byte for byte.
    (old,) = (one for one in listed(images.call("image", "ls", "--json")) if one["Id"] != details["Id"])
    assert [layer["DiffId"] for layer in details["Layers"]][:2] == [one["DiffId"] for one in old["Layers"]]


@pytest.mark.slow_on("direct-passthrough", "direct-cached")
def test_a_mount_of_directories_is_committed_whole(images: Images, session: str) -> None:
    place = images.place
    place.mount(*session_words(session))
    (place.merged / "base").unlink()
    (place.merged / "new").write_text("new")
    wanted = shown(place.merged)
    succeed(images.call("commit", place.merged, "--image", f"oci-archive:{place.root}/new.tar"))
    succeed(images.call("umount", place.merged))
    succeed(images.call("mount", "--image", f"oci-archive:{place.root}/new.tar", place.merged))
    assert difference(shown(place.merged), wanted) == {}
    assert sorted(os.listdir(place.merged)) == ["deep", "new"]


def test_layers_of_a_removed_archive_are_written_anew(images: Images) -> None:
    place = images.place
    reference = images.archive(BASE, MIDDLE)
    succeed(images.call("mount", "--image", reference, "-u", "tmpfs", place.merged))
    (place.merged / "n").touch()
    wanted = shown(place.merged)
    (place.root / "image.tar").unlink()
    done = images.call("commit", place.merged, "--image", f"oci-archive:{place.root}/new.tar")
    assert done.returncode == 0
    assert "written anew" in done.stderr
    succeed(images.call("umount", place.merged))
    succeed(images.call("mount", "--image", f"oci-archive:{place.root}/new.tar", place.merged))
    assert difference(shown(place.merged), wanted) == {}


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(operations=st.lists(OPERATIONS, min_size=15, max_size=40))
def test_random_changes_of_a_union_are_the_same_in_a_layer(
    root: None, session: str, operations: list[tuple[object, ...]]
) -> None:
    # With an upper that came out of an archive there is no index: --session pyfuse3 shows each name of a
    # lower's file as a file of its own then.
    names = session != "pyfuse3"
    with areas.area() as area:
        for name in ("lower", "upper", "work", "work2"):
            (area / name).mkdir()
        build(area / "lower")
        layers = {"lowers": [area / "lower"], "session": session}
        with mounting.mounted(area, upper=area / "upper", work=area / "work", **layers) as mount:
            for one in operations:
                apply(mount.mountpoint, one)
            wanted = shown(mount.mountpoint, names=names)
        output, again = str(area / "layer.tar"), str(area / "again")
        lower, work = str(area / "lower"), str(area / "work")
        export_layer(str(area / "upper"), [lower], output, work=work, userxattr=False)
        import_layer(output, again, userxattr=False, rules=DEFAULTS)
        with mounting.mounted(area, upper=area / "again", work=area / "work2", **layers) as mount:
            assert difference(shown(mount.mountpoint, names=names), wanted) == {}


def test_an_image_in_use_is_not_removed(images: Images) -> None:
    place = images.place
    reference = images.archive(BASE, TOP)
    succeed(images.call("mount", "--image", reference, place.merged))
    (one,) = listed(images.call("image", "ls", "--json"))
    refused(images.call("image", "rm", one["Id"]), "cannot be removed", str(place.merged))
    assert succeed(images.call("image", "prune", "--all")) == ""
    assert (place.merged / "f").read_text() == "2"
    (details,) = listed(images.call("image", "inspect", one["Id"]))
    assert details["Layers"][0]["UsedBy"] == [f"the mount {place.merged}"]
    succeed(images.call("umount", place.merged))
    succeed(images.call("image", "rm", one["Id"]))
    assert listed(images.call("image", "ls", "--json")) == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--image", "oci-archive:/nowhere"), ("/nowhere", "no such file")),
        (("--image", "docker://debian"), ("skopeo copy",)),
        (("--image", "nothing"), ("there is no image nothing", "unionfs image ls")),
    ],
)
def test_images_that_cannot_be_mounted(
    images: Images, words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    refused(images.call("mount", *words, images.place.merged), *parts)
    assert cli_calls.mounts_at(images.place.merged) == []


@pytest.mark.parametrize("command", ["mount", "run", "image import", "layer import", "layer squash"])
def test_hostile_archives_are_refused_by_each_command(images: Images, command: str) -> None:
    """With one sentence, and nothing is left: no layer, no image, no mount, no file."""
    place = images.place
    hostile = {
        "leads out of the layer": [file("../escaped")],
        "--any-name": [file("a\nb")],
    }
    for words, members in hostile.items():
        layer = tar([directory("d"), *members])
        reference = Layout(tar([file("good")]), layer).archive(place.root / "image.tar")
        (place.root / "layer.tar.gz").write_bytes(gzip.compress(layer))
        before = place.snapshot()
        arguments: dict[str, tuple[str | Path, ...]] = {
            "mount": ("mount", "--image", reference, "-u", place.upper, "-w", place.work, place.merged),
            "run": ("run", "--rm", "--image", reference, "--", "/bin/true"),
            "image import": ("image", "import", reference),
            "layer import": ("layer", "import", place.root / "layer.tar.gz", place.root / "out"),
            "layer squash": ("layer", "squash", place.root / "layer.tar.gz", "-o", place.root / "out"),
        }
        refused(images.call(*arguments[command]), "is refused: ", words)
        assert cli_calls.mounts_at(place.merged) == []
        assert nothing_left(images.root)
        if images.root.exists():
            shutil.rmtree(images.root)
        assert place.snapshot() == before
        assert "escaped" not in {*os.listdir("/tmp"), *os.listdir(place.root), *os.listdir(place.root.parent)}


def test_commit_refuses_what_it_cannot_write(images: Images) -> None:
    place = images.place
    for mounted, target, words in (
        (False, f"oci-archive:{place.root}/x.tar", "not an active unionfs mount"),
        (True, f"docker-archive:{place.root}/x.tar", "skopeo copy"),
        (True, "oci-archive:/nowhere/x.tar", "/nowhere"),
    ):
        if mounted and not cli_calls.mounts_at(place.merged):
            place.mount()
        refused(images.call("commit", place.merged, "--image", target), words)
    assert not (place.root / "x.tar").exists()


# -- containers ------------------------------------------------------------------------------------------


@pytest.fixture
def busybox(images: Images) -> Images:
    if BUSYBOX is None or shutil.which("bwrap") is None:
        pytest.skip("busybox or bubblewrap is not installed")
    applets = ("sh", "id", "echo", "cat", "env", "pwd", "touch", "ls", "stat")
    base = tar([
        directory("bin"), file("bin/busybox", Path(BUSYBOX).read_bytes(), mode=0o755),
        *(symlink(f"bin/{name}", "busybox") for name in applets),
        directory("etc"), directory("srv", uid=1000, gid=1001), directory("tmp"),
        file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:app:/srv:/bin/sh\n"),
        file("etc/group", b"root:x:0:\napp:x:1001:\nmore:x:1002:app\n"),
    ])  # fmt: skip
    saved(images.place.root / "box.tar", [base], ["example.org/box:latest"], {
        "Entrypoint": ["/bin/echo", "entry"], "Cmd": ["cmd"], "Env": ["A=image", "B=image"], "User": "app",
        "WorkingDir": "/srv/work",
    })  # fmt: skip
    succeed(images.call("image", "import", f"docker-archive:{images.place.root}/box.tar"))
    return images


def say(images: Images, *words: str) -> str:
    return succeed(images.call("run", "--rm", *words))


def test_the_images_configuration(busybox: Images) -> None:
    assert say(busybox, "--image", "box") == "entry cmd\n"
    assert say(busybox, "--image", "box", "--", "words", "here") == "entry words here\n"
    shell = ("--image", "box", "--entrypoint", "", "-e", "B=caller", "--", "sh", "-c")
    assert say(busybox, *shell, "echo $A $B $HOME; pwd") == "image caller /srv\n/srv/work\n"
    assert say(busybox, "--image", "box", "--workdir", "/tmp", "--entrypoint", "pwd") == "/tmp\n"


def test_the_images_user(busybox: Images) -> None:
    shell = ("--entrypoint", "", "--", "sh", "-c")
    box = ("--image", "box")
    program = "id -u; id -g; touch /srv/mine && stat -c %u:%g /srv/mine; touch /etc/x 2>/dev/null || echo no"
    assert say(busybox, *box, *shell, program).split() == ["1000", "1001", "1000:1001", "no"]
    assert say(busybox, *box, "--user", "0", *shell, "id -u; touch /etc/x").split() == ["0"]
    assert say(busybox, *box, "--user", "3000:more", *shell, "id -u; id -g").split() == ["3000", "1002"]
    status = say(busybox, *box, *shell, "cat /proc/self/status")
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    refused(busybox.call("run", "--rm", *box, "--user", "nobody", *shell, "id"), "not in /etc/passwd")
    refused(busybox.call("run", "--rm", *box, "--privileged", *shell, "id"), "--user root")


def test_files_of_an_images_user_are_that_users_outside(busybox: Images) -> None:
    succeed(busybox.call(
        "run", "--name", "cc", "--image", "box", "--entrypoint", "", "--", "touch", "/srv/kept"
    ))  # fmt: skip
    status = (busybox.root / "containers/cc/upper/srv/kept").stat()
    assert (status.st_uid, status.st_gid) == (1000, 1001)
    # A kept container remembers its image.
    again = busybox.call("run", "--name", "cc", "--entrypoint", "sh", "--", "-c", "echo $A; ls /srv")
    assert succeed(again) == "image\nkept\nwork\n"
    refused(busybox.call("image", "rm", "box"), "container cc")
    succeed(busybox.call("rm", "cc"))
    succeed(busybox.call("image", "rm", "box"))


def test_no_command_at_all(busybox: Images) -> None:
    reference = Layout(tar([directory("bin")])).archive(busybox.place.root / "empty.tar")
    refused(busybox.call("run", "--rm", "--image", reference), "names no command")
    refused(busybox.call("run", "--rm", "-l", busybox.place.lower), "missing argument")
    refused(busybox.call("run", "--name", "cc", "-l", busybox.place.lower), "no command is given")


# -- ordinary users --------------------------------------------------------------------------------------


def test_an_ordinary_users_image(host: Host) -> None:
    place = host.place
    reference = Layout(BASE, MIDDLE).archive(place.root / "image.tar")
    bad = Layout(tar([device("null", 1, 3)])).archive(place.root / "device.tar")
    storage = place.root / "storage"
    storage.mkdir()
    os.chown(storage, UID, UID)
    words = ("--root", storage)
    layers = ("--image", reference, "-u", place.upper, "-w", place.work)
    done = host.unionfs("mount", *words, *layers, place.merged)
    assert done.returncode == 0, done.stderr
    assert "only root can restore owners" in done.stderr
    program = f"cd {place.merged} && ls d; ls gone; cat s | wc -c; stat -c %u:%a f && rm d/c"
    inside = host.run("sh", "-c", program)
    assert inside.stdout.split() == ["a", "c", "link", "5000", f"{UID}:755"]
    out = place.root / "out"
    out.mkdir()
    os.chown(out, UID, UID)
    done = host.unionfs("commit", *words, place.merged, "--image", f"oci-archive:{out}/new.tar")
    assert (done.returncode, done.stderr) == (0, "")
    succeed(host.unionfs("umount", place.merged))
    done = host.unionfs("mount", *words, "--image", f"oci-archive:{out}/new.tar", place.merged)
    assert done.returncode == 0, done.stderr
    assert host.run("ls", place.merged / "d").stdout.split() == ["a", "link"]
    succeed(host.unionfs("umount", place.merged))
    refused(host.unionfs("mount", *words, "--image", bad, place.merged), "null is a device file")
    done = host.unionfs("image", "import", *words, "--skip-devices", bad)
    assert done.returncode == 0
    assert "device files were left out" in done.stderr
    exported = host.unionfs("layer", "export", "-u", place.upper, "-o", out / "layer.tar")
    assert exported.returncode == 0, exported.stderr
    listing = subprocess.run(["tar", "tf", out / "layer.tar"], capture_output=True, text=True, check=True)
    assert "./d/.wh.c" in listing.stdout
    (place.upper / "secret").mkdir(mode=0o700)
    secret = host.unionfs("layer", "export", "-u", place.upper, "-o", out / "more.tar")
    refused(secret, "secret cannot be read: permission denied")
    assert not (out / "more.tar").exists()
    (one, *_) = json.loads(host.unionfs("image", "ls", "--json", *words).stdout)
    assert stat.S_IMODE(storage.stat().st_mode) & 0o022 == 0
    assert one["Layers"][0]["Paths"][0].startswith(f"{storage}/images/layers/user/")


def test_the_progress_of_unpacking(images: Images) -> None:
    """As lines on demand, for each command that unpacks; else nothing, as stderr is no terminal."""
    reference = images.archive(BASE, MIDDLE, TOP)
    place, layer = images.place, images.place.root / "layer.tar"
    layer.write_bytes(BASE)
    for what, words in (
        (f"unpacking {reference}", ("mount", "--image", reference, place.merged)),
        (f"unpacking {reference}", ("image", "import", reference)),
        (f"import of {layer}", ("layer", "import", layer, place.root / "new")),
        ("unpacking", ("layer", "squash", layer, layer, "-o", place.root / "both.tar")),
    ):
        done = images.call(*words, "--progress", "plain")
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1] == f"unionfs: {what}: done"
        if words[0] == "mount":
            succeed(images.call("umount", place.merged))
        for path in (place.root / "new", place.root / "both.tar"):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
        succeed(images.call(*words))
        if words[0] == "mount":
            succeed(images.call("umount", place.merged))
