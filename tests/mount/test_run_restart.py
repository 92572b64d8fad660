"""`run --restart`: a detached container whose command is started again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.cli_calls import gone, refused, wait_for
from tests.mount.run_calls import Life, lives


@pytest.fixture
def box(root: None, area: Path, runtime: str) -> Iterator[Life]:
    with lives(Life, area, runtime) as found:
        yield found


def start(box: Life, policy: str, script: str, *options: str) -> None:
    words = ("-d", "--name", "web", "--restart", policy, "-l", box.base, *options, "--", "sh", "-c", script)
    assert box.ok("run", *words) == "web\n"


def runs(box: Life) -> int:
    return box.ok("logs", "web").count("run\n")


@pytest.mark.parametrize(
    ("policy", "code", "expected"),
    [("no", 3, 1), ("on-failure:2", 3, 3), ("on-failure:0", 3, 1), ("on-failure", 0, 1)],
)
def test_how_often(box: Life, policy: str, code: int, expected: int) -> None:
    start(box, policy, f"echo run; exit {code}")
    assert wait_for(lambda: box.state("web")["state"] == "exited")
    state = box.state("web")
    assert (state["code"], state["restart"], state["restarts"]) == (code, policy, expected - 1)
    assert runs(box) == expected
    assert box.is_over()


@pytest.mark.parametrize("policy", ["always", "unless-stopped", "on-failure"])
def test_until_it_is_stopped(box: Life, policy: str) -> None:
    """Its files stay, and its process keeps nothing of earlier runs."""
    start(box, policy, "echo run; echo line >> /root/lines; sleep 0.2; exit 4", "-v", "vol:/vol")
    pid = box.state("web")["pid"]
    assert wait_for(lambda: runs(box) >= 3)
    files = len(os.listdir(f"/proc/{pid}/fd"))
    assert wait_for(lambda: runs(box) >= 5)
    assert len(os.listdir(f"/proc/{pid}/fd")) <= files + 12  # it may be in another phase
    assert box.state("web")["pid"] == pid
    assert box.ok("stop", "web") == "web\n"
    assert gone(int(str(pid)))
    assert box.state("web")["state"] == "exited"
    lines = (box.root / "containers/web/upper/root/lines").read_text()
    assert lines == "line\n" * runs(box)
    assert box.is_over()


def test_between_two_runs(box: Life) -> None:
    start(box, "always", "echo run; exit 4")
    pid = box.state("web")["pid"]
    assert wait_for(lambda: int(str(box.state("web")["restarts"])) >= 7)  # a pause of 6.4 s
    assert wait_for(lambda: box.state("web")["state"] == "restarting")
    assert box.ok("ps", "--format", "{{.Status}}").startswith("Restarting (4)")
    assert box.ok("ps", "-q") == "web\n"
    refused(box.call("exec", "web", "true"), "web is restarting")
    refused(box.call("rm", "web"), "container web is running")
    assert box.ok("stop", "web") == "web\n"
    assert gone(int(str(pid)))
    assert box.state("web")["state"] == "exited"
    assert box.is_over()
    # Started again, it has no policy but that which is given.
    assert box.ok("run", "-d", "--name", "web", "--", "true") == "web\n"
    assert wait_for(lambda: box.state("web")["state"] == "exited")
    assert box.state("web")["restart"] == "no"


@pytest.mark.parametrize("how", [("stop",), ("kill",), ("kill", "-s", "TERM"), ("rm", "-f")])
def test_what_ends_it(box: Life, how: tuple[str, ...]) -> None:
    start(box, "always", "echo run; exec sleep 60")
    assert wait_for(lambda: runs(box) == 1)
    pid = int(str(box.state("web")["pid"]))
    assert box.ok(*how, "web") == "web\n"
    assert wait_for(lambda: gone(pid))
    assert box.is_over()
    if how[0] != "rm":
        assert runs(box) == 1
        assert box.state("web")["code"] == 128 + (signal.SIGKILL if how == ("kill",) else signal.SIGTERM)
    else:
        assert box.kept() == []


def test_another_signal_does_not(box: Life) -> None:
    start(box, "always", "trap 'exit 1' HUP; echo run; while :; do sleep 0.05; done")
    assert wait_for(lambda: runs(box) == 1)
    box.ok("kill", "-s", "HUP", "web")
    assert wait_for(lambda: runs(box) == 2)
    assert box.ok("exec", "web", "echo", "in the second") == "in the second\n"
    box.ok("kill", "web")
    assert box.is_over()


def test_bad_calls(box: Life) -> None:
    words = ("-l", box.base, "--", "true")
    refused(box.call("run", "--restart", "always", *words), "--restart always", "add -d")
    refused(box.call("run", "-d", "--rm", "--restart", "on-failure:3", *words), "on-failure:3", "--rm")
    for text in ("never", "always:3", "on-failure:x", "on-failure:", ""):
        refused(box.call("run", "-d", "--restart", text, *words), "--restart")
    assert box.kept() == []
