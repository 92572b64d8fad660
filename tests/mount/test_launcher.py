"""The launcher and the resident: the same results as without them, whatever happens to either."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.mount.cli_calls import (
    FUSE_UNIONFS,
    REPOSITORY,
    Place,
    call,
    gone,
    mounts_at,
    refused,
    succeed,
    unionfs,
    wait_for,
)
from tests.mount.launcher_calls import LAUNCHER, end_residents, launch, need_launcher, residents
from tests.support import tracing
from tests.support.patience import patient
from unionfs.daemon import live
from unionfs.daemon.resident import SETTING
from unionfs.daemon.runtime import candidates, runtime_directory
from unionfs.sys.inheritance import has_same_rights
from unionfs.sys.process import children_of

pytestmark = pytest.mark.xdist_group("launcher")


@pytest.fixture(autouse=True)
def _launcher() -> Iterator[None]:
    need_launcher()
    end_residents()
    yield
    end_residents()


def _mount(place: Place, **extra: str) -> int:
    assert succeed(launch("-o", place.data, place.merged, **extra)) == ""
    return place.pid()


def _unmount(place: Place) -> None:
    succeed(unionfs("umount", place.merged))


def test_one_resident_serves_all(place: Place) -> None:
    pids = set()
    for _ in range(3):
        _mount(place)
        pids |= residents()
        _unmount(place)
    assert len(pids) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["-x", "M"], ["-o"], ["a", "M", "b"], ["-o", "lowerdir=/nowhere", "M"],
        ["-o", "DATA,nonsense", "M"], ["-o", "DATA", "/nowhere"], ["-o", "DATA,context=nonsense", "M"],
        ["--help"], ["-V"],
        ["source", "M", "-o", "remount,ro"], ["-f", "-o", "lowerdir=/nowhere", "M"],
    ],
    ids=str,
)  # fmt: skip
def test_the_same_words(place: Place, arguments: list[str]) -> None:
    """Errors, help and versions have the same text, stream and exit code."""
    words = [word.replace("DATA", place.data) if word != "M" else str(place.merged) for word in arguments]
    wanted, done = call(FUSE_UNIONFS, *words), launch(*words)
    assert (done.returncode, done.stdout, done.stderr) == (wanted.returncode, wanted.stdout, wanted.stderr)
    assert mounts_at(place.merged) == []


def test_a_mountpoint_in_use(place: Place) -> None:
    _mount(place)
    refused(launch("-o", place.data, place.merged), "is in use by the active mount", program="fuse-unionfs")
    _unmount(place)


STATE = """
import os, sys
pid = sys.argv[1]
wanted = ("Uid", "Gid", "Groups", "Umask", "SigBlk", "SigIgn", "CapInh", "CapPrm", "CapEff", "CapBnd",
          "CapAmb", "NoNewPrivs", "Cpus_allowed", "Threads")
for line in open(f"/proc/{pid}/status"):
    if line.split(":")[0] in wanted:
        print(line, end="")
for name in ("limits", "cgroup", "oom_score_adj", "comm"):
    print(open(f"/proc/{pid}/{name}").read())
fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
print("session", fields[3] == pid, "group", fields[2] == pid, "nice", fields[16], "policy", fields[38])
print(os.readlink(f"/proc/{pid}/cwd"), os.readlink(f"/proc/{pid}/root"))
print([os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)])
print(sorted(os.readlink(f"/proc/{pid}/ns/{name}") for name in os.listdir(f"/proc/{pid}/ns")))
print(b"MARK=here" in open(f"/proc/{pid}/environ", "rb").read().split(bytes(1)))
print(open(f"/proc/{pid}/cmdline", "rb").read().split(bytes(1))[-4:])
"""


def _state(place: Place, command: list[str], around: str) -> str:
    """What ps(1) and /proc show of a daemon started by a command in a shell that has run `around`."""
    mount = f"{around}; exec -a fuse-unionfs {' '.join(command)} -o {place.data} merged"
    done = call(
        ("bash", "-c", mount), cwd=place.root, env={"MARK": "here", SETTING: "60"},
    )  # fmt: skip
    assert succeed(done) == ""
    state = succeed(call((sys.executable, "-c", STATE), str(place.pid())))
    _unmount(place)
    return state


@pytest.mark.parametrize(
    "around", [
        ":", "umask 0077", "ulimit -Ss 1024; ulimit -n 8192; ulimit -f 100", "renice -n 7 $$ >/dev/null",
        "echo 77 >/proc/self/oom_score_adj; :", "taskset -cp 0 $$ >/dev/null", "chrt -b -p 0 $$",
        "trap '' INT HUP", "exec 7</dev/null 8>/dev/null",
    ],
)  # fmt: skip
def test_the_daemon_is_in_the_state_of_its_caller(place: Place, around: str) -> None:
    around = around.replace("/proc/self", "/proc/$$")
    script = place.root / "fuse-unionfs"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from unionfs.cli.fuse_unionfs import main\nmain()\n"
    )
    script.chmod(0o755)
    wanted = _state(place, [str(script)], around)
    _mount(place)  # by a resident in another state
    _unmount(place)
    assert _state(place, [str(LAUNCHER)], around) == wanted


@pytest.mark.parametrize("version", [1, 2])
def test_the_daemon_is_in_the_control_group_of_its_caller(place: Place, version: int) -> None:
    top = next(
        (
            Path(words[1])
            for line in Path("/proc/mounts").read_text().splitlines()
            if (words := line.split())[2] == ("cgroup2" if version == 2 else "cgroup")
            and (version == 2 or "pids" in words[3].split(","))
        ),
        None,
    )
    if top is None or not os.access(top, os.W_OK):
        pytest.skip(f"no control groups of version {version}")
    group = top / f"unionfs-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        _mount(place)
        _unmount(place)
        words = f"echo $$ >{group}/cgroup.procs && exec {LAUNCHER} -o {place.data} {place.merged}"
        succeed(call(("sh", "-c", words)))
        assert f"/{group.name}\n" in Path(f"/proc/{place.pid()}/cgroup").read_text()
        _unmount(place)
    finally:
        end_residents()
        assert wait_for(lambda: (group / "cgroup.procs").read_text() == "")
        group.rmdir()


def test_what_is_shown_of_the_daemon(place: Place) -> None:
    pid = _mount(place)
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    assert words[1:-1] == ["-o", place.data, str(place.merged)]
    assert Path(f"/proc/{pid}/comm").read_text() == "fuse-unionfs\n"
    _unmount(place)


def _private(pid: int) -> int:
    """KiB of memory that no other process shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))


def test_daemons_share_their_memory(place: Place) -> None:
    """Pages with the same content, soon after mounting; they go on serving, and show their command lines.

    That the first daemon finds no mount, and the others find some, makes no other pages.
    """
    pids, before, mountpoints = [], [], []
    for number in range(3):
        upper, work, mountpoint = (place.root / f"{part}{number}" for part in ("u", "w", "m"))
        for path in (upper, work, mountpoint):
            path.mkdir()
        succeed(launch("-o", f"lowerdir={place.lower},upperdir={upper},workdir={work}", mountpoint))
        pids += [entry.pid for entry in live.live_mounts() if entry.settings.mountpoint == str(mountpoint)]
        mountpoints.append(mountpoint)
        before.append(_private(pids[-1]))
    # One that still has a thread when it first tries does so again, 17 seconds after mounting.
    shared = wait_for(
        lambda: all("unionfs-pages" in Path(f"/proc/{pid}/maps").read_text() for pid in pids), seconds=30
    )
    assert shared
    for pid, path, kibibytes in zip(pids, mountpoints, before, strict=True):
        assert wait_for(lambda pid=pid, most=kibibytes / 3: _private(pid) < most), (before, _private(pid))
        assert os.fsencode(path) in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert (path / "base").read_text() == "base\n"
        succeed(unionfs("umount", path))


