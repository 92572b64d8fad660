"""What is refused before anything changes, in this process: no mount is made."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.mount.user_calls import UID
from tests.support import syscalls
from tests.support.worker import REPOSITORY
from unionfs.daemon import fuse, live, preflight, runtime
from unionfs.daemon.settle import settle
from unionfs.errors import DeadMountError, UserError
from unionfs.settings.mount import MountSettings
from unionfs.sys.mountinfo import mounted_at, read_mountinfo
from unionfs.sys.process import start_time


class Layers:
    """Layers of a mount that can be made; and settings with some of them replaced."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("lower", "lower2", "upper", "work", "merged"):
            (root / name).mkdir()

    def settings(self, **paths: str | Path | None) -> MountSettings:
        found: dict[str, Any] = {name: self.root / name for name in ("lower", "upper", "work", "merged")}
        found |= {name: path if path is None else self.root / path for name, path in paths.items()}
        lowers = tuple(str(found[name]) for name in ("lower", "lower2") if name in found)
        upper, work = (None if found[name] is None else str(found[name]) for name in ("upper", "work"))
        settings = settle("/m", lowers=["/l"], upper="/u", work="/w", trusted_xattrs=os.geteuid() == 0)
        return replace(settings, mountpoint=str(found["merged"]), lowers=lowers, upper=upper, work=work)

    def refused(self, **paths: str | Path | None) -> str:
        """Why a mount with these layers is refused."""
        with pytest.raises(UserError) as caught:
            preflight.check(self.settings(**paths))
        return str(caught.value).replace(f"{self.root}/", "")


@pytest.fixture
def layers(root: None, area: Path, monkeypatch: pytest.MonkeyPatch) -> Layers:
    """On a filesystem with all features, with a registry of their own."""
    found, registry = Layers(area), area / "registry"
    monkeypatch.setattr(runtime, "candidates", lambda: [str(registry)])
    runtime.runtime_directory().close()
    return found


@pytest.fixture
def bound(layers: Layers) -> Iterator[Callable[[str, str], None]]:
    """Bind mounts, or a tmpfs if nothing is to be bound, below the layers' directory."""
    made = []

    def bind(source: str, target: str) -> None:
        place = layers.root / target
        place.mkdir(exist_ok=True)
        if source:
            syscalls.mount(str(layers.root / source), place, "", syscalls.MS_BIND)
        else:
            syscalls.mount("t", place, "tmpfs", 0, "size=64k")
        made.append(place)

    try:
        yield bind
    finally:
        for place in reversed(made):
            syscalls.umount(place, syscalls.MNT_DETACH)


def test_what_can_be_mounted(layers: Layers) -> None:
    """Nothing is changed by the check, and nothing is left open."""
    fds = os.listdir("/proc/self/fd")
    preflight.check(layers.settings())
    preflight.check(layers.settings(lower2="lower2"))
    preflight.check(layers.settings(upper=None, work=None))
    preflight.check(layers.settings(merged="lower"))  # the lower is opened before
    assert os.listdir("/proc/self/fd") == fds
    assert [list(path.iterdir()) for path in sorted(layers.root.iterdir())] == [[]] * 6


def test_layers_that_are_not_there(layers: Layers) -> None:
    (layers.root / "file").touch()
    (layers.root / "loop").symlink_to("loop")
    assert layers.refused(lower="none") == "lower none does not exist; check the path."
    assert layers.refused(lower2="none") == "lower none does not exist; check the path."
    for name in ("upper", "work"):
        assert layers.refused(**{name: "none"}) == f"{name} none does not exist; make it with mkdir."
        assert layers.refused(**{name: "file"}) == f"{name} file is not a directory; name a directory."
        assert layers.refused(**{name: "loop"}).startswith(f"{name} loop cannot be used: ")
    assert layers.refused(merged="none") == "mountpoint none does not exist; make it with mkdir."
    assert layers.refused(merged="file") == "mountpoint file is not a directory; name a directory."
    assert layers.refused(merged="/").startswith("mountpoint / is the root directory")
    assert layers.refused(lower="file").startswith("lower file is neither a directory nor a squashfs")


