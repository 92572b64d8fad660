"""The contestants, and how each of them mounts the same layers."""

from __future__ import annotations

import errno
import json
import os
import platform
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import unionfs
from benchmarks.perf.processes import CommandFailed, end, held, run, start, wait
from benchmarks.perf.results import Kind
from tests.support import areas, syscalls

_READY_SECONDS = 20.0
_GONE_SECONDS = 10.0


@dataclass(frozen=True)
class Layers:
    """The directories of one mount."""

    lowers: tuple[Path, ...]
    """The topmost first."""
    upper: Path
    work: Path
    merged: Path
    log: Path


@dataclass(frozen=True)
class Mount:
    """One live mount, or a directory that stands for one."""

    merged: Path
    pid: int | None = None
    """The daemon's process; None if the kernel does everything."""
    counts: bool = False
    """Whether the daemon reports figures."""
    seconds: float = 0.0
    """From the start of the command to a mount that answers."""

    def figures(self) -> Figures | None:
        """The daemon's counters; None for daemons without counters."""
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
    """Requests by kind, and the size of the node table if reported."""

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
    """A directory without a union: what is changed there has to be copied first."""
    copies_up: bool = True
    """Whether it supports changing a lower file."""

    @property
    def kind(self) -> Kind:
        """What it is."""
        if self.is_plain:
            return "plain"
        if self.command is None:
            return "kernel"
        return "ours" if self.ours else "peer"

    @contextmanager
    def mounted(self, layers: Layers, *, reads_only: bool = False) -> Iterator[Mount]:
        """A live mount, removed afterwards with its daemon. Raises CommandFailed if mounting fails.

        `reads_only`: nothing in it will be changed, so the plain directory can be the lower itself.
        """
        if self.is_plain:
            yield Mount(layers.lowers[0] if reads_only else layers.merged)
        elif self.command is None:
            seconds = _mount_overlay(layers)
            try:
                yield Mount(layers.merged, seconds=seconds)
            finally:
                _unmount(layers.merged)
        else:
            with layers.log.open("wb") as log:
                began = time.perf_counter()
                process = start(self.command(layers), log=log)
            ready = False
            try:
                _wait_ready(process, layers)
                ready = True
                yield Mount(layers.merged, process.pid, self.ours, time.perf_counter() - began)
            finally:
                with held():
                    if ready:
                        _unmount(layers.merged)
                        # the daemon ends by itself when its mount is gone
                        wait(process, _GONE_SECONDS)
                    end(process)
                    # it may have mounted only now, or have ended with an error
                    _unmount(layers.merged)


def _options(layers: Layers) -> str:
    """The layers in the kernel's syntax; the paths are created here and need no escapes."""
    lowers = ":".join(map(str, layers.lowers))
    return f"lowerdir={lowers},upperdir={layers.upper},workdir={layers.work}"


def _mount_overlay(layers: Layers) -> float:
    """Mount by mount(8), so that it, too, starts with a program. Return the seconds it took."""
    # Relative to the lowers, since all options together have one page (mount(2)).
    home = layers.lowers[0].parent
    near = replace(
        layers, lowers=tuple(Path(lower.name) for lower in layers.lowers),
        upper=Path(os.path.relpath(layers.upper, home)), work=Path(os.path.relpath(layers.work, home)),
    )  # fmt: skip
    # Distributions enable different features by default; of these only metacopy changes the work done here.
    options = f"{_options(near)},index=off,redirect_dir=off,metacopy=off,nfs_export=off"
    began = time.perf_counter()
    # The newer mount API, which mount(8) prefers, accepts options of at most 255 bytes.
    run(
        ["mount", "-t", "overlay", "-o", options, "overlay", str(layers.merged)],
        cwd=home, environment={"LIBMOUNT_FORCE_MOUNT2": "always"}, longest=_READY_SECONDS,
    )  # fmt: skip
    _answers(layers.merged)
    return time.perf_counter() - began


