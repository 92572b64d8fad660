"""Calls of the command line as a user makes them, and a place with layers that is always cleaned up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import areas
from tests.support.patience import patient
from unionfs.daemon import live
from unionfs.sys.process import start_time

REPOSITORY = Path(__file__).resolve().parents[2]
UNIONFS = (sys.executable, "-m", "unionfs")
FUSE_UNIONFS = (
    sys.executable, "-c", "import sys; sys.argv[0] = 'fuse-unionfs'\n"
    "from unionfs.cli.fuse_unionfs import main; main()",
)  # fmt: skip
SECONDS = patient(30.0)

Done = subprocess.CompletedProcess[str]


def call(command: Sequence[str], *arguments: str | Path, cwd: Path | None = None, **extra: Any) -> Done:
    """Run a command to the end of its output; the daemon it leaves must not hold its pipes."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **extra.pop("env", {})}
    return subprocess.run(
        [*command, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=extra.pop("timeout", SECONDS),
        cwd=cwd or "/",
        env=environment,
        text=True,
        errors="surrogateescape",
        **extra,
    )


def unionfs(*arguments: str | Path, cwd: Path | None = None, **extra: Any) -> Done:
    """Run `unionfs` with these arguments."""
    return call(UNIONFS, *arguments, cwd=cwd, **extra)


def session_words(session: str) -> list[str]:
    """The `unionfs mount` options for a test session such as `direct-cached`."""
    name, _, io = session.partition("-")
    return ["--session", name, *(["--io", io] if io else [])]


def succeed(done: Done) -> str:
    """The command must have succeeded without output on stderr; returns its standard output."""
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def refused(done: Done, *parts: str, program: str = "unionfs") -> str:
    """The command must have failed with one sentence with these parts, and code 1 (`run`, `exec`: 125)."""
    code = 125 if {"run", "exec"} & set(done.args) else 1
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    assert done.stderr.startswith(f"{program}: "), done.stderr
    assert done.stderr.endswith(".\n"), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr
    return done.stderr


@dataclass
class Place:
    """Unmounted layers. `lower` contains the file `base`, `lower2` the file `deep`."""

    root: Path

    def __post_init__(self) -> None:
        for name in ("lower", "lower2", "upper", "work", "merged"):
            (self.root / name).mkdir()
        (self.lower / "base").write_text("base\n")
        (self.lower2 / "deep").write_text("deep\n")

    @property
    def lower(self) -> Path:
        return self.root / "lower"

    @property
    def lower2(self) -> Path:
        return self.root / "lower2"

    @property
    def upper(self) -> Path:
        return self.root / "upper"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def data(self) -> str:
        """The layers in the kernel's spelling."""
        return f"lowerdir={self.lower}:{self.lower2},upperdir={self.upper},workdir={self.work}"

    @property
    def layers(self) -> tuple[str | Path, ...]:
        """The layers as arguments of `unionfs mount`."""
        return ("-l", self.lower, "-l", self.lower2, "-u", self.upper, "-w", self.work)

    def mount(self, *extra: str) -> int:
        """Mount it in the background; returns the daemon's pid."""
        assert succeed(unionfs("mount", *self.layers, *extra, self.merged)) == ""
        return self.pid()

    def pid(self) -> int:
        """The pid of the daemon behind `merged`."""
        return self.entry().pid

    def entry(self) -> live.LiveMount:
        """The registry's entry of `merged`."""
        return next(e for e in live.entries() if e.settings.mountpoint == str(self.merged))

    def snapshot(self) -> dict[str, bytes | None]:
        """Every path below the root and the content of files, to detect changes."""
        return {
            str(path.relative_to(self.root)): path.read_bytes() if path.is_file() else None
            for path in sorted(self.root.rglob("*"))
        }


@contextmanager
def place(area: Path) -> Iterator[Place]:
    """Layers in `area`; at the end removes their mounts, daemons and registry entries."""
    try:
        yield Place(area)
    finally:
        daemons = [entry for entry in live.entries() if entry.settings.mountpoint.startswith(str(area) + "/")]
        areas.detach(area)
        for entry in daemons:
            if not wait_for(lambda entry=entry: not entry.is_alive(), 3):
                with suppress(ProcessLookupError):
                    os.kill(entry.pid, signal.SIGKILL)
        live.entries()


def wait_for(condition: Any, seconds: float = 10.0) -> bool:
    """Whether `condition()` becomes true within this time. At most half of it is spent asking."""
    deadline = time.monotonic() + patient(seconds)
    began = time.monotonic()
    while not condition():
        asked = time.monotonic()
        if asked > deadline:
            return False
        time.sleep(max(0.005, asked - began))
        began = time.monotonic()
    return True


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie counts as ended."""
    return start_time(pid) is None


def kill(pid: int) -> None:
    """Kill a process, and wait for its end."""
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: gone(pid))


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process until the end of the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def files_of(pid: int) -> list[Path]:
    """What a daemon of root's has in the registry."""
    return list(Path("/run/unionfs").glob(f"{pid}-*"))


def mounts_at(path: Path) -> list[str]:
    """The types of the mounts exactly there."""
    return [kind for _, where, kind in areas.mounts_below(path) if where == str(path)]


def listed(done: Done) -> Any:
    """The values printed by a command with --json."""
    return json.loads(succeed(done))