def test_layers_in_each_other(layers: Layers) -> None:
    for name in ("lower/in", "upper/in", "work/in", "uppermost", "workshop", "lower/in/deep"):
        (layers.root / name).mkdir()
    assert (
        layers.refused(work="upper")
        == "work upper is the same directory as upper upper; put work beside upper."
    )
    assert layers.refused(work="upper/in") == "work upper/in is inside upper upper; put work beside upper."
    assert layers.refused(upper="work/in") == "upper work/in is inside work work; put work beside upper."
    for more, words in (
        ({"lower": "upper"}, "upper upper and lower upper"),
        ({"lower": "upper/in"}, "lower upper/in and upper upper"),
        ({"lower2": "upper/in"}, "lower upper/in and upper upper"),
        ({"upper": "lower/in"}, "upper lower/in and lower lower"),
        ({"upper": "lower/in/deep"}, "upper lower/in/deep and lower lower"),
        ({"lower": "work"}, "work work and lower work"),
        ({"lower": "work/in"}, "lower work/in and work work"),
        ({"work": "lower/in"}, "work lower/in and lower lower"),
    ):
        assert layers.refused(**more).startswith(f"{words} overlap (one holds the other)"), more
    # Names that only begin alike.
    preflight.check(layers.settings(upper="uppermost", work="workshop", lower="upper", lower2="work"))


def test_what_a_mount_uses(layers: Layers, bound: Callable[[str, str], None]) -> None:
    """A directory is in use if it holds one, or lies in one, also in a filesystem that is mounted there."""
    bound("", "upper/in")
    for name in ("upper/in/dir", "upper2"):
        (layers.root / name).mkdir()
    host = preflight._Host(read_mountinfo())

    def is_taken(path: str, taken: str, claims: Sequence[tuple[int, int]] = ()) -> bool:
        return preflight._is_taken(host, str(layers.root / path), str(layers.root / taken), claims)

    for one, other in (("upper/in/dir", "upper"), ("upper/in", "upper"), ("upper", ".")):
        assert is_taken(one, other)
        assert is_taken(other, one)
    assert is_taken("upper", "upper")
    assert not is_taken("upper2", "upper")
    assert not is_taken("upper2", "gone")
    status = (layers.root / "upper2").stat()
    assert is_taken("upper2", "gone", [(status.st_dev, status.st_ino)])


def test_layers_that_are_hidden(layers: Layers) -> None:
    """By an opaque directory of the upper, so that the union does not reach into itself."""
    for name in ("lower/own/upper", "lower/own/work", "lower/own/merged", "lower/other"):
        (layers.root / name).mkdir(parents=True)
    own = {"upper": "lower/own/upper", "work": "lower/own/work"}
    assert "overlap" in layers.refused(**own)
    hidden = layers.root / "lower/own/upper/own"
    hidden.mkdir()
    assert "overlap" in layers.refused(**own)
    os.setxattr(hidden, "trusted.overlay.opaque", b"y")
    preflight.check(layers.settings(**own))
    preflight.check(layers.settings(**own, merged="lower/own/merged"))
    with pytest.raises(UserError, match="overlap"):
        preflight.check(replace(layers.settings(**own), userxattr=True))
    assert "overlap" in layers.refused(upper="lower/own/upper", work="lower/other")
    assert "overlap" in layers.refused(**own, lower2="lower/own/upper/own")


def test_layers_behind_bind_mounts(layers: Layers, bound: Callable[[str, str], None]) -> None:
    (layers.root / "upper/in").mkdir()
    (layers.root / "elsewhere").mkdir()
    bound("upper", "bound")
    assert layers.refused(lower="bound").startswith("upper upper and lower bound overlap")
    assert layers.refused(lower="bound/in").startswith("lower bound/in and upper upper overlap")
    assert layers.refused(merged="bound").startswith(
        "mountpoint bound is inside the upper upper, which the mount"
    )
    assert layers.refused(merged="bound/in").startswith("mountpoint bound/in is inside the upper upper")
    assert layers.refused(merged="work").startswith("mountpoint work is inside the work work")
    bound("", "upper/in")
    (layers.root / "upper/in/deep").mkdir()
    preflight.check(
        layers.settings(lower="upper/in")
    )  # root's daemon opens layers without the mounts in them
    assert layers.refused(merged="upper/in/deep").startswith(
        "mountpoint upper/in/deep is inside the upper upper"
    )
    bound("", "lower/disk")
    for name in ("upper", "work", "merged"):
        (layers.root / "lower/disk" / name).mkdir()
    preflight.check(layers.settings(upper="lower/disk/upper", work="lower/disk/work"))
    preflight.check(layers.settings(merged="lower/disk/merged"))