def _answers(merged: Path) -> None:
    """Wait for the answer to a first request, which comes after the one to INIT."""
    run(["stat", "-f", str(merged)], longest=_READY_SECONDS)


def _wait_ready(process: subprocess.Popen[bytes], layers: Layers) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    with open("/proc/self/mountinfo", "rb") as mounts:
        ended = os.pidfd_open(process.pid)
        try:
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            poll.register(mounts, select.POLLPRI)  # something was mounted: proc_pid_mounts(5)
            while (left := deadline - time.monotonic()) > 0:
                if any(where == str(layers.merged) for _, where, _ in areas.mounts_below(layers.merged)):
                    _answers(layers.merged)
                    return
                if process.poll() is not None:
                    break
                poll.poll(left * 1000)
        finally:
            os.close(ended)
    lines = layers.log.read_text(errors="replace").strip().splitlines() or ["no message"]
    if process.poll() is not None:
        raise CommandFailed(f"ended with {process.returncode}: {lines[-1]}")
    raise CommandFailed(f"not mounted within {_READY_SECONDS:.0f} s: {lines[-1]}")


def _unmount(merged: Path) -> None:
    """Unmount, by force if it stays busy."""
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
            *_OURS, "mount", "-f", *words,
            *(word for lower in layers.lowers for word in ("-l", str(lower))),
            "-u", str(layers.upper), "-w", str(layers.work), "-o", "allow_other,dev,suid", str(layers.merged),
        ]  # fmt: skip

    return Contestant(name, f"unionfs mount {' '.join(words)}", _our_version, command, ours=True)


def _our_version() -> str:
    """The version, with the commit of a checkout: two checkouts mostly have the same version."""
    where = Path(unionfs.__file__).parent.parent
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["git", "-C", where, "-c", f"safe.directory={where}", "describe", "--always", "--dirty"],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
        return f"{unionfs.__version__} ({done.stdout.strip()})"
    return unionfs.__version__


def _first_line_with(word: str, command: Sequence[str]) -> str:
    """The text after `word` in a program's --version."""
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
        ":".join((f"{layers.upper}=RW", *(f"{lower}=RO" for lower in layers.lowers))), str(layers.merged),
    ]  # fmt: skip


def _mergerfs(layers: Layers) -> list[str]:
    # auto-full keeps a file's pages between opens, as all others do.
    options = "allow_other,use_ino,dev,suid,cache.files=auto-full,minfreespace=0,fsname=mergerfs"
    return [
        "mergerfs", "-f", "-o", options,
        ":".join((f"{layers.upper}=RW", *(f"{lower}=RO" for lower in layers.lowers))), str(layers.merged),
    ]  # fmt: skip


CONTESTANTS = (
    Contestant("plain", "a directory without a union", platform.release, is_plain=True),
    Contestant("overlayfs", "kernel overlayfs", platform.release),
    Contestant(
        "fuse-overlayfs", "fuse-overlayfs",
        lambda: _first_line_with("fuse-overlayfs: version", ["fuse-overlayfs", "--version"]), _fuse_overlayfs,
    ),
    Contestant(
        "unionfs-fuse", "unionfs-fuse with cow",
        lambda: _first_line_with("unionfs-fuse version", ["unionfs-fuse", "--version"]), _unionfs_fuse,
    ),
    Contestant(
        "mergerfs", "mergerfs, where nothing is changed: it has no copy-up",
        lambda: _first_line_with("mergerfs version", ["mergerfs", "--version"]), _mergerfs,
        copies_up=False,
    ),
    _ours("hybrid", "--session", "direct", "--io", "hybrid"),
    _ours("passthrough", "--session", "direct", "--io", "passthrough"),
    _ours("cached", "--session", "direct", "--io", "cached"),
    _ours("pyfuse3", "--session", "pyfuse3"),
)  # fmt: skip