def test_by_other_names(place: Place) -> None:
    for name in ("fuse-overlayfs", "mount.fuse.unionfs"):
        link = place.root / name
        link.symlink_to(LAUNCHER)
        words = ["-o", place.data, place.merged] if name == "fuse-overlayfs" else [
            "source", place.merged, "-o", place.data
        ]
        succeed(launch(*words, program=link))
        assert mounts_at(place.merged) == ["fuse.unionfs"]
        assert len(residents()) == 1
        _unmount(place)
    refused(launch("source", place.merged, "-f", "-o", "lowerdir=/nowhere", program=link), "/nowhere")


def test_unionfs_mount_takes_it(place: Place) -> None:
    command = (str(LAUNCHER.with_name("unionfs")),)
    succeed(call(command, "mount", *place.layers, place.merged, env={SETTING: "60"}))
    assert len(residents()) == 1
    assert Path(f"/proc/{place.pid()}/comm").read_text() == "unionfs\n"
    _unmount(place)
    done = call(command, "mount", "-l", "/nowhere", place.merged)
    assert done.stderr == unionfs("mount", "-l", "/nowhere", place.merged).stderr
    assert done.returncode == 1


def test_without_a_resident(place: Place) -> None:
    _mount(place, seconds="0")
    assert residents() == set()
    _unmount(place)


def test_it_ends_when_it_is_idle(place: Place) -> None:
    with runtime_directory() as directory:
        before = set(directory.names())  # those of other installations may be there
        _mount(place, seconds="0.5")
        assert wait_for(lambda: residents() == set())
        assert [name for name in {*directory.names()} - before if name.startswith("resident-")] == []
    assert os.listdir(place.merged)
    _unmount(place)


def test_a_stale_socket(place: Place) -> None:
    _mount(place)
    _unmount(place)
    (before,) = residents()
    end_residents(signal.SIGKILL)
    _mount(place)
    (after,) = residents()
    assert after != before
    _unmount(place)


def test_a_resident_that_does_not_answer(place: Place) -> None:
    """The call runs without it, once: nothing happens when it wakes up."""
    _mount(place)
    _unmount(place)
    (pid,) = residents()
    os.kill(pid, signal.SIGSTOP)
    try:
        _mount(place)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert mounts_at(place.merged) == ["fuse.unionfs"]
    _unmount(place)
    _mount(place)
    _unmount(place)
    assert residents() == {pid}


def test_an_upgrade(place: Place) -> None:
    """A launcher of another version is not served by the resident of the old one, which ends."""
    bin = place.root / "bin"
    bin.mkdir()
    launcher = bin / "fuse-unionfs"
    shutil.copy(LAUNCHER, launcher)
    shutil.copy(LAUNCHER.with_name("unionfs"), bin)
    try:
        pids = []
        for _ in range(2):
            succeed(launch("-o", place.data, place.merged, program=launcher))
            _unmount(place)
            pids += residents(launcher)
            shutil.copy(LAUNCHER, bin / "new")
            os.replace(bin / "new", launcher)
        assert len(pids) == 2
        assert gone(pids[0])
    finally:
        end_residents(program=launcher)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True])
def test_many_calls_at_once(place: Place, kill: bool) -> None:
    """Each is served, even while the resident is killed again and again."""
    mountpoints = [place.root / f"m{number}" for number in range(20)]
    for path in mountpoints:
        path.mkdir()
    with ThreadPoolExecutor(len(mountpoints)) as threads:
        calls = [threads.submit(launch, "-o", f"lowerdir={place.lower}", path) for path in mountpoints]
        while kill and not all(one.done() for one in calls):
            for pid in residents():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    for one, path in zip(calls, mountpoints, strict=True):
        succeed(one.result())
        assert mounts_at(path) == ["fuse.unionfs"]
        succeed(unionfs("umount", path))
    assert kill or len(residents()) == 1


