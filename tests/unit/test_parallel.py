"""What lets tests run side by side: enclosures, turns, and the place of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support import areas, enclosure, turns
from tests.support.patience import patient
from tests.support.worker import REPOSITORY
from unionfs.sys.process import children_of


@pytest.fixture
def command() -> list[str]:
    found = enclosure.command()
    if found == [sys.executable]:
        pytest.skip("no namespaces here, or not root")
    return found


def _python(script: str, *arguments: str | Path, start: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*start, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )


def _is_named(path: Path) -> bool:
    """Whether a process has this path in its command line."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(path) in entry.read_bytes():
                return True
        except OSError:
            continue
    return False


LEAVES = """
import os, subprocess, sys
from tests.support import syscalls
syscalls.mount("tmpfs", sys.argv[1], "tmpfs")
subprocess.Popen(["setsid", "sh", "-c", f"sleep 300; : {sys.argv[1]}"], stdout=subprocess.DEVNULL)
print(os.listdir("/run/unionfs"), flush=True)
"""


@pytest.mark.parametrize("how", ["it ends", "it is killed", "its starter is killed"])
def test_nothing_leaves_an_enclosure(command: list[str], area: Path, how: str) -> None:
    wait = "" if how == "it ends" else "import time; time.sleep(300)"
    with _python(LEAVES + wait, area, start=command) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "[]\n"
        assert areas.mounts_below(area) == []
        if how == "its starter is killed":
            process.kill()
        elif how == "it is killed":
            os.kill(_descendant(process.pid, 2), signal.SIGKILL)
        code = process.wait(patient(20))
    assert code == {"it ends": 0, "it is killed": 137}.get(how, -signal.SIGKILL)
    deadline = time.monotonic() + patient(5)
    while _is_named(area):
        assert time.monotonic() < deadline, "the process lives"
        time.sleep(0.01)


def _descendant(pid: int, depth: int) -> int:
    """The first child's first child, and so on."""
    for _ in range(depth):
        pid = children_of(pid)[0]
    return pid


def test_exit_codes_pass_through(command: list[str]) -> None:
    with _python("import sys; sys.exit(7)", start=command) as process:
        assert process.wait(patient(20)) == 7


def test_who_wants_to_be_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It waits for those that run, is waited for, and is not overtaken."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # this test has its turn in the run's own one
    events: list[str] = []
    running, may_end = threading.Event(), threading.Event()

    def beside(name: str) -> None:
        with turns.machine(alone=False):
            events.append(name)
            running.set()
            assert may_end.wait(patient(10))
            events.append(f"end of {name}")

    def alone() -> None:
        with turns.machine(alone=True):
            events.append("alone")

    first = threading.Thread(target=beside, args=["first"])
    first.start()
    assert running.wait(patient(10))
    threads = [first]
    for target, arguments in ((alone, []), (beside, ["second"])):
        threads.append(threading.Thread(target=target, args=arguments))
        threads[-1].start()
        time.sleep(0.1)  # in this order
    assert events == ["first"]
    may_end.set()
    for thread in threads:
        thread.join(patient(10))
    assert events == ["first", "end of first", "alone", "second", "end of second"]


PLACE = """
import subprocess, tempfile, time
from multiprocessing import util
from tests.support import areas
with areas.run_directory(), areas.area() as area:
    util.get_temp_dir()
    print(tempfile.gettempdir(), flush=True)
    time.sleep(300)
"""


@pytest.mark.parametrize("memory", [True, False])
def test_what_a_killed_run_leaves_goes_with_the_next_one(
    monkeypatch: pytest.MonkeyPatch, root: None, memory: bool
) -> None:
    if memory:
        monkeypatch.delenv("TMPDIR")
    with _python(PLACE, start=[sys.executable]) as process:
        assert process.stdout is not None
        place = Path(process.stdout.readline().rstrip("\n"))
        process.kill()
    home = place.parent if place.name == "fs" else place
    assert len(os.listdir(place)) >= 2
    monkeypatch.setattr("tempfile.tempdir", str(home.parent))
    areas.sweep()
    assert not home.exists()