def test_work_elsewhere(layers: Layers, bound: Callable[[str, str], None]) -> None:
    bound("", "disk")
    bound("work", "again")
    (layers.root / "disk/work").mkdir()
    assert layers.refused(work="disk/work") == (
        "work disk/work and upper upper are on different filesystems, but files are moved from work to upper "
        "by rename; put work beside upper."
    )
    assert "are on two mounts of one filesystem" in layers.refused(work="again")


def test_a_filesystem_that_is_read_only(layers: Layers, bound: Callable[[str, str], None]) -> None:
    bound("", "disk")
    for name in ("upper", "work"):
        (layers.root / "disk" / name).mkdir()
    syscalls.mount("none", layers.root / "disk", "", 32 | 1)  # MS_REMOUNT, MS_RDONLY
    assert layers.refused(upper="disk/upper", work="disk/work") == (
        "upper disk/upper is on a filesystem that is mounted read-only; remount it rw, or choose another "
        "place."
    )


def test_a_filesystem_without_xattrs(layers: Layers) -> None:
    disk = layers.root / "disk"
    disk.mkdir()
    syscalls.mount("r", disk, "ramfs", 0, "")
    try:
        for name in ("upper", "work"):
            (disk / name).mkdir()
        more = {"upper": "disk/upper", "work": "disk/work"}
        assert layers.refused(**more) == (
            "upper disk/upper is on a filesystem without trusted.* xattrs, so opaque directories could not "
            "be stored; use ext4, xfs, btrfs or tmpfs (-o userxattr may work there)."
        )
        with pytest.raises(UserError, match=r"without user\.\* xattrs, .* btrfs or tmpfs\.$"):
            preflight.check(replace(layers.settings(**more), userxattr=True))
    finally:
        syscalls.umount(disk)


def _entry(layers: Layers, **more: Any) -> live.LiveMount:
    """The registry's entry of a mount of other layers, by this process."""
    settings = layers.settings(upper="taken/upper", work="taken/work", merged="taken/merged")
    for path in (settings.upper, settings.work, settings.mountpoint):
        os.makedirs(str(path), exist_ok=True)
    here = mounted_at("/proc")
    assert here is not None
    values: dict[str, Any] = {"device": here.device, "since": 1.0, "claims": ()} | more
    entry = live.LiveMount(
        settings, os.getpid(), start_time(os.getpid()) or 0, directory=str(layers.root / "registry"), **values
    )
    entry.save()
    return entry


def test_layers_of_another_mount(layers: Layers) -> None:
    """The same directories, those in them and those around them; also behind other paths."""
    _entry(layers)
    (layers.root / "taken/upper/in").mkdir()
    word = (
        f"in use by the active mount taken/merged (pid {os.getpid()}); unmount that first, or choose another"
    )
    for more in ({"upper": "taken/upper"}, {"upper": "taken/upper/in"}, {"upper": "taken/work"}):
        assert layers.refused(**more).startswith(f"upper {more['upper']} is {word}"), more
    assert layers.refused(work="taken/work").startswith(f"work taken/work is {word}")
    preflight.check(layers.settings())
    preflight.check(layers.settings(lower="taken/upper"))
    with pytest.raises(UserError, match=r"upper .*taken/upper is in use"):
        preflight.check_unused(str(layers.root / "taken/upper"))
    with pytest.raises(UserError, match=r"upper .*taken is in use"):
        preflight.check_unused(str(layers.root / "taken"))
    with pytest.raises(UserError, match=r"work .*taken/work is in use"):
        preflight.check_unused(str(layers.root / "upper"), str(layers.root / "taken/work"))
    preflight.check_unused(str(layers.root / "upper"), str(layers.root / "work"))


