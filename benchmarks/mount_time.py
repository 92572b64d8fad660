"""From the command to a usable mount, and the memory of idle mounts: unionfs and fuse-overlayfs alternately.

    python benchmarks/mount_time.py [--rounds N] [--lowers N] [--idle N]

Measures the wall time (milliseconds) from starting the command to its return, and to the first listing of the
merged tree; and that of unmounting (``unionfs umount`` waits for the daemon to end, ``fusermount3 -u`` does
not). The caches are warm: the first mount of each is not counted, nor is the start of the resident.

Then the proportional set size (Pss, MB) of all daemons of several idle mounts, with the resident's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

LAUNCHER = Path(sys.executable).parent / "fuse-unionfs"
Layers = tuple[list[Path], Path, Path, Path]


def unionfs_command(layers: Layers) -> list[str]:
    """The mount command by the installed console script, else by the module."""
    lowers, upper, work, mountpoint = layers
    script = Path(sys.executable).parent / "unionfs"
    start = [str(script)] if script.exists() else [sys.executable, "-m", "unionfs"]
    stack = [word for lower in lowers for word in ("-l", str(lower))]
    return [*start, "mount", *stack, "-u", str(upper), "-w", str(work), str(mountpoint)]


def mount_program_command(program: str, layers: Layers) -> list[str]:
    """The command of a mount program, as podman calls it."""
    lowers, upper, work, mountpoint = layers
    data = f"lowerdir={':'.join(map(str, lowers))},upperdir={upper},workdir={work}"
    return [program, "-o", data, str(mountpoint)]


def once(command: list[str], mountpoint: Path) -> tuple[float, float, float]:
    """Milliseconds to the command's return, to the first listing, and for unmounting."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    returned = time.perf_counter()
    assert "from-a-lower" in os.listdir(mountpoint)
    usable = time.perf_counter()
    if "mount" in command:
        subprocess.run([*command[: command.index("mount")], "umount", str(mountpoint)], check=True)
    else:
        subprocess.run(["fusermount3", "-u", str(mountpoint)], check=True)
    gone = time.perf_counter()
    return (returned - start) * 1e3, (usable - start) * 1e3, (gone - usable) * 1e3


def pss(home: Path) -> float:
    """MB of the processes with this directory on their command lines, and of the residents beside them."""
    total = 0
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            words = Path(f"/proc/{name}/cmdline").read_bytes()
            if int(name) != os.getpid() and (os.fsencode(home) in words or is_resident(words)):
                lines = Path(f"/proc/{name}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def is_resident(words: bytes) -> bool:
    """Whether this is the command line of a resident of this installation."""
    return b"--resident\0" in words and os.fsencode(LAUNCHER.parent) in words


def end_residents() -> None:
    """Let the next mount start another one: daemons share pages with the first one, if both did the same."""
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            if is_resident(Path(f"/proc/{name}/cmdline").read_bytes()):
                os.kill(int(name), signal.SIGTERM)
    time.sleep(1)


def idle_memory(command: Callable[[Layers], list[str]], home: Path, count: int) -> float:
    """Pss (MB) of the daemons of this many mounts that nobody uses."""
    end_residents()
    lower = home / "lower"
    lower.mkdir(parents=True)
    mounted = []
    try:
        for number in range(count):
            upper, work, mountpoint = (home / f"{part}{number}" for part in ("upper", "work", "merged"))
            for path in (upper, work, mountpoint):
                path.mkdir()
            subprocess.run(command(([lower], upper, work, mountpoint)), check=True, stdin=subprocess.DEVNULL)
            mounted.append(mountpoint)
        time.sleep(4)  # the commands have ended, and daemons of one resident share what is equal
        return pss(home)
    finally:
        for mountpoint in mounted:
            subprocess.run(["fusermount3", "-u", str(mountpoint)], check=True)
        time.sleep(1)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="From the command to a usable mount, in milliseconds.")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--lowers", type=int, default=1)
    parser.add_argument("--idle", type=int, default=10)
    options = parser.parse_args()
    commands: dict[str, Callable[[Layers], list[str]]] = {"unionfs mount": unionfs_command}
    if LAUNCHER.exists():
        commands["fuse-unionfs"] = partial(mount_program_command, str(LAUNCHER))
    if shutil.which("fuse-overlayfs"):
        commands["fuse-overlayfs"] = partial(mount_program_command, "fuse-overlayfs")
    else:
        print("fuse-overlayfs is not installed (apt-get install fuse-overlayfs): unionfs alone")

    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="unionfs-benchmark-") as home:
        lowers = [Path(home, f"l{number}") for number in range(options.lowers)]
        for path in lowers:
            path.mkdir()
        (lowers[-1] / "from-a-lower").touch()
        # fuse-overlayfs takes the root's origin, which overlayfs stores too, for the path of a lower.
        own = {name: [Path(home, name, part) for part in ("upper", "work", "merged")] for name in commands}
        for path in (path for paths in own.values() for path in paths):
            path.mkdir(parents=True)
        for _ in range(options.rounds + 1):
            for name, command in commands.items():
                upper, work, mountpoint = own[name]
                taken[name].append(once(command((lowers, upper, work, mountpoint)), mountpoint))
                time.sleep(0.05)  # let the daemon end

    print(f"{options.rounds} mounts each, alternately; {options.lowers} lowers; ms, median (min - max)")
    print(f"{'':16}{'command returned':>24}{'first listing':>24}{'unmounted':>24}")
    for name, rows in taken.items():
        cells = []
        for column in zip(*rows[1:], strict=True):
            cells.append(f"{statistics.median(column):.0f} ({min(column):.0f} - {max(column):.0f})")
        print(f"{name:16}" + "".join(f"{cell:>24}" for cell in cells))

    print(f"\n{options.idle} idle mounts: MB of Pss, with the resident")
    for name, command in commands.items():
        with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="unionfs-benchmark-") as home:
            print(f"{name:16}{idle_memory(command, Path(home, 'idle'), options.idle):>24.1f}")


if __name__ == "__main__":
    main()
