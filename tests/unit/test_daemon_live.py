"""The registry of live mounts, processes, the control socket and the log, without a mount."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support import syscalls
from unionfs.daemon import answering, control, live, logs, runtime
from unionfs.daemon.claiming import Claim
from unionfs.daemon.settle import settle
from unionfs.errors import UserError
from unionfs.settings.mount import MountSettings
from unionfs.sys.mountinfo import mounted_at
from unionfs.sys.process import is_alive, start_time, wait_gone


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry for one test."""
    directory = tmp_path / "unionfs"
    monkeypatch.setattr(runtime, "candidates", lambda: [str(directory)])
    return directory


@pytest.fixture
def settings() -> MountSettings:
    # A mount that exists everywhere replaces the union.
    return settle("/proc", lowers=["/usr"], trusted_xattrs=True)


def _proc_device() -> str:
    entry = mounted_at("/proc")
    assert entry is not None
    return entry.device


def _announce(settings: MountSettings) -> live.LiveMount:
    with runtime.runtime_directory() as directory:
        return live.announce(settings, _proc_device(), directory.path, ((1, 2),))


def test_an_entry_comes_and_goes(registry: Path, settings: MountSettings) -> None:
    assert live.entries() == []
    entry = _announce(settings)
    assert stat.S_IMODE(registry.stat().st_mode) == 0o700
    assert live.live_mounts() == [entry]
    assert live.find_by_device(_proc_device()) == entry
    assert live.find_by_device("0:0") is None
    live.mark_ending(entry)
    assert live.live_mounts() == []
    assert [found.ending for found in live.entries()] == [True]
    entry.remove()
    assert os.listdir(registry) == []


def test_entries_of_dead_daemons_are_removed(registry: Path, settings: MountSettings) -> None:
    entry = _announce(settings)
    dead = replace(entry, started=entry.started + 1)
    dead = replace(dead, settings=replace(settings, mountpoint="/nowhere"))
    dead.save()
    (registry / f"{dead.name}.sock").touch()
    assert live.abandoned() == [dead]
    assert live.entries() == [entry]
    assert sorted(os.listdir(registry)) == [f"{entry.name}.json"]


@pytest.mark.parametrize("free", [0, 1])
def test_what_cannot_be_read_is_not_missing(registry: Path, settings: MountSettings, free: int) -> None:
    """Neither the directory (no fd is free) nor an entry (one is): what is in use would count as unused."""
    entry = _announce(settings)
    (registry / "1-1.json").touch()  # damaged
    taken: list[int] = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open("/", os.O_RDONLY))
        for _ in range(free):
            os.close(taken.pop())
        with pytest.raises(UserError, match="too many open files"):
            live.entries()
        with pytest.raises(UserError, match="too many open files"):
            live.remaining()
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert live.entries() == [entry]
    assert not (registry / "1-1.json").exists()


@pytest.fixture
def ended() -> str:
    """The name of a daemon that has ended."""
    process = subprocess.Popen(["sleep", "30"])
    name = live.entry_name(process.pid, start_time(process.pid))
    process.kill()
    process.wait()
    return name


def test_remains_of_daemons_killed_before_they_had_an_entry(
    registry: Path, settings: MountSettings, ended: str
) -> None:
    entry = _announce(settings)
    (registry / f"{entry.name}.sock").touch()
    kept = {f"{entry.name}.json", f"{entry.name}.sock", "unionfs.log", f"{ended}.log", "x-1.sock"}
    with subprocess.Popen(["sleep", "30"]) as starting:  # it has a socket, and no entry yet
        name = live.entry_name(starting.pid, start_time(starting.pid))
        kept |= {f"{name}.sock", f"{name}.json.new"}
        for name in (*kept, f"{ended}.sock", f"{ended}.json.new"):
            (registry / name).touch()
        entry.save()
        assert live.entries() == [entry]
        assert set(os.listdir(registry)) == kept
        starting.kill()


