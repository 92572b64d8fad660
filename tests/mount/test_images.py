"""Lowers in image files: the tree, what the host sees of them, and how they end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.mount.cli_calls import FUSE_UNIONFS, Place, call, gone, refused, succeed, unionfs, wait_for
from tests.mount.user_calls import Host
from tests.oracle import normalise
from tests.support import areas, snapshot
from tests.support.mounting import kernel_mounted, mounted

CLOCK = normalise.Clock.start()
KINDS = ("squashfs", "erofs", "ext4", "xfs")


def _run(*command: str | Path) -> None:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout + done.stderr


def make_image(source: Path, image: Path, kind: str) -> Path:
    """An image of a directory."""
    if kind == "squashfs":
        _run("mksquashfs", source, image, "-quiet", "-no-progress")
    elif kind == "erofs":
        _run("mkfs.erofs", "--quiet", image, source)
    else:
        with image.open("wb") as file:
            file.truncate((16 if kind == "ext4" else 320) << 20)
        _run(*(("mkfs.ext4", "-q", "-F") if kind == "ext4" else ("mkfs.xfs", "-q", "-f")), image)
        where = image.parent / "filling"
        where.mkdir(exist_ok=True)
        _run("mount", "-o", "loop", image, where)
        try:
            shutil.rmtree(where / "lost+found", ignore_errors=True)
            _run("cp", "-a", f"{source}/.", where)
        finally:
            _run("umount", where)
    return image


def _attached(image: Path) -> list[str]:
    """The loop devices of an image."""
    done = subprocess.run(["losetup", "-n", "-O", "NAME", "-j", image], capture_output=True, text=True)
    return done.stdout.split()


@pytest.fixture
def source(place: Place) -> Path:
    """A tree with files, a directory, a link and xattrs."""
    source = place.root / "source"
    (source / "d/sub").mkdir(parents=True)
    (source / "d/file").write_text("from the image\n" * 1000)
    (source / "d/sub/x").write_text("x")
    (source / "d/random").write_bytes(os.urandom(1 << 16))
    (source / "link").symlink_to("d/file")
    os.setxattr(source / "d/file", "user.mine", b"1")
    os.chown(source / "d/file", 1, 2)
    (source / "d").chmod(0o750)
    return source


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree(kernel_overlay: None, place: Place, source: Path, session: str, kind: str) -> None:
    """As over a directory with the same content, before and after changes."""
    image = make_image(source, place.root / f"lower.{kind}", kind)
    for name in ("k", "k/upper", "k/work"):
        (place.root / name).mkdir()
    changes = (
        "chmod 600 d/file; echo more >> d/file; rm d/sub/x; mv link moved; mkdir d/new; touch d/new/y; "
        "rm -r d/sub; ln moved second"
    )
    with (
        mounted(
            place.root, lowers=[place.lower, image], upper=place.upper, work=place.work, session=session
        ) as mount,
        kernel_mounted(
            place.root / "k",
            lowers=[place.lower, source],
            upper=place.root / "k/upper",
            work=place.root / "k/work",
        ) as kernel,
    ):
        for command in ("true", changes):
            for top in (mount.mountpoint, kernel.mountpoint):
                subprocess.run(["sh", "-ec", command], cwd=top, check=True)
            sides = [snapshot.take(top) for top in (mount.mountpoint, kernel.mountpoint)]
            lines = normalise.compare_trees(sides[0], sides[1], CLOCK, lambda path: False)
            assert not lines, "\n".join(lines[:20])
    assert wait_for(lambda: not _attached(image))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["umount", "kill"])
def test_the_host_sees_nothing(place: Place, source: Path, kind: str, end: str) -> None:
    """No mount in any table but the union, and no loop device once the daemon has ended, however that is."""
    image = make_image(source, place.root / f"lower.{kind}", kind)
    succeed(unionfs("mount", "-l", image, "-u", place.upper, "-w", place.work, place.merged))
    pid = place.pid()
    assert (place.merged / "d/sub/x").read_text() == "x"
    devices = _attached(image)
    assert len(devices) <= 1
    for process in ("self", str(pid)):
        table = Path(f"/proc/{process}/mountinfo").read_text()
        assert not [name for name in (str(image), *devices) if f" {name} " in table]
    (shown,) = [
        one for one in json.loads(unionfs("ls", "--json").stdout) if one["mountpoint"] == str(place.merged)
    ]
    assert shown["layers"] == [str(place.upper), str(image)]
    assert json.loads(unionfs("inspect", "--json", place.merged).stdout)["settings"]["lowers"] == [str(image)]
    (place.merged / "d/sub/x").unlink()
    (place.merged / "new").touch()
    assert succeed(unionfs("diff", place.merged)) == "C /d\nC /d/sub\nD /d/sub/x\nA /new\n"
    if end == "kill":
        os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: gone(pid))
        areas.detach(place.merged)
    else:
        succeed(unionfs("umount", place.merged))
    assert wait_for(lambda: not _attached(image))
    given = ("-u", place.upper, "-l", image)
    assert succeed(unionfs("diff", *given)) == "C /d\nC /d/sub\nD /d/sub/x\nA /new\n"
    assert succeed(unionfs("check", *given)) == ""
    assert wait_for(lambda: not _attached(image))


def test_as_podman_names_it(place: Place, source: Path) -> None:
    image = make_image(source, place.root / "lower.img", "squashfs")
    data = f"lowerdir={place.lower}:{image},upperdir={place.upper},workdir={place.work}"
    succeed(call(FUSE_UNIONFS, "-o", data, place.merged))
    assert sorted(os.listdir(place.merged)) == ["base", "d", "link"]


def test_an_upper_in_memory(place: Place, source: Path) -> None:
    """Its root has the owner and mode of the image's, which may be in use by another union."""
    source.chmod(0o711)
    image = make_image(source, place.root / "lower.xfs", "xfs")
    succeed(unionfs("mount", "-l", image, place.lower2))
    succeed(unionfs("mount", "-l", image, "-u", "tmpfs:size=4m", place.merged))
    assert place.merged.stat().st_mode & 0o777 == 0o711
    (place.merged / "d/file").write_text("new")
    assert (place.lower2 / "d/file").read_text() == "from the image\n" * 1000


