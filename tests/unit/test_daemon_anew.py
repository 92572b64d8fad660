"""What a daemon finds that mounts a union anew: the settings, the layers, and who holds them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.worker import REPOSITORY
from unionfs.core.state import State, StateError
from unionfs.daemon import anew, holder
from unionfs.daemon.identities import identities, refuse_others
from unionfs.daemon.live import LiveMount
from unionfs.daemon.settle import settle
from unionfs.errors import UserError
from unionfs.settings.parsing import parse_all
from unionfs.sys.process import pid_namespace, start_time


def _entry(**changes: Any) -> LiveMount:
    settings = settle("/m", lowers=["/l"], trusted_xattrs=True)
    settings = replace(settings, **{"read_only": False, "flags": ("dev", "noexec", "suid"), **changes})
    return LiveMount(
        settings, 7, 8, "0:9", 1.5, ((1, 2),), holder=(3, 4), guardian=(5, 6), directory="/run/x", namespace=1
    )


@pytest.mark.parametrize(
    ("restrictions", "flags", "read_only"),
    [
        ((), ("dev", "noexec", "suid"), False),
        (("nosuid",), ("dev", "noexec", "nosuid"), False),
        (("nodev", "nosuid", "noexec"), ("noexec", "nodev", "nosuid"), False),
        (("noexec",), ("dev", "noexec", "suid"), False),
        (("ro",), ("dev", "noexec", "suid"), True),
        (("ro", "nodev"), ("noexec", "suid", "nodev"), True),
    ],
)
def test_restrictions_of_a_remount_stay(
    restrictions: tuple[str, ...], flags: tuple[str, ...], read_only: bool
) -> None:
    found = anew._settings(_entry(), restrictions)
    assert (found.flags, found.read_only) == (flags, read_only)
    assert anew._settings(_entry(read_only=True), restrictions).read_only


def test_storage_is_neither_made_nor_filled_again() -> None:
    """The first daemon has done that."""
    storage = parse_all(["vol:/v", "/anonymous", "/etc:/e"], ["type=bind,src=/x,dst=/b"], ["/t"])
    found = anew._settings(_entry(storage=tuple(storage)), ())
    assert [spec.target for spec in found.storage] == [spec.target for spec in storage]
    names = ("anonymous", "copy", "create")
    given = {name for spec in storage for name in names if getattr(spec, name, False)}
    left = {name for spec in found.storage for name in names if getattr(spec, name, False)}
    assert (given, left) == (set(names), set())


def test_the_entry_while_nothing_is_mounted() -> None:
    """Of the holder, which can be ended by it."""
    with subprocess.Popen(["sleep", "60"]) as process:
        found = anew._waiting(_entry(), process.pid)
        started = start_time(process.pid)
        process.kill()
    assert (found.pid, found.started, found.waiting, found.device) == (process.pid, started, True, "")
    assert (found.claims, found.holder, found.guardian) == ((), None, None)
    assert (found.settings, found.since, found.directory) == (_entry().settings, 1.5, "/run/x")
    assert found.namespace == pid_namespace()


def _state(values: Any) -> Any:
    return SimpleNamespace(text=json.dumps(values).encode())


def test_what_a_dead_daemon_has_kept() -> None:
    """It says itself that its union is to be mounted anew; what cannot be read is an error."""
    values = {"anew": "why", "entry": _entry().to_json(), "directory": "/run/x", "layers": [["/l", 1, 2]]}
    found = anew.dead_daemon(_state(values))
    assert found is not None
    assert (found.why, found.layers) == ("why", [("/l", 1, 2)])
    assert found.entry == _entry()
    assert anew.dead_daemon(_state({"entry": 1})) is None
    for broken in ({"anew": "why"}, {**values, "layers": [["/l", 1]]}, {**values, "layers": 3}, 3):
        with pytest.raises(StateError, match="its text cannot be read"):
            anew.dead_daemon(_state(broken))
    with pytest.raises(StateError, match="its text cannot be read"):
        anew.dead_daemon(SimpleNamespace(text=b"{"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mount", "is_off", "taken", "cleared"),
    [
        (("fuse", "0:9", True), False, ["rw,nodev"], ["0:9", "0:9"]),
        (("fuse", "0:9", False), False, None, None),  # it is served
        (("fuse", "0:8", True), False, None, None),  # somebody else's, which is dead, too
        (("tmpfs", "0:9", True), False, None, None),
        (None, False, None, None),
        (None, True, [], ["0:9"]),  # further ones may be elsewhere
        (("tmpfs", "0:7", True), True, [], ["0:9"]),
        (("fuse", "0:7", True), True, [], ["0:9", "0:7"]),  # of a daemon that died as it mounted anew
        (("fuse", "0:7", False), True, None, None),
    ],
    ids=str,
)
def test_the_dead_mount_is_taken_off(
    monkeypatch: pytest.MonkeyPatch, mount: Any, is_off: bool, taken: list[str] | None, cleared: Any
) -> None:
    """Unless somebody else has done that, or another mount is there."""
    made: list[str] = []
    off: list[str] = []
    waited: list[tuple[float, ...]] = []
    found = mount and SimpleNamespace(is_fuse=mount[0] == "fuse", device=mount[1], all_options="rw,nodev")
    monkeypatch.setattr(anew, "mounted_at", lambda path: found if path == "/m" else None)
    monkeypatch.setattr(anew, "is_dead", lambda path: mount[2])
    monkeypatch.setattr(anew, "clear_dead_mounts", made.append)
    monkeypatch.setattr(anew, "wait_gone", lambda *values: waited.append(values))
    state: Any = SimpleNamespace(is_off=is_off, takes_off=off.append)
    assert anew._take_off(_entry(), state) is (taken is not None)
    assert (off, made) == (taken or [], cleared or [])
    assert waited == [(5, 6, 30)]
    anew._take_off(replace(_entry(), guardian=None), state)
    assert len(waited) == 1


@pytest.fixture
def layers(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / name for name in ("lower", "upper", "work", "merged")}
    for path in found.values():
        path.mkdir()
    return found


def test_the_layers_of_the_first_time(layers: dict[str, Path], tmp_path: Path) -> None:
    """Another directory is not taken for one, nor a way over a symlink; a FUSE filesystem may number anew."""
    settings = settle(
        str(layers["merged"]), lowers=[str(layers["lower"])], upper=str(layers["upper"]),
        work=str(layers["work"]), trusted_xattrs=True,
    )  # fmt: skip
    known = identities(settings)
    assert known == [
        (str(path), path.stat().st_dev, path.stat().st_ino)
        for name, path in layers.items()
        if name != "merged"
    ]
    mountpoint = settings.mountpoint
    refuse_others(known, mountpoint)
    refuse_others([(path, 0, 0) for path, *_ in known], mountpoint)
    path, device, inode = known[1]
    for other in ((path, device, inode + 1), (path, device + 1, inode)):
        with pytest.raises(UserError, match=f"layer {path} was replaced meanwhile; mount again"):
            refuse_others([known[0], other], mountpoint)
    layers["lower"].rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"layer {layers['lower']} cannot be opened: no such file"):
        refuse_others(known, mountpoint)
    layers["lower"].symlink_to("moved")
    with pytest.raises(UserError, match=f"layer {layers['lower']} cannot be opened"):
        refuse_others(known, mountpoint)
    layers["merged"].rmdir()
    with pytest.raises(UserError, match=f"mountpoint {mountpoint} cannot be opened"):
        refuse_others(known[1:], mountpoint)
    assert identities(replace(settings, lowers=(str(tmp_path / "moved"),), upper=None, work=None)) == [
        (str(tmp_path / "moved"), known[0][1], known[0][2])
    ]


def test_where_this_program_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a mount itself, or on one inside it."""
    found = holder._program()
    assert all(path.endswith("/") for path in found)
    assert os.path.dirname(os.path.realpath(os.__file__)) + "/" in found
    one = object.__new__(holder.Holder)
    one._program = {"/opt/python/bin/python3/", "/opt/python/bin/"}
    tops: list[str] = []
    monkeypatch.setattr(
        holder, "mounts_of_device", lambda device: [SimpleNamespace(mountpoint=path) for path in tops]
    )
    for mountpoint, lies in (
        ("/", True), ("/opt", True), ("/opt/python/bin", True), ("/opt/python/bin/python3", True),
        ("/op", False), ("/opt/python/bin/python", False), ("/usr", False),
    ):  # fmt: skip
        tops[:] = ["/elsewhere", mountpoint]
        assert one.lies_on("0:9") is lies, mountpoint
    tops[:] = []
    assert not one.lies_on("0:9")


