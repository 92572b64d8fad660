"""How mounts end: `unionfs umount`, umount from outside, signals, and crashes."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.mount import cli_calls
from tests.mount.cli_calls import UNIONFS, Place, gone, mounts_at, refused, succeed, unionfs, wait_for
from tests.support import syscalls, tracing
from tests.support.patience import patient
from unionfs.daemon import clearing, live, unmount


@contextmanager
def _foreground(place: Place, *extra: str) -> Iterator[subprocess.Popen[str]]:
    """A daemon in the foreground, with a visible exit code."""
    process = subprocess.Popen(
        [*UNIONFS, "mount", "-f", *extra, *map(str, place.layers), str(place.merged)],
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(cli_calls.REPOSITORY)},
        text=True,
    )
    try:
        assert process.stderr is not None
        assert "mounted at" in process.stderr.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def _user(path: Path, how: str = "cwd") -> subprocess.Popen[bytes]:
    """A process that uses a mount in the given way, already started."""
    script = {
        "cwd": "import os,sys; os.chdir(sys.argv[1])",
        "open file": "import sys; held = open(sys.argv[1] + '/base')",
        "root": "import os,sys; os.chroot(sys.argv[1])",
    }[how]
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            script + "\nprint('ready', flush=True)\nimport time; time.sleep(60)",
            str(path),
        ],
        stdout=subprocess.PIPE,
        cwd="/",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def _program(path: Path) -> subprocess.Popen[bytes]:
    """A process whose program is in the mount."""
    shutil.copy("/bin/sleep", path / "program")
    process = subprocess.Popen([path / "program", "60"], cwd="/")
    assert wait_for(lambda: os.readlink(f"/proc/{process.pid}/exe") == str(path / "program"))
    return process


@contextmanager
def _using(path: Path, how: str = "cwd") -> Iterator[subprocess.Popen[bytes]]:
    process = _program(path) if how == "mapped file" else _user(path, how)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_umount_waits_for_the_daemon(place: Place) -> None:
    pid = place.mount()
    (place.merged / "new").write_text("x")
    assert succeed(unionfs("umount", place.merged)) == ""
    assert gone(pid)
    assert mounts_at(place.merged) == []
    assert (place.upper / "new").read_text() == "x"
    assert live.entries() == [] or all(e.pid != pid for e in live.entries())
    assert not list(Path("/run/unionfs").glob(f"{pid}-*"))


def test_umount_by_relative_path_and_through_a_symlink(place: Place) -> None:
    place.mount()
    succeed(unionfs("umount", "merged", cwd=place.root))
    assert mounts_at(place.merged) == []
    place.mount()
    (place.root / "link").symlink_to("merged")
    succeed(unionfs("umount", "link", cwd=place.root))
    assert mounts_at(place.merged) == []


def test_umount_of_what_is_not_ours(place: Place) -> None:
    refused(unionfs("umount", place.merged), f"{place.merged} is not a unionfs mount")
    refused(unionfs("umount", place.root / "nowhere"), "does not exist")
    refused(unionfs("umount", "/proc"), "/proc is a proc mount")
    place.mount()
    (place.merged / "sub").mkdir()
    refused(unionfs("umount", place.merged / "sub"), f"lies inside the mount {place.merged}")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place.merged / "sub"], check=True)
    refused(unionfs("umount", place.merged / "sub"), "is a tmpfs mount")
    refused(unionfs("umount", place.merged), "busy", f"{place.merged}/sub is mounted inside it")
    subprocess.run(["umount", place.merged / "sub"], check=True)
    succeed(unionfs("umount", place.merged))


def test_umount_of_another_fuse_filesystem(place: Place) -> None:
    """It is asked nothing, and stays."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        data = f"fd={device},rootmode=40000,user_id=0,group_id=0"
        syscalls.mount("other", place.merged, "fuse.other", 0, data)
        refused(unionfs("umount", place.merged), f"{place.merged} is a fuse.other mount and none of unionfs")
        assert mounts_at(place.merged) == ["fuse.other"]
        syscalls.umount(place.merged, syscalls.MNT_DETACH)
    finally:
        os.close(device)


