"""`unionfs mount`: its effects, the daemon's state, and the forms of layers and options."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import UNIONFS, Place, gone, listed, mounts_at, succeed, unionfs, wait_for
from tests.support.patience import patient
from unionfs.daemon import live


def _options(path: Path) -> set[str]:
    for line in Path("/proc/mounts").read_text().splitlines():
        if line.split()[1] == str(path):
            return set(line.split()[3].split(","))
    raise AssertionError(f"nothing is mounted at {path}")


def _line(path: Path) -> list[str]:
    return next(
        line.split() for line in Path("/proc/mounts").read_text().splitlines() if line.split()[1] == str(path)
    )


def test_mount_returns_when_the_mount_can_be_used(place: Place) -> None:
    place.mount()
    assert sorted(os.listdir(place.merged)) == ["base", "deep"]
    (place.merged / "base").write_text("changed\n")
    assert (place.upper / "base").read_text() == "changed\n"
    assert (place.lower / "base").read_text() == "base\n"


def test_first_lower_is_on_top(place: Place) -> None:
    (place.lower / "same").write_text("top")
    (place.lower2 / "same").write_text("bottom")
    place.mount()
    assert (place.merged / "same").read_text() == "top"


def test_leftmost_lowerdir_is_on_top(place: Place) -> None:
    (place.lower / "same").write_text("top")
    (place.lower2 / "same").write_text("bottom")
    succeed(unionfs("mount", "-o", place.data, place.merged))
    assert (place.merged / "same").read_text() == "top"


def test_escaped_names_in_options(place: Place) -> None:
    strange = place.root / "a:b,c\\d"
    strange.mkdir()
    (strange / "inside").write_text("x")
    escaped = str(strange).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
    succeed(unionfs("mount", "-o", f"lowerdir={escaped}:{place.lower}", place.merged))
    assert sorted(os.listdir(place.merged)) == ["base", "inside"]


def test_names_that_are_not_utf8(place: Place) -> None:
    strange = place.root / os.fsdecode(b"l\xff\xfe")
    strange.mkdir()
    (strange / "inside").write_text("x")
    merged = place.root / os.fsdecode(b"m\xff")
    merged.mkdir()
    succeed(unionfs("mount", "-l", strange, merged))
    assert os.listdir(merged) == ["inside"]
    entry = next(one for one in listed(unionfs("ls", "--json")) if one["mountpoint"] == str(merged))
    assert entry["layers"] == [str(strange)]
    assert "\\udcff" in succeed(unionfs("ls"))
    succeed(unionfs("umount", merged))


def test_relative_paths_are_those_of_the_caller(place: Place) -> None:
    succeed(
        unionfs(
            "mount", "-l", "lower", "-o", "upperdir=./upper,workdir=upper/../work", "merged", cwd=place.root
        )
    )
    (place.merged / "new").write_text("x")
    assert (place.upper / "new").exists()


def test_symlinks_to_layers_and_mountpoint(place: Place) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (place.root / f"l-{name}").symlink_to(name)
    succeed(
        unionfs("mount", "-o", "lowerdir=l-lower,upperdir=l-upper,workdir=l-work", "l-merged", cwd=place.root)
    )
    assert mounts_at(place.merged) == ["fuse.unionfs"]
    succeed(unionfs("umount", place.root / "l-merged"))
    assert mounts_at(place.merged) == []


@pytest.mark.parametrize("count", [1, 2, 30, 500])
def test_many_lowers(place: Place, count: int) -> None:
    lowers = []
    for number in range(count):
        lower = place.root / f"layer{number}"
        lower.mkdir()
        (lower / f"file{number}").write_text(str(number))
        (lower / "same").write_text(str(number))
        lowers.append(str(lower))
    succeed(
        unionfs(
            "mount",
            "-o",
            f"lowerdir={':'.join(lowers)},upperdir={place.upper},workdir={place.work}",
            place.merged,
        )
    )
    assert len(os.listdir(place.merged)) == count + 1
    assert (place.merged / "same").read_text() == "0"
    assert (place.merged / f"file{count - 1}").read_text() == str(count - 1)
    succeed(unionfs("umount", place.merged))


def test_without_upper_nothing_can_be_written(place: Place) -> None:
    succeed(unionfs("mount", "-l", place.lower, place.merged))
    assert "ro" in _options(place.merged)
    with pytest.raises(OSError, match="Read-only"):
        (place.merged / "new").touch()


def test_ro_with_an_upper(place: Place) -> None:
    (place.upper / "mine").touch()
    place.mount("-o", "ro")
    assert "mine" in os.listdir(place.merged)
    with pytest.raises(OSError, match="Read-only"):
        (place.merged / "new").touch()
    assert os.listdir(place.upper) == ["mine"]


def test_root_gets_devices_suid_and_everybody(place: Place) -> None:
    place.mount()
    options = _options(place.merged)
    assert {"rw", "allow_other", "default_permissions"} <= options
    assert not {"nodev", "nosuid", "noexec"} & options


def test_flags_are_followed(place: Place) -> None:
    place.mount("-o", "nodev,nosuid", "-o", "noexec,sync,noatime")
    assert {"nodev", "nosuid", "noexec", "sync", "noatime"} <= _options(place.merged)


def test_the_last_of_contradicting_flags_counts(place: Place) -> None:
    place.mount("-o", "noexec,nodev,ro,exec,dev,rw")
    assert not {"noexec", "nodev", "ro"} & _options(place.merged)


def test_allow_root_is_not_for_everybody(place: Place) -> None:
    place.mount("-o", "allow_root")
    done = subprocess.run(
        ["setpriv", "--reuid", "1000", "--clear-groups", "ls", str(place.merged)],
        capture_output=True,
        check=False,
    )
    assert done.returncode != 0
    assert os.listdir(place.merged)


def test_accepted_options_print_nothing(place: Place) -> None:
    words = (
        "defaults,,noauto,user,nofail,_netdev,x-systemd.automount,comment=hello,auto,relatime,lazytime,async,suid,"
        "dev,exec,xino=auto,index=off,redirect_dir=nofollow,metacopy=off,nfs_export=off,uuid=null,volatile,"
        "timeout=1,threaded=1,fsync=0,fast_ino=1,writeback=1,plugins=,static_nlink,noacl,redirect_dir,private,"
        "default_permissions,allow_other,userxattr,"
    )
    place.mount("-o", words, "-o", ",", "-o", "")
    assert "base" in os.listdir(place.merged)


def test_fsname_and_subtype(place: Place) -> None:
    place.mount("-o", "fsname=my\\,name,subtype=other")
    assert _line(place.merged)[0] == "my,name"
    assert _line(place.merged)[2] == "fuse.other"
    succeed(unionfs("umount", place.merged))
    place.mount("-o", "subtype=")
    assert _line(place.merged)[0] == "unionfs"
    assert _line(place.merged)[2] == "fuse"
    succeed(unionfs("umount", place.merged))
    assert mounts_at(place.merged) == []


def test_daemon_holds_nothing_of_its_caller(place: Place) -> None:
    lock = place.root / "held"
    with lock.open("w") as held:
        os.set_inheritable(held.fileno(), True)
        done = subprocess.Popen(
            [*UNIONFS, "mount", *map(str, place.layers), str(place.merged)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=place.root,
            env={**os.environ, "PYTHONPATH": str(cli_calls.REPOSITORY)},
            pass_fds=[held.fileno()],
        )
        ends = [end for end in (done.stdin, done.stdout, done.stderr) if end is not None]
        pipes = {os.readlink(f"/proc/self/fd/{end.fileno()}") for end in ends}
        # Ends only when all other holders of the pipes have closed them.
        assert done.communicate(timeout=patient(20)) == (b"", b"")
        assert done.returncode == 0
    pid = place.pid()
    links = {name: os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
    assert {links["0"], links["1"], links["2"]} == {"/dev/null"}
    assert not any(str(lock) in link for link in links.values())
    assert len(pipes) == 3
    assert not pipes & set(links.values())
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    session, terminal = int(fields[3]), int(fields[4])
    assert session == pid
    assert terminal == 0
    assert "Umask:\t0000" in Path(f"/proc/{pid}/status").read_text()


def test_daemon_may_open_as_many_files_as_the_hard_limit_says(place: Place) -> None:
    command = " ".join([*UNIONFS, "mount", *map(str, place.layers), str(place.merged)])
    succeed(cli_calls.call(("sh", "-c", f"ulimit -Sn 64; exec {command}")))
    line = next(
        line for line in Path(f"/proc/{place.pid()}/limits").read_text().splitlines() if "open files" in line
    )
    soft, hard = line.split()[3:5]
    assert soft == hard


def test_limits_of_the_shell_are_not_the_daemons(place: Place) -> None:
    (place.lower / "big").write_bytes(bytes(3_000_000))
    limits = "; ".join(f"ulimit -S{limit}" for limit in ("t 1", "f 1000", "n 64", "v 2000000", "d 2000000"))
    command = " ".join([*UNIONFS, "mount", *map(str, place.layers), str(place.merged)])
    succeed(cli_calls.call(("sh", "-c", f"{limits}; exec {command}")))
    pid = place.pid()
    assert [name for name, values in _limits(pid).items() if len(values) > 1] == []
    assert _limits(pid)["core file size"] == {"0"}
    with (place.merged / "big").open("ab") as big:
        big.write(b"more")
    assert (place.upper / "big").stat().st_size == 3_000_004
    files = [(place.merged / "base").open("rb") for _ in range(300)]
    assert {file.read() for file in files} == {b"base\n"}
    for file in files:
        file.close()


def _limits(pid: int) -> dict[str, set[str]]:
    """Some limits of a process, soft and hard."""
    names = ("cpu time", "file size", "data size", "address space", "core file size", "open files")
    found = {}
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        name = line[4:26].strip()
        if name in names:
            found[name] = set(line[26:].split()[:2])
    return found


def test_closed_standard_files(place: Place) -> None:
    command = " ".join([*UNIONFS, "mount", *map(str, place.layers), str(place.merged)])
    done = cli_calls.call(("sh", "-c", f"exec {command} <&- >&- 2>&-"))
    assert done.returncode == 0
    (place.merged / "base").write_text("still fine\n")
    assert (place.upper / "base").read_text() == "still fine\n"
    assert gone(place.pid()) is False


def test_mountpoint_over_its_own_lower(place: Place) -> None:
    succeed(unionfs("mount", "-l", place.lower, "-u", place.upper, "-w", place.work, place.lower))
    (place.lower / "new").touch()
    assert sorted(os.listdir(place.lower)) == ["base", "new"]
    succeed(unionfs("umount", place.lower))
    assert os.listdir(place.lower) == ["base"]


def test_mountpoint_inside_a_lower_as_root(place: Place) -> None:
    (place.lower / "sub").mkdir()
    succeed(unionfs("mount", *place.layers, place.lower / "sub"))
    assert os.listdir(place.lower / "sub" / "sub") == []
    assert sorted(os.listdir(place.lower / "sub")) == ["base", "deep", "sub"]


def test_mountpoint_that_holds_the_layers(place: Place) -> None:
    # The paths of the layers then lead into the union.
    succeed(unionfs("mount", *place.layers, place.root))
    (place.root / "new").touch()
    succeed(unionfs("umount", place.root))
    assert os.listdir(place.upper) == ["new"]


def test_hidden_files_are_allowed(place: Place) -> None:
    (place.merged / "below").touch()
    place.mount()
    assert "below" not in os.listdir(place.merged)


def test_a_union_over_a_union(place: Place) -> None:
    place.mount()
    upper, work, merged = (place.root / name for name in ("upper3", "work3", "merged3"))
    for path in (upper, work, merged):
        path.mkdir()
    succeed(unionfs("mount", "-l", place.merged, "-u", upper, "-w", work, merged))
    (merged / "base").write_text("above")
    assert (place.merged / "base").read_text() == "base\n"
    succeed(unionfs("umount", merged))


def test_foreground_stays_and_logs_to_stderr(place: Place) -> None:
    process = subprocess.Popen(
        [*UNIONFS, "mount", "-f", *map(str, place.layers), str(place.merged)],
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(cli_calls.REPOSITORY)},
        text=True,
    )
    try:
        assert process.stderr is not None
        assert f"INFO mounted at {place.merged}" in process.stderr.readline()
        assert place.pid() == process.pid
        succeed(unionfs("umount", place.merged))
        assert process.wait(10) == 0
        assert f"INFO ended: {place.merged}" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_mount_and_unmount_over_and_over(place: Place) -> None:
    for number in range(5):
        place.mount()
        (place.merged / str(number)).touch()
        succeed(unionfs("umount", place.merged))
    assert sorted(os.listdir(place.upper)) == ["0", "1", "2", "3", "4"]


def test_unmounted_as_soon_as_it_is_there(place: Place) -> None:
    """The daemon ends with exit code 0 however early its mount is removed."""
    process = subprocess.Popen(
        [*UNIONFS, "mount", "-f", *map(str, place.layers), str(place.merged)],
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(cli_calls.REPOSITORY)},
    )
    try:
        assert wait_for(lambda: bool(mounts_at(place.merged)), 20)
        os.statvfs(place.merged)
        subprocess.run(["umount", str(place.merged)], check=True)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def test_interrupted_mount_leaves_nothing(place: Place) -> None:
    for delay in (0.05, 0.15, 0.2, 0.25, 0.3, 0.4):
        process = subprocess.Popen(
            [*UNIONFS, "mount", *map(str, place.layers), str(place.merged)],
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(cli_calls.REPOSITORY)},
            text=True,
        )
        time.sleep(delay)
        process.terminate()
        _, errors = process.communicate(timeout=patient(20))
        assert "Traceback" not in errors
        if process.returncode == 0:
            succeed(unionfs("umount", place.merged))
        assert mounts_at(place.merged) == []
        assert wait_for(lambda: str(place.merged) not in succeed(unionfs("ls")))


def _processes_with(path: Path) -> list[str]:
    """Command lines of the processes with ``path`` among their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = process.read_bytes().split(b"\0")
            if os.fsencode(path) in arguments:
                found.append(repr(arguments))
    return found


