"""What the storage drivers of containers cost: `python -m benchmarks.storage_drivers [--only DRIVER]...`.

Requires root. Each driver works on a new filesystem (ext4, btrfs or ZFS), which has the lower, too: 5,000
files of 4 KiB, a busybox, and one file of 256 MiB; or a tree of your own (`--parent DIR`), with that file.
Figures are medians:

    first       create the writable layer when nothing of the lower is known yet
    next        create another one of the same lower
    space       what that one takes on the disk, in MiB
    true        the whole command `unionfs run --name NAME -- true`, again in a kept container
    first byte  open the large file for writing in a mounted container, and write one byte
    rm          the whole command `unionfs rm NAME`

`--write PAGE` puts the table into a page, after `<!-- files -->` or `<!-- parent -->`, up to `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path

from benchmarks.disks import new_filesystem
from unionfs.errors import UserError
from unionfs.images.drivers import Driver, Wanted, Writable, open_driver
from unionfs.storage.root import make_directory, open_root

_FILES = 5000
_LARGE = 256 << 20
_ROUNDS = 5
_PLACES = (
    ("union", "ext4"), ("overlay2", "ext4"), ("vfs", "ext4"), ("vfs", "btrfs"), ("btrfs", "btrfs"),
    ("devicemapper", "ext4"), ("zfs", "zfs"),
)  # fmt: skip
_COLUMNS = ("first", "next", "space", "true", "first byte", "rm")
_UNIONFS = str(Path(sys.executable).parent / "unionfs")
_END = "<!-- end -->"


def _make_lower(lower: Path, parent: Path | None) -> None:
    if parent is not None:
        subprocess.run(["cp", "-a", parent, lower], check=True)
    else:
        for number in range(_FILES):
            directory = lower / "tree" / str(number // 100)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / str(number)).write_bytes(os.urandom(4096))
        (lower / "bin").mkdir()
        busybox = shutil.which("busybox")
        assert busybox is not None, "busybox is not installed"
        shutil.copy(busybox, lower / "bin/true")
    with (lower / "large").open("wb") as file:
        for _ in range(_LARGE >> 20):
            file.write(os.urandom(1 << 20))
    os.sync()


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _in_child(action: Callable[[], float]) -> float:
    """What `action` returns in a process of its own, which a mount may change."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        code = 1
        try:
            os.write(writer, repr(action()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.wait()
    return float(text)


def _first_byte(driver: Driver, layer: Writable) -> float:
    mounted = driver.mount(layer, Wanted())

    def write() -> None:
        fd = os.open(f"{mounted.path}/large", os.O_WRONLY)
        os.pwrite(fd, b"x", 0)
        os.close(fd)

    try:
        return _timed(write)
    finally:
        mounted.unmount()


def _free(place: Path) -> int:
    os.sync()
    if shutil.which("zpool"):  # ZFS counts what is free after it has written a group of transactions
        subprocess.run(["zpool", "sync"], check=False, stderr=subprocess.DEVNULL)
    found = os.statvfs(place)
    return found.f_bfree * found.f_frsize


class _Trial:
    """One driver on one filesystem."""

    def __init__(self, name: str, place: Path, lower: Path) -> None:
        self._place, self._lower, self._name = place, lower, name
        self.root = place / "storage"
        self.driver = open_driver(name, str(self.root))
        self.driver.check()
        open_root(str(self.root))
        self._number = 0

    def layer(self) -> Writable:
        self._number += 1
        path = make_directory(f"{self.root}/containers/layer{self._number}")
        os.mkdir(f"{path}/merged")
        return Writable(path, str(self.root), (str(self._lower),))

    def remove(self, layer: Writable) -> None:
        self.driver.remove(layer)
        shutil.rmtree(layer.path)

    def unionfs(self, *words: str | Path) -> None:
        environment = {**os.environ, "UNIONFS_ROOT": str(self.root)}
        subprocess.run([_UNIONFS, *words], env=environment, check=True, stdout=subprocess.DEVNULL)

    def rounds(self) -> Iterator[dict[str, float]]:
        for _ in range(_ROUNDS):
            found: dict[str, float] = {}
            first = self.layer()
            found["first"] = _timed(lambda: self.driver.create(first))  # noqa: B023
            before, layer = _free(self._place), self.layer()
            found["next"] = _timed(lambda: self.driver.create(layer))  # noqa: B023
            found["space"] = (before - _free(self._place)) / (1 << 20)
            found["first byte"] = _in_child(lambda: _first_byte(self.driver, layer))  # noqa: B023
            self.remove(first)
            self.remove(layer)
            chosen = ("--storage-driver", self._name, "-l", self._lower)
            self.unionfs("run", "--name", "kept", *chosen, "--", "true")
            found["true"] = _timed(lambda: self.unionfs("run", "--name", "kept", "--", "true"))
            found["rm"] = _timed(lambda: self.unionfs("rm", "kept"))
            self.driver.prune()
            yield found


def _measured(name: str, kind: str, area: Path, parent: Path | None) -> dict[str, float]:
    """The medians. Raises UserError where the driver cannot be used."""
    with new_filesystem(area, kind) as place:
        lower = place / "lower"
        trial = _Trial(name, place, lower)
        _make_lower(lower, parent)
        rounds = list(trial.rounds())
    return {column: statistics.median(one[column] for one in rounds) for column in _COLUMNS}


def _table(results: dict[str, dict[str, float]]) -> str:
    """The results as Markdown; times in milliseconds."""
    lines = [f"| driver | {' | '.join(_COLUMNS)} |", f"|---|{'---|' * len(_COLUMNS)}"]
    for title, found in results.items():
        cells = [
            f"{found[column]:.1f} MiB" if column == "space" else f"{found[column] * 1000:.1f} ms"
            for column in _COLUMNS
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _write(page: Path, start: str, text: str) -> None:
    before, _, rest = page.read_text().partition(start)
    _, end, after = rest.partition(_END)
    assert end, f"{page} has no place for the table"
    page.write_text(f"{before}{start}\n{text}\n{end}{after}")


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--only", action="append", metavar="DRIVER")
    parser.add_argument("--parent", type=Path, metavar="DIR")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    given = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as area:
        for name, kind in _PLACES:
            if given.only and name not in given.only:
                continue
            title = f"{name} on {kind}"
            try:
                results[title] = _measured(name, kind, Path(area), given.parent)
            except (UserError, OSError, subprocess.CalledProcessError) as error:
                print(f"{title}: not measured: {error}", file=sys.stderr)
    what = f"{_FILES:,} files of 4 KiB"
    if given.parent is not None:
        count = sum(len(names) for _, _, names in os.walk(given.parent))
        what = f"{given.parent.name}, {count:,} files,"
    text = f"Linux {platform.release()}, {date.today()}; {what} and one file of 256 MiB:\n\n{_table(results)}"
    print(text)
    if given.write is not None:
        _write(given.write, "<!-- parent -->" if given.parent else "<!-- files -->", text)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
