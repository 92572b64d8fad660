"""Root's commands and misleading users: their runtime files, daemons, mounts and storage roots."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.mount.cli_calls import (
    UNIONFS,
    Done,
    Place,
    call,
    gone,
    listed,
    refused,
    succeed,
    unionfs,
    wait_for,
)
from tests.mount.user_calls import UID, Host
from tests.security import attacks
from tests.support import syscalls, turns
from tests.support.worker import Worker
from unionfs.daemon import live, others
from unionfs.sys import unmount as sys_unmount
from unionfs.sys.mountinfo import MountEntry, mounted_at
from unionfs.sys.process import pid_and_start

ATTACKER = 1001
ROUNDS = 1000
RACE_SECONDS = 10.0
TROUBLE = ("fifo", "zero", "huge", "nested", "directory", "socket")


@contextmanager
def directory_of(uid: int, path: Path) -> Iterator[Path]:
    """A directory of a user at a well-known path, which must not exist yet."""
    with turns.only_one(path.name):
        above = None if path.parent.exists() else path.parent
        if path.exists() or path.is_symlink():
            pytest.skip(f"{path} is in use")
        path.mkdir(mode=0o700, parents=True)
        os.chown(path, uid, uid)
        if above is not None:
            os.chown(above, uid, uid)
        try:
            yield path
        finally:
            if path.is_symlink():
                path.unlink()
            shutil.rmtree(path if above is None else above, ignore_errors=True)


@pytest.fixture(params=[f"/tmp/unionfs-{ATTACKER}", f"/run/user/{ATTACKER}/unionfs"])
def runtime(request: pytest.FixtureRequest, root: None) -> Iterator[Path]:
    """The attacker's runtime directory for daemons."""
    with directory_of(ATTACKER, Path(request.param)) as path:
        yield path


def at_once(*commands: Sequence[str | Path]) -> list[Done]:
    """The results of commands that run side by side, since each waits for users who do not answer."""
    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(lambda words: unionfs(*words), commands))


def all_commands(place: Place) -> None:
    """Run every command that reads the registry or searches for mounts; each must end soon, with success."""
    began = time.monotonic()
    place.mount()
    *shown, doctor = at_once(
        ("ls",), ("ls", "--json"), ("inspect", place.merged), ("stats", "--seconds", "0", place.merged),
        ("diff", place.merged), ("doctor",),
    )  # fmt: skip
    for done in shown:
        succeed(done)
    assert doctor.returncode == 0
    succeed(unionfs("umount", place.merged))
    umount, inspect = at_once(("umount", place.merged), ("inspect", place.merged))
    refused(umount, "is not a unionfs mount")
    refused(inspect, "is not an active unionfs mount")
    assert time.monotonic() - began < 60


class TestRuntimeFiles:
    def test_trouble_in_a_users_directory(self, place: Place, attacker: Worker, runtime: Path) -> None:
        for what in TROUBLE:
            attacker.call(attacks.plant, str(runtime / f"x-{what}.json"), what)
        all_commands(place)

    def test_trouble_in_the_own_directory(self, place: Place) -> None:
        """As after a restore of /run, or a mistake by root."""
        names = {name: what for what in TROUBLE for name in (f"x-{what}.json", f"unionfs.log.{what}")}
        for name, what in names.items():
            attacks.plant(f"/run/unionfs/{name}", what)
        try:
            all_commands(place)
        finally:
            for name in names:
                with suppress(FileNotFoundError, IsADirectoryError):
                    os.unlink(f"/run/unionfs/{name}")
                with suppress(FileNotFoundError):
                    os.rmdir(f"/run/unionfs/{name}")
            attacks.stop()

    def test_nothing_of_a_user_is_removed(self, place: Place, attacker: Worker, runtime: Path) -> None:
        """Neither in place, nor through a symlink."""
        victim = place.root / "victim"
        victim.mkdir(mode=0o700)
        for name in ("daemon.json", "daemon.sock"):
            (victim / name).write_text("precious")
            (runtime / name).write_text("the user's")
        runtime.rename(runtime.with_name("aside"))
        runtime.symlink_to(victim)
        try:
            all_commands(place)
        finally:
            runtime.unlink()
            runtime.with_name("aside").rename(runtime)
        all_commands(place)
        assert sorted(os.listdir(victim)) == ["daemon.json", "daemon.sock"]
        assert sorted(os.listdir(runtime)) == ["daemon.json", "daemon.sock"]

    def test_a_directory_that_is_swapped(self, attacker: Worker, runtime: Path, area: Path) -> None:
        victim = area / "victim"
        victim.mkdir(mode=0o700)
        for name in ("daemon.json", "daemon.sock"):
            (victim / name).write_text("precious")
            (runtime / name).write_text("the user's")
        link = runtime.with_name(f"{runtime.name}-link")
        link.symlink_to(victim)
        os.lchown(link, ATTACKER, ATTACKER)
        try:
            attacker.call(attacks.swap, str(runtime), str(link))
            deadline = time.monotonic() + RACE_SECONDS
            for _ in range(ROUNDS):
                live.entries()
                others.mounts_of_others()
                if time.monotonic() > deadline:
                    break
        finally:
            attacker.call(attacks.stop)
            link, runtime = (link, runtime) if link.is_symlink() else (runtime, link)
            left = sorted(os.listdir(runtime))
            link.unlink()
            shutil.rmtree(runtime)
        assert left == sorted(os.listdir(victim)) == ["daemon.json", "daemon.sock"]

    def test_claims_of_a_user_block_nobody(self, place: Place, attacker: Worker, runtime: Path) -> None:
        place.mount()
        entry = place.entry()
        mine = live.LiveMount(
            entry.settings, attacker.pid, attacker.call(attacks.started), entry.device, 0.0, entry.claims
        )
        succeed(unionfs("umount", place.merged))
        (runtime / f"{mine.name}.json").write_text(json.dumps(mine.to_json()))
        os.chown(runtime / f"{mine.name}.json", ATTACKER, ATTACKER)
        all_commands(place)


