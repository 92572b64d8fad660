"""Faults in commands: mounting, unmounting, volumes and their backups.

After each: the command succeeded and there is the new state, or it failed with one sentence that has the
error, and there is the old one. Nothing is left: no mount, no daemon, no temporary file. The same command
then succeeds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.faults.batch import ERRORS, Report
from tests.faults.injecting import KILL, Fault, Injector
from tests.faults.plan import ALL, Selection
from tests.support import areas, mounting, syscalls
from tests.support.patience import patient
from tests.support.prepared import PreparedProcess
from tests.support.worker import REPOSITORY
from unionfs.sys.process import is_stopped

_NO_POINTS: Final = (
    "/usr", "/lib", "/proc", "/sys", "/dev", "/etc", sys.prefix, sys.base_prefix, str(REPOSITORY),
)  # fmt: skip
_SECONDS: Final = patient(30)
_DONE: Final = re.compile("is in place, but|is removed, but")
"""What a command says that fails after its change."""


@dataclass
class Outcome:
    """How a command ended; ``text`` is what it printed."""

    code: int
    text: str


@dataclass(frozen=True)
class Scenario:
    """A command on a place that is made for each fault. ``state``: what a user sees, None if nothing."""

    name: str
    prepare: Callable[[Path], object]
    arguments: Callable[[Path], Sequence[str]]
    state: Callable[[Path], Any]
    #: The command that removes what one has left that was killed or could not, unless the same one does.
    sweeps: Callable[[Path], Sequence[str]] | None = None
    #: Whether a killed one may leave a state (the first argument) on the way to the new one.
    halfway: Callable[[Any, Any], bool] = lambda state, new: False

    def __str__(self) -> str:
        return self.name


# -- running ---------------------------------------------------------------------------------------------


def run(
    place: Path, arguments: Sequence[str], fault: Fault | None = None, *, modules: Sequence[str] = ()
) -> tuple[Outcome, list[str]]:
    """Run ``unionfs ARGUMENT...``; returns also its points. ``modules``: imported before that, since a traced
    process imports slowly."""
    log = place / "output"
    log.unlink(missing_ok=True)
    os.environ["UNIONFS_ROOT"] = str(place / "storage")
    process = PreparedProcess(arguments, log, REPOSITORY, stopped=True, modules=modules)
    points: list[str] = []
    try:
        while not is_stopped(process.pid):
            time.sleep(0.001)
        if fault is None:
            os.kill(process.pid, signal.SIGCONT)
            return Outcome(process.wait(_SECONDS), log.read_text()), points
        skips = partial(_skips, str(place))
        injector = Injector(process.pid, children=True, skips=skips)
        injector.arm(fault)  # before the process is traced, which lets it go on
        with injector:
            os.kill(process.pid, signal.SIGCONT)
            code = process.wait(_SECONDS)
            points = injector.disarm()
        return Outcome(code, log.read_text()), points
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait(5)


def _skips(place: str, path: str) -> bool:
    """Also what lies above the place, and is opened on each way to the storage root, and what was printed."""
    if path.startswith(_NO_POINTS) or path == f"{place}/output":
        return True
    return place.startswith(f"/{path.strip('/')}/".replace("//", "/"))


# -- mounts ----------------------------------------------------------------------------------------------


def _layers(place: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (place / name).mkdir()
    (place / "lower/f").write_text("lower")


def _mount_words(place: Path) -> list[str]:
    return ["mount", "-l", f"{place}/lower", "-u", f"{place}/upper", "-w", f"{place}/work", f"{place}/merged"]


def _is_mounted(place: Path) -> bool | None:
    """Also whether it works; None if it is mounted and does not."""
    if not mounting.is_mounted(place / "merged"):
        return False
    try:
        (place / "merged/new").touch()
        (place / "merged/new").unlink()
    except OSError:
        return None
    return True


def _mounted(place: Path) -> None:
    _layers(place)
    outcome, _ = run(place, _mount_words(place))
    assert outcome.code == 0, outcome.text


def _snapshot(place: Path) -> None:
    """An upper that lies on a snapshot."""
    _mounted(place)
    (place / "merged/f").write_text("snapshot")
    outcome, _ = run(place, ["snapshot", "create", f"{place}/merged", "one"])
    assert outcome.code == 0, outcome.text
    outcome, _ = run(place, ["umount", f"{place}/merged"])
    assert outcome.code == 0, outcome.text


def _shows_snapshot(place: Path) -> Any:
    return _is_mounted(place) and (place / "merged/f").read_text()


def _wait_unused(place: Path) -> bool:
    """Wait until no daemon has the upper: it holds flock(2) on it."""
    fd = os.open(place / "upper", os.O_RDONLY | os.O_DIRECTORY)
    deadline = time.monotonic() + _SECONDS
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(0.005)
        return False
    finally:
        os.close(fd)


def _end(place: Path) -> None:
    """Unmount whatever is mounted, and wait for its daemon."""
    merged = place / "merged"
    if not merged.exists():
        return
    while mounting.is_mounted(merged):
        with contextlib.suppress(OSError):
            syscalls.umount(merged, syscalls.MNT_DETACH)
    _wait_unused(place)


# -- volumes ---------------------------------------------------------------------------------------------


def _volume(place: Path, content: str = "old") -> None:
    outcome, _ = run(place, ["volume", "create", "vol"])
    assert outcome.code == 0, outcome.text
    data = place / "storage/volumes/vol/_data"
    (data / "f").write_text(content)
    (data / "d").mkdir()
    (data / "d/g").write_text("g")


def _backup_words(place: Path) -> list[str]:
    return ["volume", "backup", "vol", "-o", f"{place}/vol.tar"]


def _restore_words(place: Path) -> list[str]:
    return ["volume", "restore", "vol", "-i", f"{place}/vol.tar"]


def _backed_up(place: Path) -> None:
    _volume(place)
    outcome, _ = run(place, _backup_words(place))
    assert outcome.code == 0, outcome.text


def _changed(place: Path) -> None:
    _backed_up(place)
    (place / "storage/volumes/vol/_data/f").write_text("new")
    (place / "storage/volumes/vol/_data/more").write_text("more")


def _content(place: Path) -> Any:
    """The volume's files, as a user sees them, None without it."""
    outcome, _ = run(place, ["volume", "inspect", "vol"])
    if outcome.code != 0:
        return None
    data = place / "storage/volumes/vol/_data"
    return {str(path.relative_to(data)): path.is_file() and path.read_text() for path in data.rglob("*")}


