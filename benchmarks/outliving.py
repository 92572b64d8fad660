"""How long requests wait while another daemon takes a mount over (`-o outlive`), and what the holder takes.

    python -m benchmarks.outliving [--nodes N] [--kills N]

Mounts a union over N files, looks all of them up, and kills the daemon. Prints the time until the next
request is answered, its median and its maximum, with few nodes and with N, the time to look at all N again,
and the memory of the holder and the daemon. Requires root.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from unionfs.sys.process import children_of

_UNIONFS = (sys.executable, "-m", "unionfs")
_DIRECTORY = 100
_SECONDS = 60.0


def _inspect(top: Path) -> dict[str, Any]:
    done = subprocess.run([*_UNIONFS, "inspect", "--json", top], capture_output=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _pss(pid: int) -> int:
    """The proportional set size of a process in KiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _holder(pid: int) -> int:
    return children_of(pid)[0]


def _waits(top: Path, kills: int) -> list[float]:
    """Seconds until a request is answered after each death."""
    found = []
    pid = _inspect(top)["pid"]
    for _ in range(kills):
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        os.statvfs(top)
        found.append(time.monotonic() - began)
        before, deadline = pid, began + _SECONDS
        while pid == before:
            if time.monotonic() > deadline:
                raise SystemExit("no daemon took over")
            done = subprocess.run([*_UNIONFS, "ls", "--json"], capture_output=True, check=True)
            pids = [one["pid"] for one in json.loads(done.stdout) if one["mountpoint"] == str(top)]
            pid = next((one for one in pids if one is not None), before)
    return found


def _look_up(top: Path) -> float:
    """Look at every file; seconds."""
    began = time.monotonic()
    for directory in os.scandir(top):
        for file in os.scandir(directory.path):
            os.stat(file.path)
    return time.monotonic() - began


def _shown(name: str, waits: list[float]) -> None:
    print(f"{name:28} median {statistics.median(waits):.3f} s, maximum {max(waits):.3f} s")


def _measure(home: Path, nodes: int, kills: int) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (home / name).mkdir()
    for number in range(nodes // _DIRECTORY):
        directory = home / "lower" / f"directory{number:05d}"
        directory.mkdir()
        for file in range(_DIRECTORY):
            (directory / f"file{file:05d}").touch()
    top = home / "merged"
    layers = [f"lowerdir={home}/lower,upperdir={home}/upper,workdir={home}/work,outlive"]
    subprocess.run(
        [*_UNIONFS, "mount", "-o", *layers, top], check=True, env={**os.environ, "UNIONFS_DEATHS": "0"}
    )
    try:
        _shown("few nodes", _waits(top, kills))
        print(f"{'all looked up':28} {_look_up(top):.3f} s")
        figures = _inspect(top)["figures"]
        print(f"{'nodes':28} {figures['nodes']}")
        _shown(f"{figures['nodes']} nodes", _waits(top, kills))
        print(f"{'all looked up again':28} {_look_up(top):.3f} s")
        whole = _inspect(top)
        print(f"{'holder':28} {_pss(_holder(whole['pid']))} KiB (Pss)")
        print(f"{'daemon':28} {_pss(whole['pid'])} KiB (Pss)")
    finally:
        subprocess.run(["umount", "--lazy", top], check=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nodes", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=5)
    arguments = parser.parse_args()
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shared) as home:
        _measure(Path(home), arguments.nodes, arguments.kills)


if __name__ == "__main__":
    main()
