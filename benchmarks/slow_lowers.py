"""What a union adds to a lower on sshfs, on rclone, and on a FUSE filesystem that answers late.

    python -m benchmarks.slow_lowers [--rounds N] [--files N] [--mib N] [--only KIND ...] [--delay SECONDS]

Prints medians, in milliseconds, of the bare mount and of a union over it, in turns: find(1), cat(1) of all
files, and of a large one; each with the caches of a new mount. Then the median and the worst of 500 times
that a file is made and removed in a directory of another lower: before the server is stopped, and while
programs wait for it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.mount.hung_calls import Remote, Server
from tests.mount.hung_programs import Rclone, Sshfs

_PROGRAM = (sys.executable, "-m", "unionfs")
_ASKED = 500
_CALLERS = 4


def _tree(top: Path, files: int, size: int) -> None:
    for number in range(files):
        path = top / "small" / f"d{number // 50}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(3000))
    (top / "large").write_bytes(os.urandom(size))


def _find(top: Path) -> None:
    subprocess.run(["find", top / "small"], check=True, stdout=subprocess.DEVNULL)


def _cat(top: Path) -> None:
    subprocess.run(["sh", "-c", 'cat "$0"/small/*/*', top], check=True, stdout=subprocess.DEVNULL)


def _read(top: Path) -> None:
    subprocess.run(["cat", top / "large"], check=True, stdout=subprocess.DEVNULL)


_WORK: dict[str, Callable[[Path], None]] = {
    "find": _find,
    "cat of all files": _cat,
    "cat of the large file": _read,
}


def _timed(work: Callable[[Path], None], top: Path) -> float:
    began = time.perf_counter()
    work(top)
    return (time.perf_counter() - began) * 1e3


class _Place:
    """A served directory, and a union over it and an ordinary one, each mounted anew for a figure."""

    def __init__(self, start: Callable[[Path, Path], Remote], area: Path, source: Path) -> None:
        self.area, self.source, self._start = area, source, start
        for name in ("served", "lower", "upper", "work", "merged"):
            (area / name).mkdir()
        (area / "lower/other").mkdir()
        self._undo = ExitStack()

    def serve(self) -> Remote:
        place = Path(tempfile.mkdtemp(dir=self.area))
        shutil.copytree(self.source, place / "source", copy_function=os.link)
        remote = self._start(place / "source", self.area / "served")
        self._undo.callback(shutil.rmtree, place, ignore_errors=True)
        self._undo.callback(remote.end)
        os.statvfs(self.area / "served")  # what only the first call costs
        time.sleep(0.5)
        return remote

    def union(self) -> Path:
        merged = self.area / "merged"
        area = self.area
        options = ("-l", area / "lower", "-l", area / "served", "-u", area / "upper", "-w", area / "work")
        subprocess.run([*_PROGRAM, "mount", *options, merged], check=True)
        self._undo.callback(lambda: subprocess.run([*_PROGRAM, "umount", "--force", merged], check=True))
        return merged

    def close(self) -> None:
        self._undo.close()


def _others(top: Path) -> list[float]:
    found = []
    for number in range(_ASKED):
        began = time.perf_counter()
        path = top / "other" / f"f{number}"
        path.touch()
        path.unlink()
        found.append((time.perf_counter() - began) * 1e3)
    return found


def _show_others(place: _Place) -> None:
    remote, top = place.serve(), place.union()
    callers: list[subprocess.Popen[bytes]] = []
    try:
        _others(top)
        before = _others(top)
        remote.stop()
        for number in range(_CALLERS):
            words = ("stat", top / f"small/missing{number}")
            callers.append(subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        time.sleep(1.5)
        during = _others(top)
        for name, found in (("answers", before), ("is stopped", during)):
            print(
                f"  touch and rm in another lower's directory while it {name}: median "
                f"{statistics.median(found):.2f}, worst {max(found):.1f}"
            )
    finally:
        remote.go_on()
        for caller in callers:
            caller.wait()
        place.close()


def _measure(start: Callable[[Path, Path], Remote], source: Path, rounds: int) -> None:
    area = Path(tempfile.mkdtemp(prefix="slow-lowers-"))
    place = _Place(start, area, source)
    try:
        for name, work in _WORK.items():
            bare, union = [], []
            for _ in range(rounds):
                place.serve()
                bare.append(_timed(work, area / "served"))
                place.close()
                place.serve()
                union.append(_timed(work, place.union()))
                place.close()
            print(
                f"  {name}: bare {statistics.median(bare):.0f} ({min(bare):.0f} to {max(bare):.0f}), union "
                f"{statistics.median(union):.0f} ({min(union):.0f} to {max(union):.0f})",
                flush=True,
            )
        _show_others(place)
    finally:
        place.close()
        shutil.rmtree(area, ignore_errors=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--mib", type=int, default=64, help="the size of the large file")
    parser.add_argument("--delay", type=float, default=0.05)
    kinds = ("sshfs", "rclone", "late")
    parser.add_argument("--only", choices=kinds, nargs="+", default=kinds)
    chosen = parser.parse_args()
    starts: dict[str, Callable[[Path, Path], Remote]] = {
        "sshfs": Sshfs, "rclone": partial(Rclone, caches=True), "late": partial(Server, seconds=chosen.delay)
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        _tree(Path(directory), chosen.files, chosen.mib << 20)
        for kind in chosen.only:
            print(kind, flush=True)
            _measure(starts[kind], Path(directory), chosen.rounds)


if __name__ == "__main__":
    main()