def _archive(place: Path) -> Any:
    if not (place / "vol.tar").exists():
        return None
    outcome, _ = run(place, ["volume", "verify", f"{place}/vol.tar"])
    return outcome.code


# The next use of the volume removes the record that a killed process began, and keeps space free again that
# another one took.
BACKUP: Final = Scenario("volume backup", _volume, _backup_words, _archive, sweeps=_backup_words)
CHANGED: Final = Scenario("volume restore", _changed, _restore_words, _content, sweeps=_restore_words)
SCENARIOS: Final = [
    Scenario("mount", _layers, _mount_words, _is_mounted),
    Scenario("mount of snapshots", _snapshot, _mount_words, _shows_snapshot),
    Scenario("umount", _mounted, lambda place: ["umount", f"{place}/merged"], _is_mounted),
    Scenario("volume create", lambda place: None, lambda place: ["volume", "create", "vol"], _content),
    Scenario("volume rm", _volume, lambda place: ["volume", "rm", "vol"], _content),
    BACKUP,
    CHANGED,
]


# -- faults ----------------------------------------------------------------------------------------------


def _files(place: Path) -> list[str]:
    """The names of everything on the disk but locks, and mounts."""
    return sorted(
        str(path.relative_to(place)) for path in place.rglob("*")
        if path.name != "output" and "lock" not in path.name and "merged/" not in str(path)
    )  # fmt: skip


@dataclass
class Reference:
    """The states before and after the command, its files after it, and its points."""

    old: Any
    new: Any
    files: list[str]
    points: list[str]