def test_claims_of_another_mount(layers: Layers) -> None:
    """Its paths may lead elsewhere by now, or nowhere."""
    status = (layers.root / "work").stat()
    entry = _entry(layers, claims=((1, 2), (status.st_dev, status.st_ino)))
    for path in (entry.settings.upper, entry.settings.work):
        os.rmdir(str(path))
    assert layers.refused().startswith("work work is in use by the active mount")
    replace(entry, claims=()).save()
    preflight.check(layers.settings())


def test_layers_of_a_mount_that_is_gone(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not its daemon, or not yet another one."""
    monkeypatch.setattr(live, "_NOTICE_SECONDS", 0.1)
    entry = _entry(layers, device="0:0")
    found = layers.refused(upper="taken/upper")
    assert "still in use: " in found
    assert f"its daemon (pid {os.getpid()}) goes on; stop them" in found
    replace(entry, waiting=True).save()
    found = layers.refused(upper="taken/upper")
    assert "whose daemon died and which is about to be mounted anew; end that by `unionfs umount" in found


def test_layers_of_kernel_overlayfs(layers: Layers, kernel_overlay: None) -> None:
    for name in ("kernel", "kernel/up:per, \\x", "kernel/work", "kernel/merged", "kernel/work/in"):
        (layers.root / name).mkdir()
    place = layers.root / "kernel"
    upper = str(place / "up:per, \\x").replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
    data = f"lowerdir={layers.root}/lower,upperdir={upper},workdir={place}/work"
    syscalls.mount("overlay", place / "merged", "overlay", 0, data)
    try:
        for more in ({"upper": "kernel/up:per, \\x"}, {"work": "kernel/work/in"}, {"upper": "kernel/work"}):
            assert "is in use by the kernel's overlayfs at kernel/merged; unmount that" in layers.refused(
                **more
            )
        preflight.check(layers.settings())
    finally:
        syscalls.umount(place / "merged")


def test_a_mountpoint_in_use(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a FUSE filesystem; anything else may be covered."""
    merged = layers.root / "merged"
    syscalls.mount("t", merged, "tmpfs", 0, "size=64k")
    preflight.check(layers.settings())
    syscalls.umount(merged)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = f"fd={device},rootmode=40000,user_id=0,group_id=0"
    syscalls.mount("src", merged, "fuse.other", 0, data)
    try:
        # Root's own is asked whether it is dead; one of another user, which may not answer, is not.
        monkeypatch.setattr(preflight.others, "owner_of", lambda mount: UID)
        assert layers.refused() == (
            "mountpoint merged is busy: a fuse.other mount of src is there already; run `umount merged` "
            "first."
        )
        mount = mounted_at(str(merged))
        assert mount is not None
        entry = _entry(layers, device=mount.device)
        assert layers.refused() == (
            f"mountpoint merged is busy: the active mount taken/merged (pid {os.getpid()}) is there already; "
            "run `unionfs umount merged` first."
        )
        entry.remove()
        replace(entry, started=1, settings=layers.settings()).save()
        with pytest.raises(DeadMountError, match="is a mount whose daemon has died; run `unionfs umount"):
            preflight.check(layers.settings())
    finally:
        os.close(device)
    monkeypatch.undo()
    monkeypatch.setattr(runtime, "candidates", lambda: [str(layers.root / "registry2")])
    try:
        with pytest.raises(DeadMountError, match=r"mountpoint .*merged is a mount whose daemon has died"):
            preflight.check(layers.settings())
        with pytest.raises(DeadMountError, match=r"lower .*merged is a mount whose daemon has died"):
            preflight.check(layers.settings(lower="merged", merged="lower2"))
    finally:
        syscalls.umount(merged, syscalls.MNT_DETACH)


def test_work_with_files_of_somebody(layers: Layers) -> None:
    (layers.root / "work/file").touch()
    assert layers.refused().startswith("work work")
    assert "empty directory" in layers.refused()


def test_lowers_that_others_change(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports no changes of a filesystem that other hosts write."""
    settings = replace(layers.settings(), watch_lower=True)
    preflight.check(settings)
    monkeypatch.setitem(preflight.SHARED, 0x9FA0, "proc")
    with pytest.raises(UserError, match=r"lower /proc is on proc, whose changes"):
        preflight.check(replace(settings, lowers=("/proc",)))
    preflight.check(replace(settings, lowers=("/proc",), watch_lower=False))


AS_USER = """
import encodings.ascii, json, os, sys
from unionfs.daemon import fuse, preflight
from unionfs.sys import detached
from unionfs.errors import UserError
from unionfs.settings.mount import MountSettings
settings = MountSettings.from_json(json.loads(sys.argv[1]))
try:
    preflight.check(settings)  # whatever root finds: this user may not be able to import more
except UserError:
    pass
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try:
    preflight.check(settings)
    print("fine")
except UserError as error:
    print(error)
"""


def _as_user(layers: Layers, settings: MountSettings, *, device: bool = True) -> str:
    """The message for an ordinary user depends on whether that user can open /dev/fuse."""
    node = layers.root / "fuse"
    if not node.exists():
        os.mknod(node, stat.S_IFCHR, os.makedev(10, 229))
    node.chmod(0o666 if device else 0o600)
    script = f'mount --bind {node} /dev/fuse && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", AS_USER,
         json.dumps(settings.to_json())],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip().replace(f"{layers.root}/", "")


@pytest.fixture
def users(layers: Layers) -> Layers:
    """Layers of an ordinary user."""
    for name in ("lower", "lower2", "upper", "work", "merged"):
        os.chown(layers.root / name, 65534, 65534)
    return layers


def test_an_ordinary_user(users: Layers) -> None:
    settings = replace(users.settings(), userxattr=True, allow_other=False)
    assert _as_user(users, settings) == "fine"
    assert _as_user(users, settings, device=False).startswith("/dev/fuse cannot be opened by this user")
    os.chown(users.root / "merged", 0, 0)
    assert _as_user(users, settings) == (
        "mountpoint merged cannot be written by this user (uid 65534), as fusermount3 wants it; choose a "
        "directory of your own."
    )
    for name, verb in (("work", "written"), ("upper", "written"), ("lower", "read")):
        os.chown(users.root / name, 0, 0)
        (users.root / name).chmod(0o700)
        assert _as_user(users, settings) == (
            f"{name} {name} cannot be {verb} by this user (uid 65534); change its owner or mode, or run as "
            "its owner."
        )


@pytest.mark.parametrize("word", ["allow_other", "allow_root"])
def test_a_user_who_lets_others_in(users: Layers, word: str) -> None:
    """Where the host does not let users do that."""
    if fuse.user_allow_other():
        pytest.skip("this host lets users do that")
    settings = replace(users.settings(), userxattr=True, allow_other=False)
    said = _as_user(users, replace(settings, **{word: True}))  # type: ignore[arg-type]
    assert said.startswith(f"option {word}: an ordinary user may give it only when /etc/fuse.conf has a line")


def test_a_union_in_itself(users: Layers) -> None:
    """A user's daemon reads a lower with the mounts in it."""
    (users.root / "lower/in").mkdir()
    os.chown(users.root / "lower/in", 65534, 65534)
    preflight.check(users.settings(merged="lower/in"))
    settings = replace(users.settings(merged="lower/in"), userxattr=True, allow_other=False)
    assert _as_user(users, settings) == (
        "mountpoint lower/in is inside the lower lower, so the union would hold itself and hang; choose a "
        "directory outside it, or mount as root."
    )
    assert _as_user(users, replace(settings, mountpoint=str(users.root / "lower"))) == "fine"


def test_a_device_that_cannot_be_opened(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "FUSE_DEVICE", str(layers.root / "none"))
    assert layers.refused().startswith("/dev/fuse is missing")


def test_without_fusermount(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root does not need it."""
    monkeypatch.setattr(preflight, "find_fusermount", lambda: None)
    preflight.check(layers.settings())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="fusermount3 is missing"):
        preflight._check_fuse(layers.settings())


def test_xattrs_that_cannot_be_read(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that fails."""

    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(preflight.os, "getxattr", fails)
    assert "upper upper: its xattrs cannot be read: " in layers.refused()
