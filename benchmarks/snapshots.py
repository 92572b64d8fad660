"""How long a mount answers no request while a snapshot of it is taken, by the number of files open for
writing.

    python -m benchmarks.snapshots [--files N,N,...] [--size BYTES] [--upper N] [--repeat N]
                                   [--filesystem ext4|xfs|btrfs] [--json FILE]

Mounts a union with `--upper` files in its upper, opens N files of SIZE bytes for writing, and takes
snapshots. Prints the pause that the daemon reports, and the time of the whole command, each the median and
the maximum, for each I/O mode. The layers are in a new filesystem of that type, by default in the directory
for temporary files. `--json` writes them for `scripts/perf report`. Requires root.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks import lab
from benchmarks.disks import KINDS, new_filesystem
from benchmarks.perf.area import filesystem_of
from benchmarks.perf.results import ContestantFacts

_UNIONFS = (sys.executable, "-m", "unionfs")
_MODES = ("hybrid", "cached")
_Samples = dict[tuple[str, str], dict[str, list[float]]]


def _measure(top: Path, repeat: int, first: int) -> tuple[list[float], list[float], int]:
    """Pauses and times of the command in seconds, and the number of files that were copied."""
    pauses, times, copied = [], [], 0
    for number in range(repeat):
        began = time.monotonic()
        done = subprocess.run(
            [*_UNIONFS, "snapshot", "create", "--json", top, f"s{first + number}"],
            capture_output=True,
            check=True,
        )
        times.append(time.monotonic() - began)
        found = json.loads(done.stdout)
        pauses.append(found["seconds"])
        copied = found["open_files"]
    return pauses, times, copied


def _run(
    area: Path, mode: str, counts: list[int], size: int, upper: int, repeat: int, samples: _Samples
) -> None:
    """Measure one I/O mode; adds to the samples."""
    for name in ("lower", "upper", "work", "merged"):
        (area / name).mkdir(parents=True)
    top = area / "merged"
    layers = ("-l", area / "lower", "-u", area / "upper", "-w", area / "work")
    subprocess.run([*_UNIONFS, "mount", "--session", "direct", "--io", mode, *layers, top], check=True)
    try:
        for number in range(upper):
            (top / f"d{number // 1000}").mkdir(exist_ok=True)
            (top / f"d{number // 1000}/f{number}").write_bytes(b"x")
        taken = 0
        for count in counts:
            files = []
            for number in range(count):
                file = os.open(top / f"open{number}", os.O_CREAT | os.O_RDWR)
                os.pwrite(file, b"x" * size, 0)
                files.append(file)
            pauses, times, copied = _measure(top, repeat, taken)
            taken += repeat
            milliseconds = [pause * 1000 for pause in pauses]
            samples.setdefault((f"pause, {count:,} open", "ms"), {})[mode] = milliseconds
            samples.setdefault((f"command, {count:,} open", "s"), {})[mode] = times
            for file in files:
                os.close(file)
            print(
                f"{mode:8} {count:6} open files ({copied} copied): pause "
                f"{statistics.median(pauses) * 1000:8.1f} ms, at "
                f"most {max(pauses) * 1000:8.1f}; command {statistics.median(times):6.2f} s, at most "
                f"{max(times):6.2f}"
            )
    finally:
        subprocess.run([*_UNIONFS, "umount", "--force", top], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--files", default="0,100,10000")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--upper", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--filesystem", choices=KINDS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    counts = [int(word) for word in arguments.files.split(",")]
    samples: _Samples = {}
    with ExitStack() as stack:
        area = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unionfs-snapshots-")))
        if arguments.filesystem is not None:
            area = stack.enter_context(new_filesystem(area, arguments.filesystem))
        for mode in _MODES:
            _run(area / mode, mode, counts, arguments.size, arguments.upper, arguments.repeat, samples)
        filesystem = filesystem_of(area)
    if arguments.json is not None:
        words = f"open for writing, {arguments.size:,} bytes each"
        lab.write(
            arguments.json, f"snapshots-{filesystem}", f"Snapshots of a mount, on {filesystem}",
            [ContestantFacts(mode, f"unionfs --io {mode}", "ours") for mode in _MODES],
            {name: f"{'the time without answers' if unit == 'ms' else 'the whole command'}; files {words}"
             for name, unit in samples},
            samples, settings={"files in the upper": arguments.upper},
        )  # fmt: skip


if __name__ == "__main__":
    main()
