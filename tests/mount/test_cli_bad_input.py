"""Bad input: one clear sentence, exit code 1, no change anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import Done, Place, mounts_at, refused, succeed, unionfs
from tests.support import areas


def _refused(place: Place, done: Done, *parts: str) -> None:
    refused(done, *parts)
    assert areas.mounts_below(place.root) == []
    assert str(place.root) not in succeed(unionfs("ls"))


def _unchanged(place: Place, *arguments: str | Path) -> Done:
    before = place.snapshot()
    times = {path: path.stat().st_mtime_ns for path in (place.lower, place.upper, place.work, place.merged)}
    done = unionfs("mount", *arguments, cwd=place.root)
    assert place.snapshot() == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    return done


def test_missing_lower(place: Place) -> None:
    done = _unchanged(place, "-l", "nowhere", "-u", place.upper, "-w", place.work, place.merged)
    _refused(place, done, f"lower {place.root}/nowhere does not exist; check the path")


def test_lower_that_is_a_file(place: Place) -> None:
    done = _unchanged(place, "-l", place.lower / "base", place.merged)
    _refused(place, done, f"lower {place.lower}/base is neither a directory nor a squashfs")


def test_no_lower(place: Place) -> None:
    _refused(place, _unchanged(place, "-u", place.upper, "-w", place.work, place.merged), "no lower is given")
    _refused(place, _unchanged(place, place.merged), "no lower is given")


@pytest.mark.parametrize("name", ["upper", "work"])
def test_missing_upper_or_work(place: Place, name: str) -> None:
    shutil.rmtree(place.root / name)
    done = unionfs("mount", *place.layers, place.merged)
    _refused(place, done, f"{name} {place.root}/{name} does not exist; make it with mkdir")
    assert not (place.root / name).exists()


def test_upper_without_work(place: Place) -> None:
    done = _unchanged(place, "-l", place.lower, "-u", place.upper, place.merged)
    _refused(place, done, "without a work directory", "--work")


def test_work_without_upper(place: Place) -> None:
    done = _unchanged(place, "-l", place.lower, "-w", place.work, place.merged)
    _refused(place, done, "without an upper", "--upper")


def test_work_on_another_filesystem(place: Place, filesystem: Callable[..., Path]) -> None:
    other = filesystem("tmpfs", 16 << 20)
    (other / "work").mkdir()
    done = _unchanged(place, "-l", place.lower, "-u", place.upper, "-w", other / "work", place.merged)
    _refused(place, done, "different filesystems")


def test_work_on_another_mount_of_the_same_filesystem(place: Place) -> None:
    bound = place.root / "bound"
    bound.mkdir()
    subprocess.run(["mount", "--bind", place.root, bound], check=True)
    try:
        done = unionfs("mount", "-l", place.lower, "-u", place.upper, "-w", bound / "work", place.merged)
        refused(done, "two mounts of one filesystem")
    finally:
        subprocess.run(["umount", bound], check=True)


@pytest.mark.parametrize("name", ["file", "work/precious", ".hidden"])
def test_work_with_somebodys_files(place: Place, name: str) -> None:
    path = place.work / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    done = _unchanged(place, *place.layers, place.merged)
    _refused(place, done, f"work {place.work}", name, "empty directory")


def test_leftovers_of_a_crash_in_work_are_fine(place: Place) -> None:
    (place.work / "work").mkdir(mode=0)
    (place.work / "work" / "#1f").mkdir()
    (place.work / "index").mkdir()
    place.mount()
    assert os.listdir(place.work / "work") == []


@pytest.mark.parametrize("kind", ["file", "symlink", "fifo"])
@pytest.mark.parametrize("options", [(), ("-o", "index=on")])
def test_an_index_that_is_no_directory(place: Place, kind: str, options: tuple[str, ...]) -> None:
    index = place.work / "index"
    if kind == "file":
        index.touch()
    elif kind == "symlink":
        index.symlink_to(place.lower)
    else:
        os.mkfifo(index)
    done = unionfs("mount", *place.layers, *options, place.merged)
    _refused(place, done, "`index`", "cannot be opened", "empty directory")


def test_work_left_by_a_volatile_mount(place: Place) -> None:
    (place.work / "work" / "incompat" / "volatile" / "dirty").mkdir(parents=True)
    done = _unchanged(place, *place.layers, place.merged)
    _refused(place, done, "volatile mount", str(place.work / "work" / "incompat"))


def test_kernel_volatile_mount_is_understood(place: Place, kernel_overlay: None) -> None:
    subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", f"{place.data},volatile", place.merged], check=True
    )
    subprocess.run(["umount", place.merged], check=True)
    _refused(place, unionfs("mount", *place.layers, place.merged), "volatile mount")


def test_work_is_upper_or_inside_or_around(place: Place) -> None:
    _refused(
        place,
        _unchanged(place, "-l", place.lower, "-u", place.upper, "-w", place.upper, place.merged),
        "is the same directory as upper",
    )
    (place.upper / "work").mkdir()
    _refused(
        place,
        _unchanged(place, "-l", place.lower, "-u", place.upper, "-w", "upper/work", place.merged),
        f"work {place.upper}/work is inside upper",
    )
    (place.work / "upper").mkdir()
    _refused(
        place,
        _unchanged(place, "-l", place.lower, "-u", "work/upper", "-w", place.work, place.merged),
        f"upper {place.work}/upper is inside work",
    )


def test_upper_and_lower_overlap(place: Place) -> None:
    (place.upper / "sub").mkdir()
    (place.lower / "sub").mkdir()
    work = ("-w", place.work)
    for lower, upper in ((place.upper, place.upper), (place.upper / "sub", place.upper)):
        _refused(place, _unchanged(place, "-l", lower, "-u", upper, *work, place.merged), "overlap")
    done = _unchanged(place, "-l", place.lower, "-u", place.lower / "sub", *work, place.merged)
    _refused(place, done, f"upper {place.lower}/sub and lower {place.lower} overlap")
    (place.lower / "work").mkdir()
    done = _unchanged(place, "-l", place.lower, "-u", place.upper, "-w", place.lower / "work", place.merged)
    _refused(place, done, f"work {place.lower}/work and lower {place.lower} overlap")


def test_overlap_behind_a_symlink(place: Place) -> None:
    (place.root / "link").symlink_to("upper")
    done = _unchanged(place, "-l", "link", "-u", place.upper, "-w", place.work, place.merged)
    _refused(place, done, "overlap")


@pytest.mark.parametrize("lower", ["", "/sub"])
def test_overlap_behind_a_bind_mount(place: Place, lower: str) -> None:
    (place.upper / "sub").mkdir()
    bound = place.root / "bound"
    bound.mkdir()
    subprocess.run(["mount", "--bind", f"{place.upper}{lower}", bound], check=True)
    try:
        done = unionfs("mount", "-l", bound, "-u", place.upper, "-w", place.work, place.merged)
        refused(done, "overlap")
        done = unionfs("mount", *place.layers, bound)
        refused(done, f"mountpoint {bound} is inside the upper")
    finally:
        subprocess.run(["umount", bound], check=True)


def test_upper_on_another_filesystem_below_a_lower_is_no_overlap(place: Place) -> None:
    inside = place.lower / "disk"
    inside.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", inside], check=True)
    for name in ("upper", "work"):
        (inside / name).mkdir()
    succeed(unionfs("mount", "-l", place.lower, "-u", inside / "upper", "-w", inside / "work", place.merged))
    assert os.listdir(place.merged / "disk") == []
    succeed(unionfs("umount", place.merged))


def test_upper_or_work_of_a_live_mount(place: Place) -> None:
    pid = place.mount()
    for name in ("upper3", "work3", "merged3"):
        (place.root / name).mkdir()
    (place.upper / "sub").mkdir()
    merged = place.root / "merged3"
    for upper, work, word in (
        (place.upper, place.root / "work3", "upper"),
        (place.upper / "sub", place.root / "work3", "upper"),
        (place.root / "upper3", place.work, "work"),
    ):
        done = unionfs("mount", "-l", place.lower, "-u", upper, "-w", work, merged)
        refused(done, f"{word} ", f"is in use by the active mount {place.merged} (pid {pid})")
    assert mounts_at(merged) == []
    succeed(unionfs("umount", place.merged))
    succeed(unionfs("mount", *place.layers, merged))


def test_upper_of_a_mount_that_hides_it(place: Place) -> None:
    """The registry recognizes a directory even if its path leads into the union."""
    with areas.area() as bound:
        subprocess.run(["mount", "--bind", place.root, bound], check=True)
        succeed(unionfs("mount", *place.layers, place.root))
        layers = ("-l", bound / "lower", "-u", bound / "upper", "-w", bound / "work")
        refused(unionfs("mount", *layers, bound / "merged"), f"in use by the active mount {place.root}")
        succeed(unionfs("umount", place.root))
        succeed(unionfs("mount", *layers, bound / "merged"))
        succeed(unionfs("umount", bound / "merged"))


def test_upper_of_kernel_overlayfs(place: Place, kernel_overlay: None) -> None:
    strange = place.root / "up:per, \\x"
    place.upper.rename(strange)
    escaped = str(strange).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
    data = f"lowerdir={place.lower},upperdir={escaped},workdir={place.work}"
    kernel = place.root / "kernel"
    kernel.mkdir()
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", data, kernel], check=True)
    (place.root / "work3").mkdir()
    done = unionfs("mount", "-l", place.lower, "-u", strange, "-w", place.root / "work3", place.merged)
    refused(done, f"in use by the kernel's overlayfs at {kernel}")
    subprocess.run(["umount", kernel], check=True)
    succeed(unionfs("mount", "-l", place.lower, "-u", strange, "-w", place.work, place.merged))


def test_mountpoint_missing_or_a_file(place: Place) -> None:
    _refused(
        place,
        _unchanged(place, *place.layers, "nowhere"),
        f"mountpoint {place.root}/nowhere does not exist; make it with mkdir",
    )
    (place.root / "file").touch()
    _refused(
        place, _unchanged(place, *place.layers, "file"), f"mountpoint {place.root}/file is not a directory"
    )


def test_root_as_the_mountpoint(place: Place) -> None:
    """The kernel would mount it where no path leads; unmounting / makes the host read-only."""
    done = cli_calls.call(("unshare", "-m", *cli_calls.UNIONFS), "mount", *place.layers, "/")
    _refused(place, done, "mountpoint / is the root directory")


def test_busy_mountpoint(place: Place) -> None:
    pid = place.mount()
    for name in ("upper3", "work3"):
        (place.root / name).mkdir()
    done = unionfs(
        "mount", "-l", place.lower, "-u", place.root / "upper3", "-w", place.root / "work3", place.merged
    )
    refused(done, f"mountpoint {place.merged} is busy: the active mount {place.merged} (pid {pid})")
    assert mounts_at(place.merged) == ["fuse.unionfs"]


def test_several_mounts_at_once_on_one_mountpoint(place: Place) -> None:
    """One of them succeeds; none covers another."""
    calls = []
    for number in range(4):
        for name in ("upper", "work"):
            (place.root / f"{name}{number}").mkdir()
        calls.append(
            subprocess.Popen(
                [*cli_calls.UNIONFS, "mount", "-l", place.lower, "-u", place.root / f"upper{number}",
                 "-w", place.root / f"work{number}", place.merged],
                stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=cli_calls.REPOSITORY,
            )
        )  # fmt: skip
    said = [call.communicate(timeout=cli_calls.SECONDS)[1] for call in calls]
    assert sorted(call.returncode for call in calls) == [0, 1, 1, 1], said
    for call, text in zip(calls, said, strict=True):
        if call.returncode:
            assert text.startswith(f"unionfs: mountpoint {place.merged} is busy: ")
            assert text.endswith(".\n")
            assert text.count("\n") == 1
    assert mounts_at(place.merged) == ["fuse.unionfs"]
    (place.merged / "new").touch()
    winner = next(number for number, call in enumerate(calls) if call.returncode == 0)
    assert (place.root / f"upper{winner}/new").exists()
    succeed(unionfs("umount", place.merged))


def test_lower_whose_daemon_has_died(place: Place) -> None:
    pid = place.mount()
    os.kill(pid, 9)
    assert cli_calls.wait_for(lambda: cli_calls.gone(pid))
    done = unionfs("mount", "-l", place.merged, place.lower2)
    refused(done, "daemon has died", f"unionfs umount {place.merged}")


@pytest.mark.parametrize("name", ["upper", "work"])
def test_mountpoint_inside_upper_or_work(place: Place, name: str) -> None:
    directory = place.root / name
    _refused(place, _unchanged(place, *place.layers, directory), f"is inside the {name} {directory}")
    (directory / "work").mkdir()
    (directory / "work" / "#1").mkdir()
    _refused(place, _unchanged(place, *place.layers, directory / "work" / "#1"), f"is inside the {name}")


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("nonsense", "unknown option nonsense"),
        ("nonsense=3", "unknown option nonsense=3"),
        ("RO", "unknown option RO"),
        ("redirect_dir=maybe", "redirect_dir=maybe"),
        ("redirect_dir=on,userxattr", "redirect_dir=on conflicts with markers in user.* xattrs"),
        ("redirect_dir=follow,userxattr", "redirect_dir=follow conflicts with markers in user.* xattrs"),
        ("index=maybe", "index=maybe"),
        ("metacopy=on,redirect_dir=off", "conflicts with redirect_dir=off"),
        ("metacopy=on,userxattr", "conflicts with markers in user.* xattrs"),
        ("nfs_export=on", "nfs_export=on"),
        ("xino=maybe", "xino=maybe"),
        ("uidmapping=:0:100000", "uidmapping=:0:100000: not a list of numbers in threes"),
        ("uidmapping=0:x:1", "uidmapping=0:x:1: not a list of numbers in threes"),
        ("gidmapping=:", "gidmapping=:: not a list"),
        ("gidmapping=0:4294967295:1", "goes beyond 4294967294"),
        ("uidmapping=4294967295:0:1", "goes beyond 4294967294"),
        ("uidmapping=0:0:4294967296", "goes beyond 4294967294"),
        (f"uidmapping={'9' * 5000}:0:1", "not a list of numbers"),
        (f"squash_to_uid={'9' * 5000}", "not a number below 4294967295"),
        ("uidmapping=0:1:0", "a range is empty"),
        ("uidmapping", "uidmapping has no value"),
        ("squash_to_uid=root", "squash_to_uid=root: not a number"),
        ("squash_to_gid=-1", "squash_to_gid=-1: not a number"),
        ("xattr_permissions=3", "xattr_permissions=3: not a known kind of xattr"),
        ("xattr_permissions", "xattr_permissions has no value"),
        ("xattr_permissions=2,index=on", "index=on conflicts with xattr_permissions"),
        ("xattr_permissions=1,metacopy=on", "metacopy=on conflicts with xattr_permissions"),
        ("plugins=a.so", "plugins"),
        ("remount", "remount"),
        ("lowerdir=/other", "both by -l and by -o lowerdir="),
        ("upperdir=/other", "both by -u and by -o upperdir="),
        ("allow_other,allow_root", "exclude each other"),
        ("lowerdir=a::b", "empty path"),
        ("lowerdir=", "lowerdir has no value"),
        ("fsname", "fsname has no value"),
        ("subtype", "subtype has no value"),
    ],
)
def test_options_that_cannot_be_followed(place: Place, option: str, part: str) -> None:
    _refused(place, _unchanged(place, *place.layers, "-o", option, place.merged), part)


def test_usage_errors(place: Place) -> None:
    refused(unionfs("mount"), "MOUNTPOINT", "unionfs mount --help")
    refused(unionfs("mount", "--nonsense", place.merged), "--nonsense")
    refused(unionfs("mount", "-l"), "-l")
    refused(unionfs("nonsense"), "nonsense")
    refused(unionfs("mount", "-l", place.lower, "--session", "nonsense", place.merged), "--session")
    refused(unionfs("mount", "-l", place.lower, place.merged, "extra"), "extra")
    refused(unionfs("diff"), "--upper")
    refused(unionfs("diff", place.merged, "--upper", place.upper), "not both")
    refused(unionfs("mount", "-l", "", place.merged), "empty path")


def test_relative_path_in_a_removed_directory(place: Place) -> None:
    gone = place.root / "gone"
    gone.mkdir()
    command = " ".join(cli_calls.UNIONFS)
    done = cli_calls.call(("sh", "-c", f"rmdir {gone}; exec {command} mount -l lower merged"), cwd=gone)
    refused(done, "current directory is gone")


def _with_fuse_device(script: str, *arguments: str | Path) -> Done:
    """Run `unionfs ARGUMENTS` in a mount namespace with /dev changed by `script`."""
    return cli_calls.call(
        ("unshare", "-m", "sh", "-c", f'{script}; exec "$@"', "sh", *cli_calls.UNIONFS), *arguments
    )


def test_fuse_device_missing(place: Place) -> None:
    hide = "mount -t tmpfs tmpfs /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
    done = _with_fuse_device(hide, "mount", *place.layers, place.merged)
    _refused(place, done, "/dev/fuse is missing", "modprobe fuse")


def test_fuse_device_that_is_something_else(place: Place) -> None:
    done = _with_fuse_device("mount --bind /dev/null /dev/fuse", "mount", *place.layers, place.merged)
    _refused(place, done, "mount")


def test_without_the_right_to_mount(place: Place) -> None:
    drop = ("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", *cli_calls.UNIONFS)
    done = cli_calls.call(drop, "mount", "-o", "userxattr", *place.layers, place.merged)
    _refused(place, done, f"{place.merged} cannot be mounted", "not permitted", "SYS_ADMIN")


def test_context_where_there_is_no_selinux(place: Place) -> None:
    if Path("/sys/fs/selinux").exists():
        pytest.skip("SELinux is there")
    done = unionfs("mount", "-o", "context=system_u:object_r:usr_t", *place.layers, place.merged)
    _refused(place, done, f"{place.merged} cannot be mounted", "Invalid argument", "options")


def test_upper_without_xattrs(place: Place, filesystem: Callable[..., Path]) -> None:
    if shutil.which("mkfs.vfat") is None:
        pytest.skip("mkfs.vfat is not installed")
    image, disk = place.root / "image", place.root / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.vfat", image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, disk], check=False, capture_output=True).returncode:
        pytest.skip("vfat cannot be mounted here")
    try:
        for name in ("upper", "work"):
            (disk / name).mkdir()
        done = unionfs("mount", "-l", place.lower, "-u", disk / "upper", "-w", disk / "work", place.merged)
        refused(done, "without trusted.* xattrs", "opaque directories", "ext4")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_upper_on_a_filesystem_without_xattrs_of_the_kernel(place: Place) -> None:
    """ramfs has no xattrs, and every kernel supports it."""
    disk = place.root / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "ramfs", "ramfs", disk], check=False, capture_output=True).returncode:
        pytest.skip("ramfs cannot be mounted here")
    try:
        for name in ("upper", "work"):
            (disk / name).mkdir()
        done = unionfs("mount", "-l", place.lower, "-u", disk / "upper", "-w", disk / "work", place.merged)
        refused(done, "without trusted.* xattrs", "ext4")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_upper_on_a_read_only_filesystem(place: Place) -> None:
    disk = place.root / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], check=True)
    try:
        for name in ("upper", "work"):
            (disk / name).mkdir()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        done = unionfs("mount", "-l", place.lower, "-u", disk / "upper", "-w", disk / "work", place.merged)
        refused(done, "mounted read-only")
    finally:
        subprocess.run(["umount", disk], check=True)