@pytest.fixture
def silent_mount(place: Place) -> Iterator[Path]:
    """A mount of the attacker, with a daemon that answers no request, not even root's."""
    where = place.root / "silent"
    where.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        syscalls.mount(
            "evil", where, "fuse.unionfs", 0,
            f"fd={device},rootmode=40000,user_id={ATTACKER},group_id={ATTACKER},allow_other",
        )  # fmt: skip
        yield where
    finally:
        with suppress(OSError):
            syscalls.umount(where, syscalls.MNT_DETACH)
        os.close(device)


def entry_of(path: Path) -> MountEntry:
    found = mounted_at(str(path))
    assert found is not None
    return found


class TestMounts:
    def test_nothing_is_asked_of_a_users_mount(self, place: Place, silent_mount: Path) -> None:
        all_commands(place)
        ls, inspect, diff, mount = at_once(
            ("ls", "--json"), ("inspect", silent_mount), ("diff", silent_mount),
            ("mount", *place.layers, silent_mount),
        )  # fmt: skip
        shown = [one for one in listed(ls) if one["mountpoint"] == str(silent_mount)]
        assert [(one["pid"], one["layers"]) for one in shown] == [(None, None)]
        refused(inspect, "whose daemon does not answer root")
        refused(diff, "whose daemon does not answer root")
        refused(mount, "is busy")
        succeed(unionfs("umount", silent_mount))
        assert mounted_at(str(silent_mount)) is None

    def test_cleanup_of_a_mount_that_does_not_answer(self, silent_mount: Path) -> None:
        """Root's own process asks nothing of it; the child that does is given up after seconds."""
        refused(unionfs("cleanup", silent_mount), "is not dead")
        assert str(silent_mount) not in succeed(unionfs("cleanup", "--dry-run"))
        shown = [one for one in listed(unionfs("ls", "--json")) if one["mountpoint"] == str(silent_mount)]
        assert [one["state"] for one in shown] == [None]
        assert mounted_at(str(silent_mount)) is not None

    def test_cleanup_of_a_dead_mount_beside_trouble(self, host: Host, place: Place) -> None:
        """What the user planted in the runtime directory is read by a child that is that user, if at all."""
        with directory_of(UID, Path(f"/run/user/{UID}/unionfs")) as runtime:
            host.runtime = runtime.parent
            pid = host.mount()
            os.kill(pid, signal.SIGKILL)
            assert wait_for(lambda: gone(pid))
            victim = place.root / "victim"
            victim.mkdir(mode=0o700)
            (victim / f"{pid}-1.json").write_text("precious")
            (runtime / f"{pid}-1.json").symlink_to(victim / f"{pid}-1.json")
            for what in TROUBLE:
                attacks.plant(str(runtime / f"x-{what}.json"), what)
            try:
                shown = as_root(host, "cleanup", place.merged)
            finally:
                attacks.stop()
            assert shown == f"unmounted {place.merged} of uid {UID}: its daemon has died\n"
            assert f" {place.merged} " not in host.root("cat", "/proc/mounts").stdout
            assert (victim / f"{pid}-1.json").read_text() == "precious"

    @pytest.mark.parametrize("how", ["endless", "drip", "silent", "nested", "answer"])
    def test_a_daemon_that_lies(
        self, place: Place, attacker: Worker, silent_mount: Path, how: str
    ) -> None:
        name = live.abstract_name(live.entry_name(attacker.pid, attacker.call(attacks.started)))
        answer = {"device": entry_of(silent_mount).device, "since": 1e9, "settings": {"lowers": 5}}
        attacker.call(attacks.lie, name, how, answer)
        all_commands(place)
        assert all(one["pid"] != attacker.pid for one in listed(unionfs("ls", "--json")))

    def test_a_users_daemon_speaks_only_of_the_users_mounts(
        self, place: Place, attacker: Worker, silent_mount: Path
    ) -> None:
        place.mount()
        entry = place.entry()
        name = live.abstract_name(live.entry_name(attacker.pid, attacker.call(attacks.started)))
        settings = entry.settings.to_json() | {"mountpoint": "/etc", "fsname": "\x1b[2Jcleared"}
        attacker.call(attacks.lie, name, "answer", {
            "device": entry.device, "since": 1e9, "settings": settings,
        })  # fmt: skip
        assert attacker.pid not in {one["pid"] for one in listed(unionfs("ls", "--json"))}
        attacker.call(attacks.stop)
        with Worker(ATTACKER, ATTACKER, modules=["tests.security.attacks"]) as second:
            name = live.abstract_name(live.entry_name(second.pid, second.call(attacks.started)))
            second.call(attacks.lie, name, "answer", {
                "device": entry_of(silent_mount).device, "since": 1e9, "settings": settings,
            })  # fmt: skip
            (found,) = [m for m in others.mounts_of_others().answered if m.pid == second.pid]
            assert found.settings.mountpoint == str(silent_mount)
            assert found.uid == ATTACKER
            assert "\x1b" not in succeed(unionfs("inspect", silent_mount))
        succeed(unionfs("umount", place.merged))

    def test_a_name_with_somebody_elses_pid(self, place: Place, attacker: Worker) -> None:
        """A socket counts only for its listening process."""
        place.mount()
        entry = place.entry()
        attacker.call(attacks.lie, live.abstract_name(entry.name), "answer", {"device": entry.device})
        assert entry.pid not in {mount.pid for mount in others.mounts_of_others().answered}
        succeed(unionfs("umount", place.merged))

    def test_a_users_daemon_answers_its_user_and_root_alone(
        self, host: Host, place: Place, attacker: Worker
    ) -> None:
        pid = host.mount()
        pid, started = pid_and_start(pid)
        name = live.abstract_name(live.entry_name(pid, started))
        assert attacker.call(attacks.ask, name) == b""
        assert attacks.ask(name).startswith(b'{"settings"')
        with Worker(UID, UID, modules=["tests.security.attacks"]) as same:
            assert same.call(attacks.ask, name).startswith(b'{"settings"')
        (found,) = [mount for mount in others.mounts_of_others().answered if mount.pid == pid]
        assert (found.uid, found.settings.mountpoint) == (UID, str(place.merged))
        succeed(host.unionfs("umount", place.merged))

    def test_root_reads_the_diff_as_the_user(self, host: Host, place: Place) -> None:
        """The user determines the paths of the layers."""
        host.mount()
        host.run("sh", "-c", f"echo new > {place.merged}/new")
        assert as_root(host, "diff", place.merged) == "A /new\n"
        secret = place.root / "secret"
        (secret / "inner").mkdir(parents=True)
        secret.chmod(0o700)
        (file,) = (host.runtime / "unionfs").glob("*.json")
        file.write_text(file.read_text().replace(str(place.upper), str(secret)))
        done = host.root("env", *environment(host), *UNIONFS, "diff", place.merged, check=False)
        refused(done, f"uid {UID}", "as that user")
        succeed(host.unionfs("umount", place.merged))

    def test_unmounting_where_the_way_is_led_elsewhere(self, attacker: Worker, area: Path) -> None:
        """A user exchanges a directory above the mount for one where root has a mount."""
        theirs = area / "theirs"
        for name in ("a", "b"):
            (theirs / name / "m").mkdir(parents=True)
        for path in (theirs, *theirs.glob("*")):
            os.chown(path, ATTACKER, ATTACKER)
        syscalls.mount("victim", theirs / "b" / "m", "tmpfs", 0, "size=64k")
        victim = entry_of(theirs / "b" / "m")
        attacker.call(attacks.swap, str(theirs / "a"), str(theirs / "b"))
        ended = 0
        try:
            deadline = time.monotonic() + RACE_SECONDS
            while ended < ROUNDS and time.monotonic() < deadline:
                syscalls.mount("theirs", theirs / "a" / "m", "tmpfs", 0, "size=64k")
                for mount in [m for m in all_mounts() if m.source == "theirs"]:
                    with suppress(OSError):
                        sys_unmount.unmount_id(f"{theirs}/a/m", mount.mount_id, sys_unmount.MNT_DETACH)
                        ended += 1
                assert victim.mount_id in {m.mount_id for m in all_mounts()}
        finally:
            attacker.call(attacks.stop)
            clear("theirs")
            clear("victim")
        assert ended > 0


