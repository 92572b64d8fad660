"""How fast programs of a lower start in a union, and how much memory they take, beside kernel overlayfs.

    python -m benchmarks.program_start [--rounds N] [--mounts N] [--io MODE] [--directory DIR]

As root. The lower has Python with its standard library, git and node, as far as they are installed here,
with their shared libraries, and is in the page cache. Prints, for the union and for overlayfs by turns, the
medians with their quartiles:

- the time from the start of a program to its end, in milliseconds: the first on a fresh mount, and the next;
- the time to read a mapped library of 64 MiB on a fresh mount, page by page, in milliseconds;
- in MiB, with Python running (with json, ssl and http.client) in one mount and in many: how much they add to
  the page cache of the machine (so nothing else may run), and the file pages that these processes use (PSS).
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_MAPPED = "library"
_MAPPED_SIZE = 64 << 20
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin"}
_IMPORTS = "import json, ssl, http.client"


# -- the lower -----------------------------------------------------------------------------------------


def _libraries(program: Path) -> list[Path]:
    """The shared libraries of a program or library, and their loader."""
    found = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
    return [Path(path) for path in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", found, re.MULTILINE)]


def _put(tree: Path, path: Path) -> None:
    """Copy a file with its libraries to its own path below the tree."""
    for source in (path, *_libraries(path)):
        target = tree / source.relative_to("/")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def _build(tree: Path) -> dict[str, list[str]]:
    """Fill the lower; returns the commands to run in it, by name."""
    python = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")
    standard = Path(os.__file__).parent
    unwanted = shutil.ignore_patterns("site-packages", "test", "idlelib", "tkinter", "ensurepip", "config-*")
    shutil.copytree(standard, tree / standard.relative_to("/"), ignore=unwanted, symlinks=True)
    for extension in (standard / "lib-dynload").glob("*.so"):
        _put(tree, extension)
    _put(tree, python)
    commands = {"python3": [str(python), "-c", _IMPORTS]}
    for name, argument in (("git", "--version"), ("node", "--version")):
        if found := shutil.which(name):
            _put(tree, Path(found).resolve())
            commands[name] = [str(Path(found).resolve()), argument]
    if "node" in commands:
        commands["node"][1:] = ["-e", "0"]
    (tree / "dev").mkdir()
    shutil.copyfile("/dev/null", tree / "dev/null")
    (tree / _MAPPED).write_bytes(b"\x7fELF" + os.urandom(_MAPPED_SIZE))
    for path in tree.rglob("*"):
        if path.is_file():
            path.read_bytes()  # into the page cache
    os.sync()
    return commands


# -- the mounts ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _mounted(area: Path, io: str) -> Iterator[Path]:
    """A fresh mount of the lower with a new upper: the union, or with ``io`` "overlayfs" the kernel's."""
    home = Path(tempfile.mkdtemp(dir=area))
    for name in ("upper", "work", "merged"):
        (home / name).mkdir()
    lower, upper, work, merged = area / "lower", home / "upper", home / "work", home / "merged"
    if io == "overlayfs":
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], check=True)
    else:
        layers = ["-l", str(lower), "-u", str(upper), "-w", str(work), "--session", "direct", "--io", io]
        subprocess.run([sys.executable, "-m", "unionfs", "mount", *layers, str(merged)], check=True)
    try:
        yield merged
    finally:
        subprocess.run(["umount", str(merged)], check=True)


def _milliseconds(root: Path, command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(["chroot", str(root), *command], check=True, stdout=subprocess.DEVNULL, env=_ENVIRONMENT)
    return (time.perf_counter() - began) * 1e3


def _mapped_milliseconds(root: Path) -> float:
    began = time.perf_counter()
    with (root / _MAPPED).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with mapped:
        mapped[:: mmap.PAGESIZE]
    return (time.perf_counter() - began) * 1e3


# -- memory --------------------------------------------------------------------------------------------


def _cached() -> float:
    """The page cache of the machine, in MiB."""
    os.sync()
    text = Path("/proc/meminfo").read_text()
    found = re.search(r"^Cached:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def _file_pages(pid: int) -> float:
    """The file pages of a process, shared ones in part, in MiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.findall(r"^Pss_(?:File|Shmem):\s+(\d+) kB", text, re.MULTILINE)  # Shmem: of a tmpfs
    return sum(map(int, found)) / 1024


def _memory(area: Path, io: str, command: list[str], mounts: int) -> tuple[float, float]:
    """Page cache and file pages in use, with Python running in each of the mounts."""
    program = [*command[:-1], command[-1] + "; print(flush=True); input()"]
    with contextlib.ExitStack() as stack:
        roots = [stack.enter_context(_mounted(area, io)) for _ in range(mounts)]
        before = _cached()
        running = []
        for root in roots:
            words = ["chroot", str(root), *program]
            process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_ENVIRONMENT
            )
            running.append(process)
            assert process.stdout is not None
            process.stdout.readline()
        found = _cached() - before, sum(_file_pages(process.pid) for process in running)
        for process in running:
            process.communicate(b"\n")
    return found


# -- the report ----------------------------------------------------------------------------------------


def _line(title: str, ours: list[float], kernel: list[float]) -> str:
    cells = []
    for values in (ours, kernel):
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        cells.append(f"{middle:8.1f} ({low:.1f} to {high:.1f})".ljust(28))
    ratio = statistics.median(kernel) / statistics.median(ours)
    return f"{title:<24}{cells[0]}{cells[1]}{ratio:.2f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mounts", type=int, default=10)
    parser.add_argument("--io", default="hybrid")
    parser.add_argument("--directory", default="/dev/shm")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.directory) as name:
        area = Path(name)
        (area / "lower").mkdir()
        commands = _build(area / "lower")
        figures: dict[str, dict[str, list[float]]] = {}
        for number in range(given.rounds):
            contestants = (given.io, "overlayfs")
            for io in contestants if number % 2 else contestants[::-1]:
                for program, command in commands.items():
                    with _mounted(area, io) as root:
                        for title in (f"{program}, first", f"{program}, again"):
                            times = figures.setdefault(title, {}).setdefault(io, [])
                            times.append(_milliseconds(root, command))
                with _mounted(area, io) as root:
                    times = figures.setdefault("mapped read", {}).setdefault(io, [])
                    times.append(_mapped_milliseconds(root))
        print(f"{'milliseconds':<24}{given.io:<28}{'overlayfs':<28}overlayfs / {given.io}")
        for title, times_of in figures.items():
            print(_line(title, times_of[given.io], times_of["overlayfs"]))
        print(f"\n{'MiB':<24}page cache  file pages in use")
        for io in (given.io, "overlayfs"):
            for mounts in (1, given.mounts):
                cache, pages = _memory(area, io, commands["python3"], mounts)
                print(f"{f'{io}, {mounts} mounts':<24}{cache:10.1f}  {pages:.1f}")


if __name__ == "__main__":
    main()