@contextmanager
def _held(place: Place) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A launcher and its pid; the daemon that its new resident forks pauses when it has mounted."""
    words = tracing.command(place.root / "trace", "move_mount", delay=5)
    with subprocess.Popen(
        [*words, str(LAUNCHER), "-o", f"{place.data},session=direct", str(place.merged)], text=True, cwd="/",
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), SETTING: "60"},
    ) as process:  # fmt: skip
        try:
            assert wait_for(lambda: mounts_at(place.merged) != [], 20)
            (launcher,) = (pid for pid in children_of(process.pid) if _program(pid) == str(LAUNCHER))
            yield process, launcher
        finally:
            end_residents()
            process.terminate()


def _program(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""


def test_the_caller_is_killed(place: Place) -> None:
    """Nobody learns of the mount, so it is removed."""
    with _held(place) as (_, launcher):
        os.kill(launcher, signal.SIGKILL)
        assert wait_for(lambda: mounts_at(place.merged) == [], 20)
    _mount(place)
    _unmount(place)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_caller_is_interrupted(place: Place, number: signal.Signals) -> None:
    with _held(place) as (process, launcher):
        os.kill(launcher, number)
        assert process.stderr is not None
        # The launcher itself says so if the mount was usable already.
        assert process.stderr.readline() in (
            f"fuse-unionfs: mounting at {place.merged} was interrupted; try again.\n",
            "fuse-unionfs: mounting was interrupted; try again.\n",
        )
        assert wait_for(lambda: gone(launcher))
        assert mounts_at(place.merged) == []


def test_the_resident_is_killed_during_a_call(place: Place) -> None:
    with _held(place) as (_, launcher):
        (pid,) = residents()
        os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: gone(launcher), 20)
        assert os.listdir(place.merged) == ["base", "deep"]
        _unmount(place)


@pytest.mark.parametrize("rights", [[], ["setpriv", "--bounding-set", "-sys_ptrace"]], ids=["all", "fewer"])
def test_a_mount_namespace_of_its_own(place: Place, rights: list[str]) -> None:
    """It has its own resident, which does not keep it alive; also where pid 1 may not be looked at."""
    _mount(place)
    _unmount(place)
    outside = residents()
    words = f"{LAUNCHER} -o {place.data} {place.merged} && ls {place.merged} && umount {place.merged}"
    done = call(("unshare", "-m", *rights, "sh", "-c", words), env={SETTING: "60"})
    assert succeed(done).split() == ["base", "deep"]
    assert wait_for(lambda: residents() == outside, patient(20))


@pytest.mark.parametrize("xdg", [True, False])
def test_it_finds_the_same_runtime_directory(place: Place, xdg: bool) -> None:
    """That of the host's root, and one in a user namespace, which is never shared with root's."""
    chosen = place.root / "runtime"
    chosen.mkdir(mode=0o700)
    code = "from unionfs.daemon.runtime import runtime_directory; print(runtime_directory().path)"
    script = (
        f"{LAUNCHER} -o lowerdir={place.lower} {place.merged} && {sys.executable} -c '{code}' && "
        f"ls $({sys.executable} -c '{code}') && umount {place.merged}"
    )
    environment = {"XDG_RUNTIME_DIR": str(chosen) if xdg else "", SETTING: "60"}
    done = call(("unshare", "-Urm", "sh", "-c", script), env=environment)
    path, *names = succeed(done).split()
    assert any(name.startswith("resident-") and name.endswith(".sock") for name in names)
    assert path not in candidates()
    assert (path == f"{chosen}/unionfs") is xdg
    if not xdg:
        assert wait_for(lambda: residents() == set(), patient(20))
        shutil.rmtree(path)


def test_who_has_the_same_rights() -> None:
    def seen(*around: str) -> bool:
        words = [*around, "sh", "-c", "echo; exec sleep 60"]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                process.stdout.readline()
                return has_same_rights(process.pid)
            finally:
                process.kill()

    assert seen()
    if os.geteuid() == 0:
        for around in (
            ["unshare", "-m"], ["unshare", "-n"], ["unshare", "-Ur"], ["chroot", "/proc/self/root/usr/.."],
            ["setpriv", "--no-new-privs"], ["setpriv", "--bounding-set", "-sys_boot"],
            ["setpriv", "--groups", "5"], ["setpriv", "--reuid", "1"],
            ["setpriv", "--regid", "1", "--keep-groups"],
        ):  # fmt: skip
            assert seen(*around) is (around[0] == "chroot"), around
    assert not has_same_rights(2**22 - 1)