def all_mounts() -> list[MountEntry]:
    from unionfs.sys.mountinfo import read_mountinfo

    return read_mountinfo()


def clear(source: str) -> None:
    """Unmount all mounts with this source."""
    while left := [m for m in all_mounts() if m.source == source]:
        for mount in left:
            with suppress(OSError):
                syscalls.umount(mount.mountpoint, syscalls.MNT_DETACH)


def environment(host: Host) -> list[str]:
    from tests.mount import cli_calls

    return [f"PYTHONPATH={cli_calls.REPOSITORY}"]


def as_root(host: Host, *arguments: str | Path) -> str:
    """The output of a command by root in the user's mount namespace."""
    return host.root("env", *environment(host), *UNIONFS, *arguments).stdout


class TestStorageOfUsers:
    def test_umount_of_a_dead_mount_with_volumes(self, host: Host, place: Place) -> None:
        """The cleanup in the user's storage, which the user has redirected, runs as the user."""
        store = place.root / "store"
        store.mkdir()
        os.chown(store, UID, UID)
        pid = host.mount("-v", "evil:/v", "--root", str(store))
        guards = children_named("unionfs-guard", UID)
        for number in (*guards, pid):
            os.kill(number, signal.SIGKILL)
        assert wait_for(lambda: gone(pid))
        private = place.root / "private"
        private.mkdir(mode=0o700)
        (store / "registry.db").symlink_to(private / "registry.db")
        shutil.rmtree(store / "locks")
        (store / "locks").symlink_to(private)
        shutil.rmtree(store / "volumes")
        (store / "volumes").symlink_to(private)
        as_root(host, "umount", "--lazy", place.merged)
        assert os.listdir(private) == []
        assert f" {place.merged} " not in host.root("cat", "/proc/mounts").stdout

    def test_umount_of_a_dead_mount_gives_volumes_back(self, host: Host, place: Place) -> None:
        """The same without an attack: with logind's directory root's umount finds the remaining work."""
        with directory_of(UID, Path(f"/run/user/{UID}/unionfs")) as runtime:
            host.runtime = runtime.parent
            pid = host.mount("-v", "mine:/v", "--root", str(place.root / "runtime" / "store"))
            for number in (*children_named("unionfs-guard", UID), pid):
                os.kill(number, signal.SIGKILL)
            assert wait_for(lambda: gone(pid))
            as_root(host, "umount", place.merged)
            assert [name for name in os.listdir(runtime) if name.endswith(".json")] == []


