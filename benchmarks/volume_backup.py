"""Backups of volumes beside GNU tar: `python -m benchmarks.volume_backup [--files N] [--size MIB] [--rounds
N]`.

`unionfs volume backup` and `tar --xattrs --acls --sparse` alternately archive two volumes, one of many small
files and one of a few large ones, both uncompressed, and unpack them again. A ratio above 1 means that
unionfs is faster.

    pipe      into a pipe whose reader discards it: the cost of the programs themselves
    file      into a file that is on disk in the end; unionfs syncs it itself, tar is followed by `sync FILE`
    unpack    `volume restore` (checked, on disk, put in place at once), and tar into an empty directory with
              `sync -f`
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_TAR = ("tar", "--xattrs", "--acls", "--sparse")


def _small_files(root: Path, count: int) -> None:
    source = random.Random(1)
    data = source.randbytes(1 << 20)
    for number in range(count):
        directory = root / f"directory {number // 500}"
        if number % 500 == 0:
            directory.mkdir()
        start, size = source.randrange(1 << 19), source.randrange(100, 8000)
        (directory / f"file {number}").write_bytes(data[start : start + size])


def _large_files(root: Path, mebibytes: int) -> None:
    piece = random.Random(2).randbytes(1 << 20)
    files = 8
    for number in range(files):
        with (root / f"file {number}").open("wb") as file:
            for turn in range(mebibytes // files):
                file.write(piece[turn % 1000 :] + piece[: turn % 1000])


def _run(command: Sequence[str | Path], **named: object) -> None:
    subprocess.run(list(map(str, command)), check=True, stderr=subprocess.DEVNULL, **named)  # type: ignore[call-overload]


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _discard(command: Sequence[str | Path]) -> None:
    """Run a command into a pipe. (For /dev/null tar would not even read the files.)"""
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        with open("/dev/null", "wb", buffering=0) as null:
            _run(["cat"], stdin=child.stdout, stdout=null)
    assert child.returncode == 0


class _Bench:
    def __init__(self, area: Path, rounds: int) -> None:
        self.area = area
        self.rounds = rounds
        self.root = area / "root"
        self.out = area / "out"
        os.environ["UNIONFS_ROOT"] = str(self.root)
        self.unionfs = (Path(sys.executable).parent / "unionfs", "volume")

    def volume(self, name: str) -> Path:
        """Create a volume; return its data directory."""
        _run([*self.unionfs, "create", name], stdout=subprocess.DEVNULL)
        return self.root / "volumes" / name / "_data"

    def compare(self, what: str, ours: Callable[[], None], tar: Callable[[], None]) -> None:
        """Run both alternately, and print the medians and their ratio."""
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(self.rounds):
            for call, found in zip((ours, tar), times, strict=True):
                found.append(_timed(call))
        mine, other = map(statistics.median, times)
        spread = " ".join(f"{min(one):.2f}-{max(one):.2f}" for one in times)
        print(
            f"{what:<16} unionfs {mine:6.2f} s   tar {other:6.2f} s   ratio {other / mine:5.2f}   ({spread})",
            flush=True,
        )

    def all(self, name: str) -> None:
        """The three comparisons for one volume."""
        data = self.root / "volumes" / name / "_data"
        archive, tarball, place = self.area / "b.tar", self.area / "t.tar", self.area / "place"
        backup: list[str | Path] = [*self.unionfs, "backup", name, "--compress", "none", "-o"]
        self.compare(
            f"{name} pipe",
            lambda: _discard([*backup, "-"]),
            lambda: _discard([*_TAR, "-cf", "-", "-C", data, "."]),
        )

        def tar_file() -> None:
            _run([*_TAR, "-cf", tarball, "-C", data, "."])
            _run(["sync", tarball])

        quiet = {"stdout": subprocess.DEVNULL}
        self.compare(f"{name} file", lambda: _run([*backup, archive], **quiet), tar_file)

        def restore() -> None:
            _run([*self.unionfs, "restore", "target", "-i", archive], **quiet)

        def unpack() -> None:
            # Both include the time to remove the old content.
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            _run([*_TAR, "--numeric-owner", "-xpf", tarball, "-C", place])
            _run(["sync", "-f", place])

        self.compare(f"{name} unpack", restore, unpack)
        archive.unlink()
        tarball.unlink()
        shutil.rmtree(place)


def main() -> None:
    """Run everything in a new directory below the temporary directory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=50_000, help="small files (default 50000)")
    parser.add_argument(
        "--size", type=int, default=2048, metavar="MIB", help="of the large files (default 2048)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns, of which the median counts (default 5)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="unionfs-backup-") as area:
        bench = _Bench(Path(area), options.rounds)
        bench.volume("target")
        _small_files(bench.volume("small"), options.files)
        _large_files(bench.volume("large"), options.size)
        os.sync()
        bench.all("small")
        bench.all("large")


if __name__ == "__main__":
    main()