def _is_announced(path: Path) -> bool:
    return any(entry.settings.mountpoint == str(path) for entry in live.entries())


def test_a_mount_whose_caller_was_killed_goes_again(place: Place) -> None:
    for delay in (0.1, 0.2, 0.3):
        process = subprocess.Popen(
            [*UNIONFS, "mount", *map(str, place.layers), str(place.merged)],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(cli_calls.REPOSITORY)},
        )
        time.sleep(delay)
        process.kill()
        told = process.wait() == 0
        # The daemon may still be mounting. Or the caller knew of the mount and was killed while it ended,
        # which takes some milliseconds: then the mount is an ordinary one. The daemon notices when it has
        # announced the mount.
        assert wait_for(lambda: not _processes_with(place.merged) or _is_announced(place.merged), 30)
        if told or not wait_for(lambda: not _processes_with(place.merged), 3):
            succeed(unionfs("umount", place.merged))
        assert wait_for(lambda: not _processes_with(place.merged), 30)
        assert mounts_at(place.merged) == []
        assert str(place.merged) not in succeed(unionfs("ls"))


def test_the_parent_imports_neither_trio_nor_pyfuse3(place: Place) -> None:
    script = (
        "import os, sys\n"
        "os._exit = sys.exit\n"
        "sys.argv = ['unionfs', 'mount', *sys.argv[1:]]\n"
        "from unionfs.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(*sorted({'trio', 'pyfuse3', 'rich', 'xxhash', 'asyncio'} & set(sys.modules)))"
    )
    done = cli_calls.call((sys.executable, "-c", script), *place.layers, place.merged)
    assert succeed(done) == "\n"
