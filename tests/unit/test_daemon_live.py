"""The registry of live mounts, processes, the control socket and the log, without a mount."""

from __future__ import annotations

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

from unionfs.daemon import answering, control, live, logs, runtime
from unionfs.daemon.claiming import Claim
from unionfs.daemon.settle import settle
from unionfs.errors import UserError
from unionfs.settings.mount import MountSettings
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
    from unionfs.sys.mountinfo import mounted_at

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
