"""Who takes part, and how each of them mounts the same layers."""

from __future__ import annotations

import errno
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import unionfs
from benchmarks.perf.processes import CommandFailed, end, held, run, start, wait
from tests.support import areas, syscalls

_READY_SECONDS = 20.0
_GONE_SECONDS = 10.0


@dataclass(frozen=True)
class Layers:
    """The directories of one mount."""

    lower: Path
    upper: Path
    work: Path
    merged: Path
    log: Path


@dataclass(frozen=True)
class Mount:
    """One live mount, or a directory that stands for one."""

    merged: Path
    pid: int | None = None
    """The daemon's process; None where the kernel does all."""
    counts: bool = False
    """Whether the daemon tells its figures."""

    def figures(self) -> Figures | None:
        """What the daemon has counted until now; None for those that don't count."""
        if not self.counts:
            return None
        told = json.loads(run([*_OURS, "inspect", "--json", str(self.merged)], longest=30.0).output)
        figures = told.get("figures")
        if not isinstance(figures, dict):
            raise CommandFailed("unionfs inspect shows no figures")
        requests = figures.get("requests")
        nodes = figures.get("nodes")
        return Figures(
            {str(kind): int(count) for kind, count in requests.items()} if isinstance(requests, dict) else {},
            nodes if isinstance(nodes, int) else None,
        )


@dataclass(frozen=True)
class Figures:
    """Requests by kind, and the size of the node table where it is told."""

    requests: dict[str, int]
    nodes: int | None


@dataclass(frozen=True)
class Contestant:
    """One way to have a merged tree. `command` runs a daemon in the foreground; None: no daemon."""

    name: str
    what: str
    """One line for --list."""
    version: Callable[[], str]
    command: Callable[[Layers], list[str]] | None = None
    ours: bool = False
    is_plain: bool = False
    """A directory with nothing above it: what is measured there needs a copy of the layers first."""

    @contextmanager
    def mounted(self, layers: Layers) -> Iterator[Mount]:
        """A live mount, gone afterwards with its daemon. Raises CommandFailed when there is none."""
        if self.is_plain:
            yield Mount(layers.merged)
        elif self.command is None:
            _mount_overlay(layers)
            try:
                yield Mount(layers.merged)
            finally:
                _unmount(layers.merged)
        else:
            with layers.log.open("wb") as log:
                process = start(self.command(layers), log=log)
            ready = False
            try:
                _wait_ready(process, layers)
                ready = True
                yield Mount(layers.merged, process.pid, self.ours)
            finally:
                with held():
                    if ready:
                        _unmount(layers.merged)
                        # the daemon ends by itself when its mount is gone
                        wait(process, _GONE_SECONDS)
                    end(process)
                    # it may have mounted only now, or not have ended well
                    _unmount(layers.merged)


def _options(layers: Layers) -> str:
    """The layers as the kernel spells them; the paths are made here and need no escapes."""
    return f"lowerdir={layers.lower},upperdir={layers.upper},workdir={layers.work}"


def _mount_overlay(layers: Layers) -> None:
    # What distributions switch on by default differs; none of it changes what is done here but metacopy.
    options = f"{_options(layers)},index=off,redirect_dir=off,metacopy=off,nfs_export=off"
    try:
        syscalls.mount("overlay", layers.merged, "overlay", 0, options)
    except OSError as error:
        raise CommandFailed(f"mounting overlayfs: {error.strerror}") from error


def _wait_ready(process: subprocess.Popen[bytes], layers: Layers) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        if any(where == str(layers.merged) for _, where, _ in areas.mounts_below(layers.merged)):
            run(["stat", "-f", str(layers.merged)], longest=_READY_SECONDS)  # waits for the answer to INIT
            return
        if process.poll() is not None:
            break
        time.sleep(0.005)
    lines = layers.log.read_text(errors="replace").strip().splitlines() or ["no message"]
    if process.poll() is not None:
        raise CommandFailed(f"ended with {process.returncode}: {lines[-1]}")
    raise CommandFailed(f"not mounted within {_READY_SECONDS:.0f} s: {lines[-1]}")


def _unmount(merged: Path) -> None:
    """Take the mount away, by force when it stays busy."""
    deadline = time.monotonic() + 5.0
    while True:
        try:
            syscalls.umount(merged)
            return
        except OSError as error:
            if error.errno == errno.EINVAL:  # nothing is mounted there
                return
            # A RELEASE is sent after close(2) has returned, so the mount may be busy for a moment.
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                break
            time.sleep(0.005)
    with suppress(OSError):
        areas.detach(merged)


_OURS = [sys.executable, "-m", "unionfs"]


def _ours(name: str, *words: str) -> Contestant:
    def command(layers: Layers) -> list[str]:
        return [
            *_OURS, "mount", "-f", *words, "-l", str(layers.lower), "-u", str(layers.upper),
            "-w", str(layers.work), "-o", "allow_other,dev,suid", str(layers.merged),
        ]  # fmt: skip

    return Contestant(
        name, f"unionfs mount {' '.join(words)}", lambda: unionfs.__version__, command, ours=True
    )


def _first_line_with(word: str, command: Sequence[str]) -> str:
    """What follows `word` in a program's --version."""
    if shutil.which(command[0]) is None:
        raise CommandFailed(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
    for line in (done.stdout + done.stderr).splitlines():
        if word in line:
            return line.partition(word)[2].strip(" :")
    return "unknown"


def _fuse_overlayfs(layers: Layers) -> list[str]:
    return ["fuse-overlayfs", "-f", "-o", f"{_options(layers)},allow_other,dev,suid", str(layers.merged)]


def _unionfs_fuse(layers: Layers) -> list[str]:
    return [
        "unionfs-fuse", "-f", "-o", "cow,allow_other,use_ino,dev,suid",
        f"{layers.upper}=RW:{layers.lower}=RO", str(layers.merged),
    ]  # fmt: skip


OVERLAYFS = "overlayfs"
FUSE_OVERLAYFS = "fuse-overlayfs"
#: Those that the others are held against.
REFERENCES = (OVERLAYFS, FUSE_OVERLAYFS)

CONTESTANTS = (
    Contestant("plain", "a directory, no union at all", platform.release, is_plain=True),
    Contestant(OVERLAYFS, "kernel overlayfs", platform.release),
    Contestant(
        FUSE_OVERLAYFS, "fuse-overlayfs",
        lambda: _first_line_with("fuse-overlayfs: version", ["fuse-overlayfs", "--version"]), _fuse_overlayfs,
    ),
    Contestant(
        "unionfs-fuse", "unionfs-fuse with cow",
        lambda: _first_line_with("unionfs-fuse version", ["unionfs-fuse", "--version"]), _unionfs_fuse,
    ),
    _ours("hybrid", "--session", "direct", "--io", "hybrid"),
    _ours("passthrough", "--session", "direct", "--io", "passthrough"),
    _ours("cached", "--session", "direct", "--io", "cached"),
    _ours("pyfuse3", "--session", "pyfuse3"),
)  # fmt: skip