def test_refused(place: Place, source: Path) -> None:
    """One sentence each: no filesystem, half an image, an image that something may write, a journal."""
    mount = ("mount", place.merged)
    odd = place.root / "odd.img"
    odd.write_bytes(b"x" * 4096)
    refused(unionfs(*mount, "-l", odd), str(odd), "is neither a directory", "name one of these")
    odd.write_bytes(b"")
    refused(unionfs(*mount, "-l", odd), "is neither a directory")
    for kind in ("squashfs", "ext4"):
        image = make_image(source, place.root / f"whole.{kind}", kind)
        half = place.root / f"half.{kind}"
        half.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
        refused(unionfs(*mount, "-l", half), str(half), f"cannot be mounted as {kind}")
        assert not _attached(half)
    _run("mount", "-o", "loop", image, place.lower2)
    try:
        refused(unionfs(*mount, "-l", image), "in use by /dev/loop", "unmount that first")
        refused(unionfs("diff", "-u", place.upper, "-l", image), "in use by /dev/loop")
        (place.lower2 / "unsaved").touch()
        os.sync()
        dirty = place.root / "dirty.ext4"
        dirty.write_bytes(image.read_bytes())
    finally:
        _run("umount", place.lower2)
    refused(unionfs(*mount, "-l", dirty), "mount it writable once")
    fifo = place.root / "fifo"
    os.mkfifo(fifo)
    refused(unionfs(*mount, "-l", fifo), "is not a directory")


def test_an_ordinary_user_is_refused(host: Host, place: Place, source: Path) -> None:
    image = make_image(source, place.root / "lower.squashfs", "squashfs")
    image.chmod(0o644)
    refused(host.unionfs("mount", "-l", image, place.merged), str(image), "only root can mount")