def test_claims_of_killed_processes(registry: Path) -> None:
    with runtime.runtime_directory() as directory:
        held = Claim("/held", directory)
        ready, hang = "print(flush=True)", "import time; time.sleep(30)"
        script = (
            "import sys; from unionfs.daemon import claiming, runtime; "
            f"claim = claiming.Claim('/killed', runtime.RuntimeDirectory(sys.argv[1])); {ready}; {hang}"
        )
        with subprocess.Popen([sys.executable, "-c", script, registry], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert len(os.listdir(registry)) == 2
            assert live.entries() == []
            assert len(os.listdir(registry)) == 2
            process.kill()
            process.wait()
        assert live.entries() == []
        (left,) = os.listdir(registry)
        held.release()
        assert os.listdir(registry) == []
        Claim("/held", directory).release()
    assert left.startswith("mounting-")


def test_a_claim_waits_for_another_process_that_clears_them(registry: Path) -> None:
    """Which locks each for an instant."""
    with runtime.runtime_directory() as directory:
        held = Claim("/here", directory)
        with pytest.raises(UserError, match="just mounting"):
            Claim("/here", directory)
        threading.Timer(0.03, held.release).start()
        Claim("/here", directory).release()


def test_a_claim_of_what_is_mounted_by_now(root: None, registry: Path, area: Path) -> None:
    """Since the check, somebody has mounted there; only the dead mount that is to go may be there."""
    with runtime.runtime_directory() as directory, open("/dev/fuse", "r+b", buffering=0) as device:
        data = f"fd={device.fileno()},rootmode=40000,user_id=0,group_id=0"
        syscalls.mount("src", area, "fuse.x", 0, data)
        try:
            with pytest.raises(UserError, match=f"{area} is busy: a fuse.x mount of src has just been made"):
                Claim(str(area), directory)
            assert directory.names() == []
            Claim(str(area), directory, dead=mounted_at(str(area))).release()
            with pytest.raises(UserError, match="has just been made there"):
                Claim(str(area), directory, dead=mounted_at("/proc"))
        finally:
            syscalls.umount(area, syscalls.MNT_DETACH)
        syscalls.mount("t", area, "tmpfs", 0, "size=64k")  # that may be covered
        try:
            Claim(str(area), directory).release()
        finally:
            syscalls.umount(area)
        assert directory.names() == []


def test_a_claim_without_room(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk prevents no mount; only one at a time is the weaker promise."""
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with runtime.runtime_directory() as directory:
        fds = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(runtime.RuntimeDirectory, "open", full)
        claim = Claim("/here", directory)
        claim.release()
        claim.release()
        assert len(os.listdir("/proc/self/fd")) == fds


def test_a_claim_is_given_up_once(registry: Path) -> None:
    """Another process may have the next one by then."""
    with runtime.runtime_directory() as directory:
        fds = len(os.listdir("/proc/self/fd"))
        first = Claim("/here", directory)
        first.release()
        second = Claim("/here", directory)
        first.release()
        with pytest.raises(UserError, match="just mounting"):
            Claim("/here", directory)
        other = Claim("/other", directory)
        other.release()
        second.release()
        assert directory.names() == []
        assert len(os.listdir("/proc/self/fd")) == fds


def test_entry_of_a_dead_mount_that_remains_is_kept(registry: Path, settings: MountSettings) -> None:
    entry = _announce(settings)
    entry.remove()
    replace(entry, started=1).save()
    assert [found.started for found in live.entries()] == [1]
    assert live.live_mounts() == []


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"settings": {}}', '"x"', "null", "\xff", '{"pid": "a"}']
)
def test_files_that_are_no_entries(registry: Path, settings: MountSettings, content: str) -> None:
    runtime.runtime_directory()
    for name in ("1-2.json", "name.json", "1-.json", "-2.json"):
        (registry / name).write_text(content, encoding="latin-1")
    (registry / "other").touch()
    assert live.entries() == []
    assert os.listdir(registry) == ["other"]


def test_a_directory_that_others_may_write_is_not_trusted(registry: Path, settings: MountSettings) -> None:
    registry.mkdir()
    registry.chmod(0o777)
    with pytest.raises(UserError, match="runtime files"):
        runtime.runtime_directory()
    registry.chmod(0o700)
    assert runtime.runtime_directory().path == str(registry)


def test_a_symlink_is_not_trusted(registry: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    registry.symlink_to("real")
    with pytest.raises(UserError, match="runtime files"):
        runtime.runtime_directory()


def test_where_the_registry_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert runtime.candidates() == ["/run/user/1000/unionfs", "/tmp/unionfs-1000"]
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert runtime.candidates() == ["/tmp/unionfs-1000"]
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime.candidates() == ["/tmp/unionfs-1000"]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(runtime, "is_host_root", lambda: True)
    assert runtime.candidates()[0] == "/run/unionfs"


def test_start_time_names_one_process() -> None:
    with subprocess.Popen(["sleep", "30"]) as process:
        started = start_time(process.pid)
        assert started is not None
        assert is_alive(process.pid, started)
        assert not is_alive(process.pid, started + 1)
        assert wait_gone(process.pid, started + 1, 0)
        assert not wait_gone(process.pid, started, 0.01)
        process.send_signal(signal.SIGKILL)
        # Not reaped yet: a zombie counts as gone.
        assert wait_gone(process.pid, started, 5)
        assert start_time(process.pid) is None
    assert start_time(2**22 + 1) is None


def test_command_names_do_not_confuse(tmp_path: Path) -> None:
    program = tmp_path / ") R 1 (x"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "30"]) as process:
        started = start_time(process.pid)
        process.kill()
    mine = start_time(os.getpid())
    assert started is not None
    assert mine is not None
    assert started >= mine


async def test_control_answers_everyone(area: Path) -> None:
    directory = area / ("long" * 40)
    directory.mkdir()
    path = runtime.RuntimeDirectory(str(directory)).address("1.sock")
    answers: Iterator[dict[str, Any]] = iter([{"figures": {"x": 1}}, {"figures": {"big": "x" * 300_000}}])

    async def answer(question: dict[str, Any]) -> dict[str, Any]:
        return next(answers)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answering.serve_control, [answering.listen(path)], answer)
        first: Any = await trio.to_thread.run_sync(control.ask, path)
        second: Any = await trio.to_thread.run_sync(control.ask, path)
        # A failing answer ends the question, not the daemon.
        third: Any = await trio.to_thread.run_sync(control.ask, path)
        nursery.cancel_scope.cancel()
    assert first == {"figures": {"x": 1}}
    assert len(second["figures"]["big"]) == 300_000
    assert third is None


def test_ask_does_not_wait_for_ever(area: Path) -> None:
    path = str(area / "s.sock")
    assert control.ask(path) is None
    with answering.listen(path):
        began = time.monotonic()
        assert control.ask(path, 0.2) is None
        assert time.monotonic() - began < 2


def test_ask_a_daemon_that_talks_slowly(area: Path) -> None:
    path = str(area / "s.sock")
    listener = answering.listen(path)

    def talk() -> None:
        connection, _ = listener.accept()
        try:
            while True:
                connection.sendall(b" ")
                time.sleep(0.02)
        except OSError:
            connection.close()

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    began = time.monotonic()
    assert control.ask(path, 0.3) is None
    assert time.monotonic() - began < 2
    thread.join(5)
    listener.close()


def test_log_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_SYSLOG", str(tmp_path / "none"))
    root = logging.getLogger()
    before, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    umask = os.umask(0)
    directory = runtime.RuntimeDirectory(str(tmp_path))
    try:
        logs.to_host("warning", directory, "/a 100% b\udcff")
        file = Path(logs.log_file(str(tmp_path)))
        assert not file.exists()
        logging.getLogger("x").info("not this")
        logging.getLogger("x").error("but this")
        logging.getLogger("pyfuse3").error("fuse_reply_err failed with No such file or directory")
        root.handlers[0].close()
        (line,) = file.read_text().splitlines()
        assert f"unionfs[{os.getpid()}] /a 100% b\\udcff: ERROR but this" in line
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        with file.open("ab") as grown:
            grown.truncate(2 << 20)
        logs.to_host("warning", directory, "/m")
        assert not file.exists()
        assert (tmp_path / "unionfs.log.1").exists()
    finally:
        os.umask(umask)
        root.handlers[:] = before
        root.setLevel(level)
        logging.raiseExceptions = raising


def test_log_to_syslog(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = area / "log"
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(str(path))
    receiver.settimeout(5)
    monkeypatch.setattr(logs, "_SYSLOG", str(path))
    root = logging.getLogger()
    before, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    try:
        assert logs.log_place(str(area)) == "syslog"
        logs.to_host("info", runtime.RuntimeDirectory(str(area)), "/m")
        logging.getLogger("x").info("hello")
        assert f"unionfs[{os.getpid()}]: /m: INFO hello".encode() in receiver.recv(4096)
        root.handlers[0].close()
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        logging.raiseExceptions = raising
        receiver.close()


def test_entry_is_plain_json(registry: Path, settings: MountSettings) -> None:
    entry = _announce(replace(settings, mountpoint="/m\udcff"))
    values = json.loads((registry / f"{entry.name}.json").read_text(encoding="ascii"))
    assert values["settings"]["mountpoint"] == "/m\udcff"
    assert values["pid"] == os.getpid()


def test_an_entry_of_a_former_version(settings: MountSettings) -> None:
    """It has no holder, no guardian and no namespace; what there is comes back."""
    entry = live.LiveMount(
        settings, 5, 6, "0:7", 8.5, ((1, 2), (3, 4)), ending=True, holder=(9, 10), guardian=(11, 12),
        waiting=True, directory="/d", namespace=13,
    )  # fmt: skip
    values = json.loads(json.dumps(entry.to_json()))
    assert live.LiveMount.from_json(values, "/d") == entry
    for name in ("holder", "guardian", "waiting", "namespace"):
        del values[name]
    former = live.LiveMount.from_json(values)
    assert (former.holder, former.guardian, former.waiting, former.directory) == (None, None, False, "")
    assert former.namespace == os.stat("/proc/self/ns/pid").st_ino


@pytest.fixture
def other() -> Iterator[tuple[int, int]]:
    """Pid and start time of another process."""
    with subprocess.Popen(["sleep", "60"]) as process:
        started = start_time(process.pid)
        assert started is not None
        yield process.pid, started
        process.kill()


def test_a_mount_with_only_a_holder(settings: MountSettings, other: tuple[int, int]) -> None:
    """Its daemon is dead, but not its holder."""
    mine = (os.getpid(), start_time(os.getpid()) or 0)
    dead = (mine[0], mine[1] + 1)

    def has_only_holder(daemon: tuple[int, int], holder: tuple[int, int] | None) -> bool:
        return live.LiveMount(settings, *daemon, "0:0", 1.0, (), holder=holder).has_only_holder()

    assert has_only_holder(dead, other)
    assert not has_only_holder(mine, other)
    assert not has_only_holder(dead, None)
    assert not has_only_holder(dead, dead)


def test_daemons_of_other_pid_namespaces(registry: Path, settings: MountSettings) -> None:
    """An entry of one that listens stays, and is nobody's here; one that does not is stale."""
    entry = replace(_announce(settings), namespace=1, pid=2**22 + 1)
    _announce(settings).remove()
    entry.save()
    assert not entry.is_elsewhere()
    assert not _announce(settings).is_elsewhere()
    _announce(settings).remove()
    with runtime.RuntimeDirectory(str(registry)) as directory:
        listener = answering.listen(directory.address(f"{entry.name}.sock"))
    with listener:
        assert entry.is_elsewhere()
        assert live.entries() == live.remaining() == live.abandoned() == []
        assert sorted(os.listdir(registry)) == [f"{entry.name}.json", f"{entry.name}.sock"]
    replace(entry, settings=replace(settings, mountpoint="/nowhere")).save()
    assert live.entries() == []
    assert os.listdir(registry) == []


def test_which_mounts_are_live(registry: Path, settings: MountSettings, other: tuple[int, int]) -> None:
    """The oldest first, not those that are ending, dead, unmounted or still to be mounted."""
    entry = _announce(settings)
    older = replace(entry, pid=other[0], started=other[1], since=entry.since - 5)
    older.save()
    assert live.live_mounts() == [older, entry]
    assert live.waiting_mounts() == []
    for change in ({"ending": True}, {"device": "0:0"}, {"waiting": True, "device": ""}):
        replace(older, **change).save()  # type: ignore[arg-type]
        assert live.live_mounts() == [entry]
    waiting = live.waiting_mounts()
    assert [one.pid for one in waiting] == [other[0]]
    assert live.waiting_at("/proc") == waiting
    assert live.waiting_at("/other") == []
    replace(entry, waiting=True).save()
    assert [one.pid for one in live.waiting_mounts()] == [other[0], entry.pid]


def test_the_entry_of_a_device(settings: MountSettings, other: tuple[int, int]) -> None:
    """The entry with a live daemon is found, since the kernel reuses device numbers."""
    dead = live.LiveMount(settings, *other, "0:9", 1.0, ())
    dead = replace(dead, started=dead.started + 1)
    alive = live.LiveMount(settings, *other, "0:9", 2.0, ())
    for known in ([dead, alive], [alive, dead]):
        assert live.find_by_device("0:9", known) is alive
        assert live.find_by_device("0:8", known) is None
    assert live.find_by_device("0:9", [dead]) is dead


class TestEnds:
    """`has_ended_soon`: what waits for a daemon that is about to end."""

    @pytest.fixture(autouse=True)
    def _moment(self, registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        runtime.runtime_directory().close()
        monkeypatch.setattr(live, "_NOTICE_SECONDS", 0.3)

    def entry(self, settings: MountSettings, registry: Path, **more: Any) -> live.LiveMount:
        """Of a process that lives on."""
        self.process = subprocess.Popen(["sleep", "60"])
        self.processes.append(self.process)
        started = start_time(self.process.pid)
        assert started is not None
        values = {"device": _proc_device(), "since": 1.0, "claims": (), "directory": str(registry), **more}
        entry = live.LiveMount(settings, self.process.pid, started, **values)
        entry.save()
        return entry

    @pytest.fixture(autouse=True)
    def _end(self) -> Iterator[None]:
        self.processes: list[subprocess.Popen[bytes]] = []
        yield
        for process in self.processes:
            process.kill()
            process.wait()

    def later(self, seconds: float = 0.1) -> None:
        threading.Timer(seconds, self.process.kill).start()

    def test_a_mount_that_is_there(self, registry: Path, settings: MountSettings) -> None:
        """It is not waited for: its daemon, which does not answer, was not told to end."""
        assert not live.has_ended_soon(self.entry(settings, registry))
        entry = self.entry(settings, registry)
        self.process.kill()
        self.process.wait()
        assert live.has_ended_soon(entry)

    def test_a_mount_that_is_gone(
        self, registry: Path, settings: MountSettings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It looks some times whether the daemon has ended, or is ending."""
        looks: list[float] = []

        def wait(pid: int, started: int, seconds: float) -> bool:
            looks.append(seconds)
            return wait_gone(pid, started, seconds)

        entry = self.entry(settings, registry, device="0:0")
        self.later()
        assert live.has_ended_soon(entry)
        monkeypatch.setattr(live, "wait_gone", wait)
        assert not live.has_ended_soon(self.entry(settings, registry, device="0:0"))
        assert len(looks) > 6
        assert max(looks) < 0.1

    def test_one_that_writes_its_upper(self, registry: Path, settings: MountSettings) -> None:
        """However long: it has entered that it is ending."""
        entry = self.entry(settings, registry, device="0:0", ending=True)
        self.later(1.0)
        assert live.has_ended_soon(replace(entry, ending=False))
        entry = self.entry(settings, registry, ending=True)
        self.later(1.0)
        assert live.has_ended_soon(entry)

    def test_one_without_an_entry(self, registry: Path, settings: MountSettings) -> None:
        """It has removed that as the last thing."""
        entry = self.entry(settings, registry, device="0:0")
        entry.remove()
        self.later(1.0)
        assert live.has_ended_soon(entry)

    @pytest.mark.parametrize("is_ending", [True, False, 1])
    def test_one_that_was_told_to_end(
        self, registry: Path, settings: MountSettings, is_ending: object
    ) -> None:
        """While it unmounts it answers."""
        entry = self.entry(settings, registry)
        with runtime.RuntimeDirectory(str(registry)) as directory:
            listener = answering.listen(directory.address(f"{entry.name}.sock"))

        def speak() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(4096)
                    connection.sendall(json.dumps({live.ENDING: is_ending}).encode())

        threading.Thread(target=speak, daemon=True).start()
        with listener:
            self.later(1.0)
            assert live.has_ended_soon(entry) == (is_ending is True)
            listener.shutdown(socket.SHUT_RDWR)

    def test_one_that_waits_for_its_mount(self, registry: Path, settings: MountSettings) -> None:
        """Its holder may have others try for long."""
        entry = self.entry(settings, registry, device="", waiting=True)
        assert not live.has_ended_soon(entry)
        self.process.kill()
        self.process.wait()
        assert live.has_ended_soon(entry)


class TestRuntimeFiles:
    """What another user, or a mistake, has put there is neither followed nor read."""

    @pytest.fixture
    def directory(self, registry: Path) -> Iterator[runtime.RuntimeDirectory]:
        with runtime.runtime_directory() as found:
            yield found

    def test_written_and_read(self, registry: Path, directory: runtime.RuntimeDirectory) -> None:
        """Whole, by a new file; readable by its owner alone, whatever the umask."""
        before = os.umask(0)
        try:
            directory.write("f", b"first")
        finally:
            os.umask(before)
        with (registry / "f").open("rb") as former:
            directory.write("f", b"2nd")
            assert former.read() == b"first"
        assert directory.read("f") == b"2nd"
        assert stat.S_IMODE((registry / "f").stat().st_mode) == 0o600
        (registry / "g.new").write_bytes(b"half written by one that was killed")
        directory.write("g", b"x")
        assert directory.read("g") == b"x"
        assert directory.names() == ["f", "g"]
        directory.remove("none", "g", "f")
        assert directory.names() == []

    def test_what_is_no_file_of_ours(
        self, root: None, registry: Path, directory: runtime.RuntimeDirectory
    ) -> None:
        fds = len(os.listdir("/proc/self/fd"))
        os.mkfifo(registry / "fifo")
        (registry / "directory").mkdir()
        (registry / "link").symlink_to("file")
        for name in ("file", "theirs"):
            (registry / name).write_bytes(b"x")
        os.chown(registry / "theirs", 1001, 1001)
        for name in ("fifo", "directory", "link", "theirs", "none"):
            with pytest.raises(OSError, match="Errno"):
                directory.read(name)
        assert directory.read("file") == b"x"
        assert len(os.listdir("/proc/self/fd")) == fds

    def test_the_largest(self, registry: Path, directory: runtime.RuntimeDirectory) -> None:
        (registry / "f").write_bytes(bytes(4 << 20))
        assert len(directory.read("f")) == 4 << 20
        with (registry / "f").open("ab") as file:
            file.write(b"x")
        with pytest.raises(ValueError, match="is larger than 4194304 bytes"):
            directory.read("f")

    @pytest.mark.parametrize(
        ("mode", "is_fine"), [(0o700, True), (0o755, True), (0o720, False), (0o702, False)]
    )
    def test_who_may_write_it(self, registry: Path, mode: int, is_fine: bool) -> None:
        registry.mkdir()
        registry.chmod(mode)
        fds = len(os.listdir("/proc/self/fd"))
        if is_fine:
            with runtime.runtime_directory() as found:
                assert stat.S_IMODE(registry.stat().st_mode) == 0o700
            found.close()
            assert [one.path for one in runtime.runtime_directories()] == [str(registry)]
        else:
            with pytest.raises(UserError, match="runtime files"):
                runtime.runtime_directory()
            with pytest.raises(PermissionError):
                runtime.RuntimeDirectory(str(registry))
            assert runtime.runtime_directories() == []
            assert len(os.listdir("/proc/self/fd")) == fds

    def test_another_user_s(self, root: None, registry: Path) -> None:
        registry.mkdir(mode=0o700)
        os.chown(registry, 1001, 1001)
        with pytest.raises(PermissionError):
            runtime.RuntimeDirectory(str(registry))

    def test_it_is_closed_once(self, registry: Path, directory: runtime.RuntimeDirectory) -> None:
        """A number may be another file's afterwards."""
        fd = directory.fd
        directory.close()
        other = os.open("/dev/null", os.O_RDONLY)
        if other != fd:
            os.dup2(other, fd)
            os.close(other)
        directory.close()
        os.fstat(fd)
        os.close(fd)

    def test_the_next_one_is_taken(
        self, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If the preferred one cannot be had; the host's own is the only one of root."""
        registry.touch()
        second = str(tmp_path / "second")
        monkeypatch.setattr(runtime, "candidates", lambda: [str(registry), second])
        with runtime.runtime_directory() as found:
            assert found.path == second
        registry.unlink()
        registry.mkdir(mode=0o777)
        registry.chmod(0o777)
        with runtime.runtime_directory() as found:
            assert found.path == second
        monkeypatch.setattr(runtime, "_SYSTEM", str(registry))
        with pytest.raises(UserError, match=f"chown root {registry} && chmod 700 {registry}"):
            runtime.runtime_directory()
        with pytest.raises(UserError, match="cannot be used for runtime files"):
            runtime.runtime_directories()


def test_the_registry_in_a_user_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of uid 0 there, which is another one outside; that may be 0 of a namespace that is nested itself."""
    namespace = os.stat("/proc/self/ns/user").st_ino
    monkeypatch.setattr(runtime, "is_host_root", lambda: False)
    monkeypatch.setattr(runtime, "in_initial_user_namespace", lambda: False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    monkeypatch.setattr(runtime, "uid_outside", lambda uid: 1000)
    last = f"/tmp/unionfs-1000-userns-{namespace}"
    assert runtime.candidates() == ["/tmp/unionfs-1000", last]
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/run/user/1000")
    assert runtime.candidates() == ["/run/user/1000/unionfs", "/tmp/unionfs-1000", last]
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert runtime.candidates() == ["/run/user/1000/unionfs", "/tmp/unionfs-1000", last]
    monkeypatch.setattr(runtime, "uid_outside", lambda uid: 0)
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime.candidates() == [f"/tmp/unionfs-0-userns-{namespace}"]


def test_priorities_of_the_journal() -> None:
    """As syslog(3) has them."""
    levels = (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)
    assert [logs.priority(level) for level in levels] == [2, 3, 4, 6, 7]
    assert [logs.priority(level + 1) for level in levels] == [2, 3, 4, 6, 7]


def test_the_place_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `inspect` shows it; and after `close` nothing is logged anywhere."""
    monkeypatch.setattr(logs, "_SYSLOG", str(tmp_path / "none"))
    root = logging.getLogger()
    before, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    root.handlers[:] = []
    try:
        with runtime.RuntimeDirectory(str(tmp_path)) as directory:
            logs.to_host("warning", directory, "/m")
            assert logs.current_place() == str(tmp_path / "unionfs.log") == logs.log_place(str(tmp_path))
            logging.getLogger("x").error("kept open")
            fds = len(os.listdir("/proc/self/fd"))
            logs.close()
            assert root.handlers == []
            assert len(os.listdir("/proc/self/fd")) == fds - 1
            with (tmp_path / "stream").open("w") as stream:
                logs.to_stream("info", stream)
                assert logs.current_place() == "stderr"
                assert root.level == logging.INFO
            logs.close()
            assert logs.current_place() == "syslog"
            (tmp_path / "unionfs.log").write_bytes(bytes(1 << 20))
            logs.to_host("error", directory, "/m")
            assert not (tmp_path / "unionfs.log.1").exists()
            with (tmp_path / "unionfs.log").open("ab") as file:
                file.write(b"x")
            logs.to_host("error", directory, "/m")
            assert (tmp_path / "unionfs.log.1").exists()
            assert len(root.handlers) == 1  # each line is written once
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        logging.raiseExceptions = raising