def children_named(name: str, uid: int) -> list[int]:
    """The processes of a user with this name."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if path.stat().st_uid == uid and (path / "comm").read_text().strip() == name:
                found.append(int(path.name))
    return found


class TestUserNamespace:
    def test_uid_0_there_is_not_the_real_root(self, host: Host, place: Place) -> None:
        """Without XDG_RUNTIME_DIR, as in cron and `su`, and with root's own directory as an obstacle."""
        with directory_of(0, Path("/tmp/unionfs-0")) as roots, turns.only_one(f"unionfs-{UID}"):
            script = (
                f"{' '.join(host.command)} mount {' '.join(map(str, place.layers))} {place.merged} && "
                f"cat {place.merged}/base && {' '.join(host.command)} umount {place.merged}"
            )
            done = host.run("env", "-u", "XDG_RUNTIME_DIR", "unshare", "-Urm", "sh", "-c", script)
            if "unshare" in done.stderr:
                pytest.skip(f"no user namespaces here: {done.stderr}")
            assert succeed(done) == "base\n"
            assert os.listdir(roots) == []
            left = Path(f"/tmp/unionfs-{UID}")
            assert not left.exists() or left.stat().st_uid == UID
            shutil.rmtree(left, ignore_errors=True)

    def test_logind_has_a_directory(self, host: Host, place: Place) -> None:
        """It is searched before /tmp, even if the variable is not set."""
        with directory_of(UID, Path(f"/run/user/{UID}/unionfs")) as runtime:
            runtime.rmdir()
            done = host.run(
                "env", "-u", "XDG_RUNTIME_DIR", *host.command, "mount", *place.layers, place.merged
            )
            succeed(done)
            assert {"json", "sock"} <= {name.rpartition(".")[2] for name in os.listdir(runtime)}
            done = host.run("env", "-u", "XDG_RUNTIME_DIR", *host.command, "umount", place.merged)
            succeed(done)