def test_open_files_on_devices(tmp_path: Path) -> None:
    """Those of the standard files are left out."""
    (tmp_path / "f").touch()
    with (tmp_path / "f").open() as file, open("/dev/null") as other:
        device = os.fstat(file.fileno()).st_dev
        found = holder.open_on({device})
        assert file.fileno() in found
        assert other.fileno() not in found
        assert not found & {0, 1, 2}
        assert holder.open_on(set()) == set()


def test_open_files_on_devices_of_a_small_process() -> None:
    """Its first file after the standard ones counts, and these do not."""
    script = """
import os
from unionfs.daemon.holder import open_on
file = os.open("/dev/null", os.O_RDONLY)
for fd in range(4):
    os.dup2(file, fd)
print(sorted(open_on({os.fstat(file).st_dev})), file=open("/dev/fd/1000", "w"))
"""
    reader, writer = os.pipe()
    os.dup2(writer, 1000)
    try:
        subprocess.run([sys.executable, "-c", script], pass_fds=[1000], check=True, cwd=REPOSITORY)
    finally:
        os.close(writer)
        os.close(1000)
    with open(reader) as found:
        assert json.loads(found.read())[0] == 3


class RecordedState(State):
    """One that tells whether it has been ended."""

    has_ended = False

    def end(self) -> None:
        self.has_ended = True
        super().end()


