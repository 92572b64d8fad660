"""Commands over layers whose server does not answer from the beginning: they say so, wait, and can be
interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.mount.cli_calls import UNIONFS, gone, succeed, unionfs, wait_for
from tests.mount.hung_calls import Server, prepare
from tests.support.mounting import is_mounted
from tests.support.patience import patient
from unionfs.daemon import live


class Area:
    """Layers, of which a server shows one that does not answer."""

    def __init__(self, root: Path) -> None:
        prepare(root)
        self.root, self.top = root, root / "merged"
        self.top.mkdir()
        self.server = Server(root / "source", root / "served")
        self.server.stop()
        self.layers = ("-l", root / "served", "-l", root / "lower", "-u", root / "upper", "-w", root / "work")

    def words(self, command: str) -> Sequence[str | Path]:
        served = self.root / "served"
        return {
            "mount": (*self.layers, self.top),
            "linked": ("-l", self.root / "link", "-l", self.root / "lower", self.top),
            "check": self.layers,
            "diff": self.layers[:-2],
            "convert": ("-u", served, "--to", "oci"),
        }[command]

    def begin(self, command: str, resident: str = "") -> subprocess.Popen[str]:
        """Start a command, and wait until it says that the layer does not answer."""
        (self.root / "link").symlink_to("served")
        environment = {**os.environ, **({"UNIONFS_RESIDENT_SECONDS": resident} if resident else {})}
        name = "mount" if command == "linked" else command
        process = subprocess.Popen(
            [*UNIONFS, name, *map(str, self.words(command))], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        assert process.stderr is not None
        role = "upper" if command == "convert" else "lower"
        path = self.root / ("link" if command == "linked" else "served")
        said = process.stderr.readline()
        assert said == f"unionfs: the {role} {path} has not answered for 5 seconds; waiting for it\n"
        return process

    def users(self) -> list[int]:
        """The processes that have this directory in their command lines, but for the server."""
        found = []
        for entry in os.listdir("/proc"):
            try:
                line = Path(f"/proc/{entry}/cmdline").read_bytes() if entry.isdecimal() else b""
            except OSError:
                continue
            if os.fsencode(self.root) in line and int(entry) not in (self.server.process.pid, os.getpid()):
                found.append(int(entry))
        return found


@pytest.fixture
def silent(root: None, area: Path) -> Iterator[Area]:
    here = Area(area)
    try:
        yield here
    finally:
        here.server.go_on()
        if is_mounted(here.top):
            unionfs("umount", "--lazy", here.top)
        here.server.end()


COMMANDS = ["mount", "linked", "check", "diff", "convert"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("resident", ["0", ""], ids=["alone", "resident"])
def test_a_mount_is_interrupted(silent: Area, resident: str, number: signal.Signals) -> None:
    """Nothing of it is left."""
    process = silent.begin("mount", resident)
    process.send_signal(number)
    process.communicate(timeout=patient(20))
    assert process.returncode != 0
    assert wait_for(lambda: silent.users() == []), silent.users()
    assert not is_mounted(silent.top)
    assert [one for one in live.entries() if one.settings.mountpoint == str(silent.top)] == []
    assert os.listdir(silent.root / "work") == []
    silent.server.go_on()
    succeed(unionfs("mount", *silent.layers, silent.top))
    assert (silent.top / "both/mine").read_text() == "of the upper"


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_others_are_interrupted(silent: Area, command: str) -> None:
    process = silent.begin(command)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=patient(20))
    assert process.returncode != 0
    assert wait_for(lambda: gone(process.pid))
    assert wait_for(lambda: silent.users() == [])


@pytest.mark.parametrize("command", COMMANDS)
def test_they_go_on(silent: Area, command: str) -> None:
    """When the layer answers, they do what they do over one that answered at once."""
    process = silent.begin(command)
    silent.server.go_on()
    said = process.communicate(timeout=patient(30))
    if command == "convert":  # what is served cannot be written
        assert process.returncode == 1
        assert "served" in said[1]
        return
    assert process.returncode == 0, said
    if command == "diff":
        natively = unionfs("diff", "-l", silent.root / "source", *silent.layers[2:-2])
        assert said[0] == succeed(natively)
    if command == "mount":
        assert sorted(os.listdir(silent.top / "both")) == ["mine", "other", "slow"]


def test_a_layer_that_answers_is_not_told(silent: Area) -> None:
    silent.server.go_on()
    done = unionfs("mount", *silent.layers, silent.top)
    assert (done.returncode, done.stderr) == (0, "")