def reference(place: Path, scenario: Scenario) -> Reference:
    """Run the command without a fault, in a directory that does not exist."""
    with _prepared(place, scenario):
        old = scenario.state(place)
        _, points = run(place, scenario.arguments(place), Fault(0, 0))
        state = scenario.state(place)
        if scenario.sweeps is not None:
            run(place, scenario.sweeps(place))
        return Reference(old, state, _files(place), points)


@contextlib.contextmanager
def _prepared(place: Path, scenario: Scenario) -> Iterator[None]:
    place.mkdir()
    try:
        scenario.prepare(place)
        yield
    finally:
        _end(place)
        areas.remove(place)


def tried(place: Path, scenario: Scenario, fault: Fault, reference: Reference) -> list[str]:
    """Run it with a fault; what does not hold."""
    problems = []
    with _prepared(place, scenario):
        outcome, _ = run(place, scenario.arguments(place), fault)
        if not fault.hit:
            return []
        state = scenario.state(place)
        if fault.error == KILL:
            known = state in (reference.old, reference.new, None)
            if not known and not scenario.halfway(state, reference.new):
                problems.append(f"killed, and then {state}")
        elif outcome.code == 0:
            if state != reference.new:
                problems.append(f"success, but {state} ({outcome.text})")
        else:
            problems += message(outcome, fault)
            if state != (reference.new if _DONE.search(outcome.text) else reference.old):
                problems.append(f"failed, but {state}: {outcome.text}")
        if state != reference.new:
            if (place / "merged").exists() and scenario.name.startswith("mount"):
                _end(place)
            again, _ = run(place, scenario.arguments(place))
            if again.code != 0:
                problems.append(f"again: {again.text}")
            elif scenario.state(place) != reference.new:
                problems.append(f"again: {scenario.state(place)}")
        if scenario.sweeps is not None:
            run(place, scenario.sweeps(place))
        # What a mount could not remove from work the next one does.
        files = [name for name in _files(place) if not (name.startswith("work/work/#") and name in fault.hit)]
        if files != reference.files:
            left = [name for name in files if name not in reference.files]
            lost = [name for name in reference.files if name not in files]
            if left or not fault.hit.endswith("/spare"):  # a full disk has no room for what is kept free
                problems.append(f"left {left}, missing {lost}")
    return problems


def message(outcome: Outcome, fault: Fault) -> list[str]:
    """What is wrong with what a command that failed has printed."""
    text = outcome.text
    if fault.lasts and "before the mount was usable; see" in text:
        return []  # a daemon that can open nothing any more
    if "Traceback" in text or not re.fullmatch(r"unionfs: [^\n]*\.\n", text):
        return [f"no sentence: {text[-700:]!r}"]
    if os.strerror(fault.error).lower() not in text.lower():
        return [f"the sentence lacks the error: {text!r}"]
    return []


def faults_of(points: int, *, lasting: Sequence[int] = ()) -> list[Fault]:
    """Each errno and a kill at each point, the ``lasting`` ones also from there on."""
    found: list[Fault] = []
    for number in range(1, points + 1):
        found += (Fault(number, error) for error in (*ERRORS, KILL))
        found += (Fault(number, error, lasts=True) for error in lasting)
    return found


def run_all(
    area: Path,
    *,
    scenarios: Sequence[Scenario] = SCENARIOS,
    some: Selection = ALL,
    told: Callable[[str], object] = lambda line: None,
) -> Report:
    """Try all faults, or some."""
    report = Report()
    for scenario in scenarios:
        expected = reference(area / "reference", scenario)
        done = Report()
        for fault in some.of(faults_of(len(expected.points))):
            found = tried(area / "place", scenario, fault, expected)
            done.tried += bool(fault.hit)
            for problem in found:
                done.problems.append(f"{scenario}: {fault}: {problem}")
                told(f"  {done.problems[-1]}")
        report.add(done)
        told(f"{scenario}: {len(expected.points)} points, {done.tried} faults")
    return report