@pytest.mark.parametrize("stays", [False, True])
def test_a_holder_without_a_mount(stays: bool) -> None:
    """It is not in charge. One that stays, the parent of this process, may try again."""
    state = RecordedState()
    one = holder.Holder(state, stays=stays)
    assert (one.pid, one.is_there, state.holder) == (0, False, 0)
    assert one.exchange() == "it has no holder"
    one.end()
    assert state.has_ended is not stays
    state.close()


def test_a_holder_that_stays() -> None:
    """It is in charge once there is a mount, and until that is ended on purpose."""
    state = RecordedState()
    one = holder.Holder(state, stays=True)
    assert one.start({"some": "value"}, -1) == ""
    assert (one.pid, one.is_there, state.holder) == (os.getppid(), True, os.getppid())
    assert json.loads(state.text) == {"some": "value"}
    one.end()
    assert state.has_ended
    state.close()


def test_a_holder_that_has_ended() -> None:
    """Nobody would start another daemon: the mount says so."""
    state = RecordedState()
    one = holder.Holder(state)
    assert one.start({}, -1) == "its holder ended"
    assert (one.pid, one.is_there, state.holder) == (0, False, 0)
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        one._pid = process.pid
        assert one.start({}, -1) == "its holder ended"
        assert (one.pid, state.holder) == (0, 0)
        process.returncode = 0  # it has been waited for
    state.close()


def test_the_holder_of_the_daemon_before() -> None:
    """It starts others until this one's is in charge; then it ends."""
    state = RecordedState()
    with subprocess.Popen(["sleep", "60"]) as former:
        one = holder.Holder(state, former.pid)
        assert one.is_there
        assert former.poll() is None
        one.take_charge(-1)
        assert former.wait() == -signal.SIGKILL
        assert one.is_there
    state.close()


def test_a_holder_that_is_forked_ends_with_the_mount() -> None:
    """It is killed and waited for, so that nobody else has the files open."""
    state = RecordedState()
    with subprocess.Popen(["sleep", "60"]) as process:
        one = holder.Holder(state)
        one._pid = process.pid
        assert one.start({}, -1) == ""
        assert (one.pid, state.holder) == (process.pid, process.pid)
        one.end()
        assert state.has_ended
        assert (one.pid, one.is_there) == (0, False)
        assert not os.path.exists(f"/proc/{process.pid}")
        process.returncode = -signal.SIGKILL  # it has been waited for
    state.close()