class TestLocks:
    def test_a_lock_of_a_user_who_may_only_read_a_layer(self, place: Place, attacker: Worker) -> None:
        attacker.call(attacks.hold_lock, str(place.upper))
        with suppress(PermissionError):
            attacker.call(attacks.hold_lock, str(place.work))
        all_commands(place)

    def test_a_lock_of_a_user_who_may_write_it(self, place: Place, attacker: Worker) -> None:
        """Like the lock of a mount by this user."""
        os.chown(place.upper, ATTACKER, ATTACKER)
        attacker.call(attacks.hold_lock, str(place.upper))
        refused(unionfs("mount", *place.layers, place.merged), "already in use by another mount")


class TestLimits:
    """The mounting shell's limits are only for the shell."""

    def test_processor_time(self, place: Place) -> None:
        layers = " ".join(map(str, place.layers))
        mount = f"exec {' '.join(UNIONFS)} mount {layers} {place.merged}"
        succeed(call(("bash", "-c"), f"ulimit -St 1; {mount}"))
        pid = place.pid()
        deadline = time.monotonic() + 60
        while cpu_seconds(pid) < 1.5 and time.monotonic() < deadline:
            for number in range(200):
                (place.merged / f"f{number}").touch()
                (place.merged / f"f{number}").unlink()
        assert not gone(pid)
        succeed(unionfs("umount", place.merged))

    def test_file_size(self, place: Place) -> None:
        (place.lower / "large").write_bytes(b"x" * 3_000_000)
        layers = " ".join(map(str, place.layers))
        mount = f"exec {' '.join(UNIONFS)} mount {layers} {place.merged}"
        succeed(call(("bash", "-c"), f"ulimit -Sf 1000; {mount}"))
        with (place.merged / "large").open("ab") as file:
            file.write(b"y")
        assert (place.merged / "large").stat().st_size == 3_000_001
        succeed(unionfs("umount", place.merged))

    def test_all_of_them(self, place: Place) -> None:
        """Including hard ones if root may raise them; a daemon never dumps core."""
        layers = " ".join(map(str, place.layers))
        limits = "ulimit -Sd 2000000; ulimit -Sv 4000000; ulimit -Su 300; ulimit -Sc unlimited; ulimit -Sn 64"
        succeed(call(("bash", "-c"), f"{limits}; exec {' '.join(UNIONFS)} mount {layers} {place.merged}"))
        text = Path(f"/proc/{place.pid()}/limits").read_text()
        found = {line[:25].strip(): line[25:].split()[:2] for line in text.splitlines()}
        assert found["Max core file size"] == ["0", "0"]
        for name in ("Max data size", "Max address space", "Max file size", "Max cpu time"):
            assert found[name][0] == "unlimited", name
        assert found["Max open files"][0] == found["Max open files"][1]
        assert found["Max processes"][0] == found["Max processes"][1]
        succeed(unionfs("umount", place.merged))


def cpu_seconds(pid: int) -> float:
    """The processor time used by a process; proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_signals_of_users_do_not_reach_the_child_of_root(attacker: Worker) -> None:
    """A user may stop or end a child of root that runs as that user; root then continues."""
    from unionfs.sys.asuser import run_as

    def stop_myself() -> int:
        os.kill(os.getpid(), signal.SIGSTOP)
        return 0

    began = time.monotonic()
    assert run_as(ATTACKER, stop_myself) is None
    assert run_as(ATTACKER, lambda: time.sleep(60) or 0, seconds=0.3) is None
    assert run_as(ATTACKER, lambda: os.geteuid() % 256) == ATTACKER % 256
    assert run_as(ATTACKER, lambda: len(os.listdir("/proc/self/fd")) - 1) == 3
    assert time.monotonic() - began < 10
    assert subprocess.run(["true"], check=False).returncode == 0