@pytest.mark.parametrize("how", ["cwd", "open file", "mapped file", "root"])
def test_busy_mount_names_its_users(place: Place, how: str) -> None:
    pid = place.mount()
    with _using(place.merged, how) as user:
        command = Path(f"/proc/{user.pid}/comm").read_text().strip()
        refused(
            unionfs("umount", place.merged),
            f"{place.merged} is busy",
            f"{command} (pid {user.pid}, {how})",
            "--lazy",
        )
        assert os.listdir(place.merged)
        assert not gone(pid)
    succeed(unionfs("umount", place.merged))


def _listed(place: Place) -> list[dict[str, Any]]:
    """What `unionfs ls` shows of a mountpoint."""
    listed = json.loads(succeed(unionfs("ls", "--json")))
    return [one for one in listed if one["mountpoint"] == str(place.merged)]


def test_a_directory_below_the_mount_is_no_use_of_it(place: Place) -> None:
    with _using(place.merged) as below:
        place.mount()
        with _using(place.merged) as user:
            said = refused(unionfs("umount", place.merged), f"(pid {user.pid}, cwd)")
            assert str(below.pid) not in said
        succeed(unionfs("umount", place.merged))


@contextmanager
def _namespace(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a copy of the mounts, which stays when they are unmounted here."""
    process = subprocess.Popen(
        ["unshare", "-m", *words, "sh", "-c", "echo ready; exec sleep 60"], stdout=subprocess.PIPE, cwd="/"
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_mount_in_another_namespace_is_busy(place: Place) -> None:
    pid = place.mount()
    with _namespace() as user:
        refused(
            unionfs("umount", place.merged),
            f"{place.merged} is busy: used by", f"sleep (pid {user.pid}, mount namespace)",
            "--lazy", "--force",
        )  # fmt: skip
        assert (place.merged / "base").read_text() == "base\n"
        assert not gone(pid)
        succeed(unionfs("umount", "--lazy", place.merged))
        assert mounts_at(place.merged) == []
        (listed,) = _listed(place)
        assert (listed["state"], listed["pid"]) == ("detached", pid)
        # Other tests have namespaces, too.
        held_by = {"pid": user.pid, "command": "sleep", "how": "mount namespace", "container": None}
        assert held_by in listed["held_by"]
        assert f"sleep (pid {user.pid}, mount namespace)" in succeed(unionfs("ls"))
        refused(unionfs("mount", *place.layers, place.merged), f"unionfs umount --force {place.merged}")
        succeed(unionfs("umount", "--force", place.merged))
        assert gone(pid)
        assert _listed(place) == []
        place.mount()
    succeed(unionfs("umount", place.merged))


def test_a_namespace_that_ends_soon_is_waited_for(place: Place) -> None:
    pid = place.mount()
    with subprocess.Popen(["unshare", "-m", "sh", "-c", "echo; sleep 0.7"], stdout=subprocess.PIPE) as user:
        assert user.stdout is not None
        user.stdout.readline()
        succeed(unionfs("umount", place.merged))
    assert gone(pid)


def test_a_mount_in_a_slave_namespace_is_not_busy(place: Place) -> None:
    """Where unmounting propagates (mount_namespaces(7)), as to most containers, nothing stays."""
    above = place.merged.parent
    subprocess.run(["mount", "--bind", above, above], check=True)
    try:
        subprocess.run(["mount", "--make-shared", above], check=True)
        pid = place.mount()
        with _namespace("--propagation", "slave") as user:
            assert str(place.merged) in Path(f"/proc/{user.pid}/mountinfo").read_text()
            succeed(unionfs("umount", place.merged))
            assert gone(pid)
    finally:
        subprocess.run(["umount", "-l", above], check=True)


@pytest.mark.slow_on("direct-passthrough", "direct-cached")
@pytest.mark.parametrize("how", ["cwd", "open file", "mapped file"])
def test_force_cuts_off_who_uses_the_mount(place: Place, session: str, how: str) -> None:
    pid = place.mount(*cli_calls.session_words(session))
    (place.merged / "new").write_text("x")
    with _using(place.merged, how):
        succeed(unionfs("umount", "--force", place.merged))
        assert gone(pid)
        assert mounts_at(place.merged) == []
    assert (place.upper / "new").read_text() == "x"
    refused(unionfs("umount", "--force", place.merged), "is not a unionfs mount")


def test_several_mounts_are_unmounted(place: Place) -> None:
    place.mount()
    other = place.root / "other"
    other.mkdir()
    succeed(unionfs("mount", "-l", place.lower, other))
    done = unionfs("umount", place.merged, "/proc", other)
    assert done.returncode == 1
    assert "/proc is a proc mount" in done.stderr
    assert mounts_at(place.merged) == mounts_at(other) == []


def test_lazy_umount_of_a_busy_mount(place: Place) -> None:
    pid = place.mount()
    with (place.merged / "new").open("w") as held:
        succeed(unionfs("umount", "--lazy", place.merged))
        assert mounts_at(place.merged) == []
        assert not gone(pid)
        held.write("still written")
        held.flush()
        (listed,) = _listed(place)
        user = {"pid": os.getpid(), "command": Path("/proc/self/comm").read_text().strip()}
        assert listed["state"] == "detached"
        assert {**user, "how": "open file", "container": None} in listed["held_by"]
    assert wait_for(lambda: gone(pid))
    assert (place.upper / "new").read_text() == "still written"


def test_lazy_umount_of_an_idle_mount_waits(place: Place) -> None:
    pid = place.mount()
    succeed(unionfs("umount", "--lazy", place.merged))
    assert wait_for(lambda: gone(pid), 2)


def test_umount_with_another_bind_mount_of_it(place: Place) -> None:
    pid = place.mount()
    bound = place.root / "bound"
    bound.mkdir()
    subprocess.run(["mount", "--bind", place.merged, bound], check=True)
    refused(unionfs("umount", place.merged), f"it is also mounted at {bound}; unmount {bound} first")
    assert not gone(pid)
    (listed,) = _listed(place)
    assert (listed["state"], listed["mounted_at"]) == ("active", [])
    assert len(mounts_at(place.merged)) == len(mounts_at(bound)) == 1
    succeed(unionfs("umount", bound))
    assert not gone(pid)
    succeed(unionfs("umount", place.merged))
    assert gone(pid)


def test_lazy_umount_with_another_bind_mount_of_it(place: Place) -> None:
    pid = place.mount()
    bound = place.root / "bound"
    bound.mkdir()
    subprocess.run(["mount", "--bind", place.merged, bound], check=True)
    succeed(unionfs("umount", "--lazy", place.merged))
    (listed,) = _listed(place)
    assert (listed["state"], listed["pid"], listed["mounted_at"]) == ("detached", pid, [str(bound)])
    assert f"detached, mounted at {bound} " in succeed(unionfs("ls"))
    succeed(unionfs("umount", bound))
    assert wait_for(lambda: gone(pid))


def test_umount_waits_for_a_daemon_that_gets_no_processor(place: Place) -> None:
    pid = place.mount()
    os.kill(pid, signal.SIGSTOP)
    try:
        process = subprocess.Popen(
            [*UNIONFS, "umount", place.merged], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert wait_for(lambda: mounts_at(place.merged) == [])
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2 * unmount._NOTICE_SECONDS)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert process.communicate(timeout=patient(20)) == (None, "")
    assert process.returncode == 0
    assert gone(pid)


@pytest.mark.parametrize("command", [["umount"], ["fusermount3", "-u"], ["umount", "-l"]])
def test_unmounted_from_outside(place: Place, command: list[str]) -> None:
    with _foreground(place) as daemon:
        (place.merged / "new").write_text("x")
        subprocess.run([*command, place.merged], check=True)
        assert daemon.wait(10) == 0
    assert live.live_mounts() == [] or all(m.pid != daemon.pid for m in live.live_mounts())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_unmounts(place: Place, number: signal.Signals) -> None:
    with _foreground(place) as daemon:
        (place.merged / "new").write_text("x")
        daemon.send_signal(number)
        assert daemon.wait(10) == 0
        assert mounts_at(place.merged) == []
    assert (place.upper / "new").read_text() == "x"
    assert not list(Path("/run/unionfs").glob(f"{daemon.pid}-*"))


def test_signal_to_the_detached_daemon(place: Place) -> None:
    pid = place.mount()
    os.kill(pid, signal.SIGHUP)
    time.sleep(0.2)
    assert os.listdir(place.merged)
    os.kill(pid, signal.SIGTERM)
    assert wait_for(lambda: gone(pid))
    assert mounts_at(place.merged) == []


def test_many_signals_at_once(place: Place) -> None:
    with _foreground(place) as daemon:
        for number in range(50):
            (place.merged / str(number)).write_text("x")
        for _ in range(20):
            daemon.send_signal(signal.SIGTERM)
            daemon.send_signal(signal.SIGINT)
            time.sleep(0.005)
            if daemon.poll() is not None:
                break
        assert daemon.wait(10) == 0
        assert mounts_at(place.merged) == []
    assert len(os.listdir(place.upper)) == 50


def _end_twice(daemon: subprocess.Popen[str]) -> None:
    """End the daemon of a mount that is in use."""
    daemon.terminate()
    assert daemon.stderr is not None
    while "unmounted, but in use" not in daemon.stderr.readline():
        assert daemon.poll() is None
    daemon.terminate()
    assert daemon.wait(patient(10)) == 0


@pytest.mark.parametrize("how", ["cwd", "open file"])
def test_a_second_signal_cuts_off_who_uses_the_mount(place: Place, how: str) -> None:
    with _foreground(place) as daemon:
        (place.merged / "new").write_text("x")
        with _using(place.merged, how):
            _end_twice(daemon)
            assert mounts_at(place.merged) == []
    assert (place.upper / "new").read_text() == "x"


@pytest.mark.slow_on("direct-passthrough", "direct-cached")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_the_mount_to_who_uses_it(
    place: Place, session: str, number: signal.Signals
) -> None:
    """Like `umount -l`: it is out of the tree, works on for them, and ends with the last of them."""
    with _foreground(place, *cli_calls.session_words(session)) as daemon:
        with (place.merged / "new").open("w") as held, open(place.merged / "base") as other:
            daemon.send_signal(number)
            assert wait_for(lambda: mounts_at(place.merged) == [])
            assert daemon.stderr is not None
            while "unmounted, but in use" not in daemon.stderr.readline():
                assert daemon.poll() is None
            held.write("still written")
            held.flush()
            assert other.read() == "base\n"
            done = unionfs("mount", *place.layers, place.merged)
            refused(done, "is still in use", "processes have files of it open", "umount --force")
            assert mounts_at(place.merged) == []
        assert daemon.wait(patient(10)) == 0
    assert (place.upper / "new").read_text() == "still written"
    place.mount()
    succeed(unionfs("umount", place.merged))


def test_other_commands_beside_a_daemon_that_serves_on(place: Place) -> None:
    """After a signal the upper can be compared; commands that need it idle name its holder and the cure."""
    pid = place.mount()
    (place.merged / "new").write_text("x")
    with open(place.merged / "base"):
        os.kill(pid, signal.SIGTERM)
        assert wait_for(lambda: mounts_at(place.merged) == [])
        layers = ("-u", place.upper, "-l", place.lower, "-l", place.lower2)
        assert succeed(unionfs("diff", *layers)) == "A /new\n"
        output = place.root / "layer.tar"
        for words in (("layer", "export", "-u", place.upper, "-o", output), ("check", *layers)):
            refused(unionfs(*words), "processes have files of it open", f"pid {pid}", "umount --force")
        assert not output.exists()
        assert not gone(pid)
    assert wait_for(lambda: gone(pid))
    succeed(unionfs("layer", "export", "-u", place.upper, "-o", output))


def test_a_mount_waits_for_the_end_of_the_one_before(place: Place) -> None:
    """umount(2) returns before the daemon has written the upper to disk."""
    pid = place.mount()
    os.kill(pid, signal.SIGSTOP)
    try:
        syscalls.umount(place.merged)
        words = [*UNIONFS, "mount", *map(str, place.layers), str(place.merged)]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(live._NOTICE_SECONDS / 2)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert process.communicate(timeout=patient(20)) == (None, "")
    assert process.returncode == 0
    assert place.pid() != pid
    succeed(unionfs("umount", place.merged))


def test_a_mount_waits_for_an_upper_that_is_being_written(place: Place) -> None:
    """However long that takes: the registry has it that the daemon before is about to end."""
    words = tracing.command(place.root / "trace", "syncfs", delay=2 * live._NOTICE_SECONDS)
    with subprocess.Popen(
        [*words, *UNIONFS, "mount", *map(str, place.layers), str(place.merged)], cwd="/",
        env={**os.environ, "PYTHONPATH": str(cli_calls.REPOSITORY)}, stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert wait_for(lambda: [e for e in live.live_mounts() if e.settings.mountpoint == str(place.merged)])
        pid = place.pid()
        syscalls.umount(place.merged)
        assert succeed(unionfs("mount", *place.layers, place.merged)) == ""
        process.wait(patient(20))
    assert place.pid() != pid
    succeed(unionfs("umount", place.merged))


@pytest.mark.parametrize("busy", [False, True])
def test_pages_written_through_mmap_are_not_lost(place: Place, busy: bool) -> None:
    with _foreground(place) as daemon:
        path = place.merged / "mapped"
        path.write_bytes(bytes(1 << 20))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            memory[:] = b"m" * len(memory)
            if busy:
                _end_twice(daemon)
        if not busy:
            daemon.terminate()
            assert daemon.wait(10) == 0
    assert (place.upper / "mapped").read_bytes() == b"m" * (1 << 20)


def test_signal_with_bind_mounts_of_the_union(place: Place) -> None:
    with _foreground(place) as daemon:
        bound = place.root / "bound"
        bound.mkdir()
        (place.merged / "sub").mkdir()
        subprocess.run(["mount", "--bind", place.merged / "sub", bound], check=True)
        daemon.terminate()
        assert daemon.wait(10) == 0
        assert mounts_at(place.merged) == []
        assert mounts_at(bound) == []


def test_signal_does_not_unmount_what_covers_the_union(place: Place) -> None:
    with _foreground(place) as daemon:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place.merged], check=True)
        (place.merged / "precious").touch()
        daemon.terminate()
        assert daemon.wait(10) == 0
        assert (place.merged / "precious").exists()


def test_a_daemon_that_ends_leaves_the_next_mount_alone(place: Place) -> None:
    """The device number of a removed mount is reused by the next one, maybe before its daemon ended."""
    place.mount()
    clearing.clear_leftovers(place.entry().device)
    clearing.clear_dead_mounts(place.entry().device)
    assert mounts_at(place.merged) == ["fuse.unionfs"]
    assert (place.merged / "base").read_text() == "base\n"


def test_signal_after_the_mount_was_moved(place: Place) -> None:
    """The mount is identified by its device, not by its old path."""
    moved = place.root / "moved"
    moved.mkdir()
    with _foreground(place) as daemon:
        subprocess.run(["mount", "--make-private", place.merged], check=True)
        if subprocess.run(["mount", "--move", place.merged, moved], check=False).returncode:
            pytest.skip("the mount's parent is shared, so it cannot be moved")
        daemon.terminate()
        assert daemon.wait(10) == 0
        assert mounts_at(moved) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_umount_after_a_crash(place: Place, number: signal.Signals) -> None:
    pid = place.mount()
    (place.merged / "new").write_text("x")
    os.kill(pid, number)
    assert wait_for(lambda: gone(pid))
    assert mounts_at(place.merged) == ["fuse.unionfs"]
    assert "dead mount" in unionfs("doctor").stdout
    succeed(unionfs("umount", place.merged))
    assert mounts_at(place.merged) == []
    assert not list(Path("/run/unionfs").glob(f"{pid}-*"))
    place.mount()
    assert (place.merged / "new").read_text() == "x"


def test_umount_of_a_dead_mount_that_is_in_use(place: Place) -> None:
    with _using(place.merged.parent):
        pid = place.mount("-o", "subtype=")
        with _using(place.merged):
            os.kill(pid, signal.SIGKILL)
            assert wait_for(lambda: gone(pid))
            succeed(unionfs("umount", place.merged))
            assert mounts_at(place.merged) == []


def test_layers_are_free_at_once(place: Place, filesystem: Callable[..., Path]) -> None:
    """The filesystems of the layers can be unmounted directly after the union, without a retry."""
    lower, upper = filesystem("tmpfs", 16 << 20), filesystem("tmpfs", 16 << 20)
    for name in ("upper", "work"):
        (upper / name).mkdir()
    (lower / "file").write_text("x")
    succeed(unionfs("mount", "-l", lower, "-u", upper / "upper", "-w", upper / "work", place.merged))
    assert (place.merged / "file").read_text() == "x"
    (place.merged / "new").write_text("x")
    with (place.merged / "file").open() as held, (place.merged / "new").open() as written:
        assert held.read() == written.read() == "x"
    succeed(unionfs("umount", place.merged))
    subprocess.run(["umount", lower], check=True)
    subprocess.run(["umount", upper], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", lower], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", upper], check=True)


def test_the_next_mount_with_the_number_of_the_device_stays(place: Place, session: str) -> None:
    """The kernel assigns the number of an unmounted filesystem to the next, and the daemon checks later."""
    (place.root / "others").mkdir()
    with _foreground(place, *cli_calls.session_words(session)) as daemon:
        device = os.stat(place.merged).st_dev
        daemon.send_signal(signal.SIGSTOP)
        try:
            syscalls.umount(place.merged)
            for _ in range(100):
                subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place.root / "others"], check=True)
                if os.stat(place.root / "others").st_dev == device:
                    break
        finally:
            daemon.send_signal(signal.SIGCONT)
        if os.stat(place.root / "others").st_dev != device:
            pytest.skip("somebody else's mount got the number")
        assert daemon.wait(10) == 0
    assert cli_calls.mounts_at(place.root / "others")[0] == "tmpfs"
    assert os.stat(place.root / "others").st_dev == device


def test_lowers_may_be_unmounted_while_mounted(place: Place, filesystem: Callable[..., Path]) -> None:
    """podman unmounts its id-mapped layers right after the call."""
    lower = filesystem("tmpfs", 16 << 20)
    (lower / "file").write_text("x")
    succeed(unionfs("mount", "-l", lower, place.merged))
    subprocess.run(["umount", lower], check=True)
    assert (place.merged / "file").read_text() == "x"
    succeed(unionfs("umount", place.merged))
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", lower], check=True)


def test_daemon_ends_when_its_mount_namespace_does(place: Place) -> None:
    """As in a container: the mount ends with the last process of its namespace."""
    script = " ".join([*UNIONFS, "mount", *map(str, place.layers), str(place.merged)])
    done = cli_calls.call(
        ("unshare", "-m", "sh", "-c", f"{script} && {' '.join(UNIONFS)} ls --json && umount {place.merged}")
    )
    assert done.returncode == 0, done.stderr
    assert f'"mountpoint": "{place.merged}"' in done.stdout
    assert wait_for(lambda: str(place.merged) not in succeed(unionfs("ls")))


def test_umount_right_after_many_closes(place: Place, session: str) -> None:
    """The daemon gets closes after close(2); umount cancels some while they are read."""
    for round_ in range(5):
        with _foreground(place, *cli_calls.session_words(session)) as daemon:
            held = []
            for number in range(200):
                path = place.merged / f"{round_}-{number}"
                path.write_bytes(b"x")
                held.append(os.open(path, os.O_RDONLY))
            for fd in held:
                os.close(fd)
            while subprocess.run(["umount", place.merged], capture_output=True).returncode != 0:
                pass  # busy until the daemon has got the last close
            assert daemon.wait(10) == 0


def test_cut_off_from_outside(place: Place, session: str) -> None:
    with _foreground(place, *cli_calls.session_words(session)) as daemon:
        (place.merged / "new").write_text("x")
        minor = place.entry().device.partition(":")[2]
        control = place.root / "control"
        control.mkdir()
        subprocess.run(["mount", "-t", "fusectl", "fusectl", control], check=True)
        (control / minor / "abort").write_text("1")
        subprocess.run(["umount", control], check=True)
        assert daemon.wait(10) == 1
        assert daemon.stderr is not None
        assert "was cut off from outside" in daemon.stderr.read()
        assert mounts_at(place.merged) == []
        assert (place.upper / "new").read_text() == "x"
